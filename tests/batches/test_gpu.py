"""What the GPU's way makes of rows, by the same calls on this machine's CPU; with a GPU by nvJPEG, too."""

from contextlib import nullcontext

import PIL.Image
import pytest
import torch
import torchcodec.decoders
from torch._subclasses.fake_tensor import FakeTensorMode

from scalecv.batches import feed as feeds
from scalecv.batches import gpu
from scalecv.batches.collate import Row
from scalecv.batches.decoders import Decoders, Shared
from scalecv.batches.feed import Feed
from scalecv.batches.gpu import GpuDecoder, hindrance
from scalecv.batches.pixels import pixels_of
from scalecv.config import Augment, Data, build
from scalecv.errors import ConfigError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from tests.batches.test_collate import pixels, rows
from tests.shards.images import encoded

CPU = torch.device("cpu")
CROPS = {"resized_crop": (0.2, 1.0), "hflip": 0.5, "vflip": 0.5}


def batches(how, some, seeds, device=CPU):
    """The batch by the GPU's way, that by the threads, and what was said."""
    decoders = Decoders(how, 2, "gpu", 1, Shared(), gpu=GpuDecoder(how, device))
    threads = Decoders(how, 2, "trainer", 1, Shared())
    try:
        first, _ = decoders.start(some, seeds).wait()
        again, took = decoders.start(some, seeds).wait()
        expected, _ = threads.start(some, seeds).wait()
    finally:
        decoders.close()
        threads.close()
    assert torch.equal(first["image"], again["image"]) and took > 0
    return again, expected, decoders.notes


def off(one, other):
    return (one["image"].cpu().float() - other["image"].float()).abs()


@pytest.mark.parametrize("kinds", [("JPEG",), ("JPEG", "PNG"), ("PNG",)])
@pytest.mark.parametrize(("augment", "seeds"), [(CROPS, (3, 1)), (CROPS, None), ({}, (3, 1))])
def test_the_batch_is_that_of_the_threads(kinds, augment, seeds):
    gray = Row("g", "g.jpg", "here", encoded(PIL.Image.new("L", (50, 30), 77), "JPEG"), None, None, "a")
    made, expected, notes = batches(pixels(**augment), [*rows(kinds), gray], seeds)
    assert made["image"].dtype == torch.uint8 and made["image"].is_contiguous(memory_format=torch.channels_last)
    assert made["id"] == expected["id"] and made["path"] == expected["path"]
    assert torch.equal(made["label"], expected["label"])
    assert off(made, expected).max() <= 1  # torch resizes bytes in whole numbers on a CPU, and here in float32
    said = [f"data.decode=gpu: the GPU decodes JPEGs; its pixels of {n} pictures are off" for n in (8, 6)]
    assert kinds == ("PNG",) or notes[0].startswith(said[len(kinds) - 1])


@pytest.mark.parametrize(
    "augment",
    [
        {"brightness": 0.3, "contrast": 0.3},
        {"rot90": True, "pad_crop_px": 3, "erase": 1.0},
        {"noise": 0.5, "blur_px": 2.0, "band_gain": 0.2, "band_offset": 0.2, "band_drop": 0.5},
        {"rotate_deg": 20.0, "translate": 0.1, "zoom": 0.2},
    ],
)
def test_further_changes_are_those_of_the_threads(augment):
    how = pixels(**CROPS, **augment)
    made, expected, _ = batches(how, rows(("JPEG",)), (3, 1))
    assert off(made, expected).mean() < 0.6 and off(made, expected).max() <= 4


def test_what_the_gpu_does_not_decode_the_threads_do(monkeypatch):
    some = rows(("JPEG",))
    real = torchcodec.decoders.decode_jpeg

    def picky(files, **how):
        if some[4].image in files or some[7].image in files:
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return real(files, **how)

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", picky)
    made, expected, notes = batches(pixels(**CROPS), some, (3, 1))
    assert off(made, expected).max() <= 1 and torch.equal(off(made, expected)[4], torch.zeros(3, 24, 24))
    assert [note for note in notes if "did not decode 4.x" in note] == notes[1:]


def test_a_gpu_that_decodes_nothing_leaves_all_to_the_threads(monkeypatch):
    def none(files, **how):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", none)
    made, expected, notes = batches(pixels(**CROPS), rows(), (3, 1))
    assert torch.equal(made["image"], expected["image"])
    assert notes == ["data.decode=gpu: it did not decode 0.x or more: threads do"]


def test_other_pixels_end_the_run_before_its_first_batch(monkeypatch):
    real = torchcodec.decoders.decode_jpeg

    def swapped(files, **how):
        return [picture.flip(0) for picture in real(files, **how)]  # blue, green, red

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", swapped)
    with pytest.raises(ConfigError, match=r"here, \d+\.x: the GPU's pixels are off .* set data\.decode=trainer"):
        batches(pixels(**CROPS), rows(("JPEG",)), (3, 1))


def test_all_that_is_made_stays_on_the_device(monkeypatch):
    """Tensors without content know their device, and refuse to be mixed with those of another one."""
    how, some = (
        pixels(**CROPS, rot90=True, pad_crop_px=2, noise=0.5, blur_px=2.0, band_offset=0.2, contrast=0.2),
        rows(),
    )
    jpegs = [row for row in some if row.image[:2] == b"\xff\xd8"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = GpuDecoder(how, torch.device("cuda:0"))
        known = [decoder.takes(row) for row in jpegs]
        pictures = [torch.empty(3, header.height, header.width, dtype=torch.uint8, device="cuda:0") for header in known]
        monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", lambda files, **_: pictures)
        monkeypatch.setattr(decoder, "_stream", lambda: nullcontext(None))
        images = decoder.make(jpegs, known, (3, 1)).images
    assert (images.device.type, images.shape) == ("cuda", (len(jpegs), 3, 24, 24))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_what_hinders_is_told(monkeypatch):
    cuda = torch.device("cuda")
    assert hindrance(pixels(), cuda) == ""
    assert hindrance(pixels(), CPU) == "this process trains on the CPU"
    assert "data.size_px" in hindrance(pixels(size_px=None), cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'scalecv[gpu]'" in hindrance(pixels(), cuda)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """96 pictures of two classes in row groups of some rows; every third one is a PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for number, row in enumerate(rows(("JPEG", "JPEG", "PNG")) * 8):
        path = root / "source" / "ab"[number % 2] / f"{number}.{'png' if number % 3 == 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.image)
    options = IngestOptions(
        source=str(root / "source"), to=str(root / "data"), layout="imagefolder", row_group_mb=0.01, concurrency=0
    )
    ingest(options)
    return open_dataset(str(root / "data"))


def feed(dataset, split, decode):
    data = Data(uri=dataset.uri, size_px=24, augment=Augment(**CROPS))
    how = pixels_of(dataset.manifest, data, dataset.uri)
    return Feed(dataset, split, how, batch=8, is_training=split == "train", decode=decode, threads=2)


def test_an_epoch_is_that_of_the_threads_and_so_is_what_is_left_of_it(photographs, monkeypatch):
    monkeypatch.setattr(feeds, "hindrance", lambda how, device: "")
    by_gpu, by_threads = feed(photographs, "train", "gpu"), feed(photographs, "train", "trainer")
    for start in (0, 3):
        pairs = [*zip(by_gpu.epoch(1, start), by_threads.epoch(1, start), strict=True)]
        assert [step for (step, _), _ in pairs] == [*range(start, by_threads.plan(1).steps)]
        for (_, made), (_, expected) in pairs:
            assert made["id"] == expected["id"] and torch.equal(made["position"], expected["position"])
            assert torch.equal(made["label"], expected["label"]) and off(made, expected).max() <= 1
    assert feed(photographs, "val", "gpu").gpu is None  # scores do not hang on who decodes


def test_without_a_gpu_the_threads_decode_and_it_is_told_once(photographs):
    one = feed(photographs, "train", "gpu")
    said = ["data.decode=gpu: this process trains on the CPU: 2 threads decode"]
    with one.epochs(0, 0, 2) as epochs:
        notes = [(epoch.decoders.notes, [*epoch])[0] for epoch in epochs]
    assert notes == [said, []]


def test_pixels_of_the_gpu_make_another_experiment():
    def identity(decode):
        tree = {"name": "a", "task": "classify", "data": {"uri": "b", "decode": decode}, "model": {"arch": "resnet18"}}
        return build(tree, "test").identity()

    assert identity("trainer") == identity("cluster") == identity("auto") != identity("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg_gives_the_pixels_of_the_cpu_within_the_bound():
    how = pixels(64, **CROPS, brightness=0.2, noise=0.2, rot90=True, pad_crop_px=2)
    made, expected, notes = batches(how, rows(), (3, 1), torch.device("cuda"))
    assert made["image"].device.type == "cuda" and "the GPU decodes JPEGs" in notes[0]
    assert off(made, expected).mean() < gpu.MOST_OFF
