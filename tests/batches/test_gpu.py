"""What the GPU's way makes of rows, by the same calls on this machine's CPU; with a GPU by nvJPEG, too."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torchcodec.decoders
from torch._subclasses.fake_tensor import FakeTensorMode

from scalecv.batches import feed as feeds
from scalecv.batches import gpu
from scalecv.batches.collate import Row, fill
from scalecv.batches.decoders import Decoders, Shared
from scalecv.batches.feed import Feed
from scalecv.batches.gpu import GpuDecoder, OnGpu, hindrance
from scalecv.batches.gpu_likeness import MOST_OFF
from scalecv.batches.pixels import pixels_of
from scalecv.config import Augment, Data, build
from scalecv.errors import ConfigError
from scalecv.jpeg import turbo
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from tests.batches.test_collate import pixels, rows
from tests.jpeg.test_turbo import picture
from tests.shards.images import encoded

CPU = torch.device("cpu")
CROPS = {"resized_crop": (0.2, 1.0), "hflip": 0.5, "vflip": 0.5}


def batches(how, some, seeds, device=CPU):
    """The batch by the GPU's way, that by the threads, and what was said."""
    batches.decoder = GpuDecoder(how, device)
    decoders = Decoders(how, 2, "gpu", 1, Shared(), gpu=batches.decoder)
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


def contents(files):
    return [file.numpy().tobytes() for file in files]


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
    said = [f"data.decode=gpu: the GPU decodes JPEGs; {n} crops are off those of the CPU by 0." for n in (8, 6)]
    assert (notes == []) if kinds == ("PNG",) else notes[0].startswith(said[len(kinds) - 1])


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
    real, asked = torchcodec.decoders.decode_jpeg, []

    def picky(files, **how):
        asked.append(contents(files))
        if some[4].image in asked[-1] or some[7].image in asked[-1]:
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return real(files, **how)

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", picky)
    made, expected, notes = batches(pixels(**CROPS), some, (3, 1))
    assert off(made, expected).max() <= 1 and torch.equal(off(made, expected)[4], torch.zeros(3, 24, 24))
    why = "RuntimeError: nvjpegDecodeBatched failed: 2"
    assert notes[1:] == [f"data.decode=gpu: 4.x or more are not decoded there ({why}): threads do"]
    assert asked.count([some[4].image]) == 3  # for the comparison, the first batch and the second, and then no more
    assert batches.decoder.job(some[4], None) is None and batches.decoder.job(some[5], None) is not None


def test_a_gpu_that_decodes_nothing_leaves_all_to_the_threads(monkeypatch):
    asked = []

    def none(files, **how):
        asked.append(len(files))
        raise RuntimeError("not compiled with nvJPEG support\nfurther lines")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", none)
    made, expected, notes = batches(pixels(**CROPS), rows(("JPEG",)), (3, 1))
    assert torch.equal(made["image"], expected["image"]) and batches.decoder.job(rows()[0], None) is None
    why = "RuntimeError: not compiled with nvJPEG support"
    assert notes == [f"data.decode=gpu: it decoded none of 8 pictures ({why}): threads decode"]
    assert max(asked) == 8 and len(asked) == 15  # the comparison alone, which halves its way to each picture


def test_few_pictures_that_fail_do_not_switch_the_gpu_off(monkeypatch):
    def none(files, **how):
        raise RuntimeError("nvjpegDecodeBatched failed: 2")

    some = rows(("JPEG",))
    decoder = GpuDecoder(pixels(), CPU)
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", none)
    with ThreadPoolExecutor(1) as pool:
        OnGpu(decoder, pool, lambda left: fill(left, pixels(), None, AtOnce(), 1), some[:2], None).wait()
    assert decoder.job(some[0], None) is not None and not decoder._is_given_up


@pytest.mark.parametrize(
    "why", ["CUDA out of memory. Tried to allocate 2.00 GiB (originally from aten::empty)", "nvjpegDecode failed: 5"]
)
def test_memory_that_lacks_is_asked_for_again(monkeypatch, why):
    real, is_full = torchcodec.decoders.decode_jpeg, [False, True, True, True]

    def scarce(files, **how):
        if len(files) == 1 and is_full.pop():
            raise RuntimeError(why)
        return real(files, **how)

    decoder, some = GpuDecoder(pixels(), CPU), rows(("JPEG",))[:1]
    jobs = {0: decoder.job(some[0], None)}
    images = decoder._images(1)
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", scarce)
    assert [decoder._make(jobs, images) for _ in range(4)] == [[0], [0], [0], []] and images.any()
    assert decoder.job(some[0], None) is not None


@pytest.mark.parametrize(
    "place", [lambda _: (gpu.functional, "interpolate"), lambda decoder: (decoder, "_images")], ids=["resize", "batch"]
)
def test_where_the_network_has_taken_the_memory_the_threads_decode(monkeypatch, place):
    def scarce(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    how, some = pixels(**CROPS), rows(("JPEG",))
    decoders = Decoders(how, 2, "gpu", 1, Shared(), gpu=GpuDecoder(how, CPU))
    first, _ = decoders.start(some, (3, 1)).wait()
    monkeypatch.setattr(*place(decoders._gpu), scarce)
    later, _ = decoders.start(some, (3, 1)).wait()
    expected, _ = decoders.here(some, (3, 1))
    decoders.close()
    assert torch.equal(later["image"], expected["image"]) and off(first, expected).max() <= 1
    assert "0.x or more are not decoded there (OutOfMemoryError: CUDA out of memory." in decoders.notes[1]


def test_where_memory_lacks_at_first_the_comparison_comes_later(monkeypatch):
    how, some, real = pixels(**CROPS), rows(("JPEG",)), gpu.functional.interpolate
    is_full = [True]

    def scarce(*args, **more):
        if is_full and is_full.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **more)

    monkeypatch.setattr(gpu.functional, "interpolate", scarce)
    decoders = Decoders(how, 2, "gpu", 1, Shared(), gpu=GpuDecoder(how, CPU))
    first, later = (decoders.start(some, (3, 1)).wait()[0] for _ in range(2))
    expected, _ = decoders.here(some, (3, 1))
    decoders.close()
    assert torch.equal(first["image"], expected["image"]) and not torch.equal(later["image"], expected["image"])
    assert off(later, expected).max() <= 1 and "the GPU decodes JPEGs" in decoders.notes[1]


def test_drawings_of_hard_colours_are_taken_for_what_they_are(monkeypatch):
    """nvJPEG enlarges colours by the nearest pixel, as libjpeg-turbo does when it is told to."""
    y, x = np.mgrid[:64, :64]
    checks = np.where(((x // 2 + y // 2) % 2 == 0)[..., None], (255, 0, 0), (0, 0, 255)).astype(np.uint8)
    data = encoded(PIL.Image.fromarray(checks), "JPEG", quality=95)
    some = [row._replace(image=data) for row in rows(("JPEG",))[:8]]

    def nearest(files, **_):
        each = [turbo.decode(file, turbo.header(file), is_exact=False) for file in contents(files)]
        return [torch.from_numpy(pixels.copy()).permute(2, 0, 1) for pixels in each]

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", nearest)
    made, expected, notes = batches(pixels(64), some, None)
    assert off(made, expected).mean() > 10 and "8 crops are off those of the CPU by" in notes[0]


def test_pictures_are_decoded_in_parts_of_bounded_size(monkeypatch):
    real, sizes = torchcodec.decoders.decode_jpeg, []

    def counted(files, **how):
        found = real(files, **how)
        sizes.append(sum(picture.numel() for picture in found))
        return found

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", counted)
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 2 * (3 * 60 * 44 + 15 * 24 * 24))
    made, expected, _ = batches(pixels(**CROPS), rows(("JPEG",)), (3, 1))
    assert off(made, expected).max() <= 1 and max(sizes) <= 3 * 60 * 44 * 2 and len(sizes) > 12


def test_what_is_out_of_the_ordinary_is_left_to_the_threads():
    decoder, (row, *_) = GpuDecoder(pixels(8), CPU), rows(("JPEG",))
    assert decoder.job(row, None) is not None
    assert decoder.job(row._replace(mask=b"x"), None) is None and decoder.job(row._replace(nodata=0.0), None) is None
    plain = PIL.Image.new("RGB", (60, 40), (200, 20, 90))
    kinds = {
        "rgb": encoded(plain, "JPEG", keep_rgb=True),
        "cmyk": encoded(plain.convert("CMYK"), "JPEG"),
        "gray": encoded(plain.convert("L"), "JPEG"),
        "wide": encoded(plain.resize((730, 10)), "JPEG"),
        "turned": encoded(plain, "JPEG", exif=turned()),
    }
    assert {name: decoder.job(row._replace(image=data), None) for name, data in kinds.items()} == dict.fromkeys(kinds)
    for good in (encoded(plain, "JPEG", progressive=True), encoded(plain.resize((720, 10)), "JPEG")):
        assert decoder.job(row._replace(image=good), None) is not None


def turned() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def test_the_middle_of_a_picture():
    made, expected, _ = batches(replace(pixels(), resize="crop"), rows(("JPEG",)), None)
    assert off(made, expected).max() <= 1


def test_other_pixels_end_the_run_before_its_first_batch(monkeypatch):
    real = torchcodec.decoders.decode_jpeg

    def swapped(files, **how):
        return [picture.flip(0) for picture in real(files, **how)]  # blue, green, red

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", swapped)
    with pytest.raises(ConfigError, match=r"here, \d+\.x: the GPU's pixels are off .* set data\.decode=trainer"):
        batches(pixels(**CROPS), rows(("JPEG",)), (3, 1))


class AtOnce:
    """A pool whose work is done in the thread that asks: what is switched on there holds for it."""

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


@pytest.fixture
def cuda(monkeypatch):
    """Streams and events of a GPU that is not there, and what was asked of them, in order."""
    told = []

    class Stream:
        def __init__(self, *_):
            told.append("new stream")

        def wait_event(self, event):
            told.append("training waits")

    @contextmanager
    def on(stream):
        told.append("begin")
        yield
        told.append("end")

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", on)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr("torch.cuda.Event", lambda: SimpleNamespace(record=lambda: told.append("record")))
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: told.append("in use"), raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self, raising=False)
    return told


def test_all_that_is_made_stays_on_the_device_and_training_waits_for_it(cuda, monkeypatch):
    """Tensors without content know their device, and refuse to be mixed with those of another one."""
    how, some = (
        pixels(**CROPS, rot90=True, pad_crop_px=2, noise=0.5, blur_px=2.0, band_offset=0.2, contrast=0.2),
        rows(),
    )
    decoder = GpuDecoder(how, torch.device("cuda:0"))

    def decoded(jobs):
        sizes = [(3, job.header.height, job.header.width) for job in jobs]
        found = [torch.empty(size, dtype=torch.uint8, device="cuda:0") for size in sizes]
        return [None if job.row.id == "2" else picture for job, picture in zip(jobs, found, strict=True)]

    monkeypatch.setattr(decoder, "_decoded", decoded)
    monkeypatch.setattr(decoder, "_is_compared", True)  # there is nothing to compare

    with ThreadPoolExecutor(1) as pool, FakeTensorMode(allow_non_fake_inputs=True):

        def here(left):  # in another thread, where tensors have content
            return pool.submit(fill, left, how, (3, 1), AtOnce(), 1).result()

        batch, _ = OnGpu(decoder, AtOnce(), here, some, (3, 1)).wait()
    images = batch["image"]
    assert (images.device.type, images.dtype, images.shape) == ("cuda", torch.uint8, (len(some), 3, 24, 24))
    assert images.is_contiguous(memory_format=torch.channels_last) and batch["label"].device.type == "cpu"
    assert cuda[:4] == ["new stream", "begin", "record", "end"] and cuda[-2:] == ["training waits", "in use"]


def test_streams_are_used_again(cuda):
    decoder = GpuDecoder(pixels(), torch.device("cuda:0"))
    for _ in range(12):
        with decoder._stream(), decoder._stream():
            pass
    assert cuda.count("new stream") == 2


def test_what_hinders_is_told(monkeypatch):
    cuda = torch.device("cuda")
    assert hindrance(pixels(), cuda) == ""
    assert hindrance(pixels(), CPU) == "this process trains on the CPU"
    assert "data.size_px" in hindrance(pixels(size_px=None), cuda)
    assert "data.size_px" in hindrance(replace(pixels(), mask_values=(0, 1)), cuda)
    monkeypatch.setattr(gpu, "version", lambda name: "1.0rc1+cu132")
    assert hindrance(pixels(), cuda) == ""
    monkeypatch.setattr(gpu, "version", lambda name: "0.16.1")
    assert hindrance(pixels(), cuda) == "TorchCodec 0.16.1 is too old (pip install 'scalecv[gpu]')"
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as if it were not installed
    assert hindrance(pixels(), cuda).startswith("TorchCodec does not load (pip install 'scalecv[gpu]'): ")


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
def test_nvjpeg_gives_the_pixels_of_the_cpu_within_the_bound_also_beside_training():
    """Many batches while both streams are busy: the same pixels as one after the other, near those of the threads."""
    how, device = pixels(64, **CROPS, brightness=0.2, rot90=True, pad_crop_px=2), torch.device("cuda")
    gray = Row("g", "g.jpg", "here", encoded(PIL.Image.new("L", (50, 30), 77), "JPEG"), None, None, "a")
    slow = Row("p", "p.jpg", "here", encoded(picture(300, 200, seed=5), "JPEG", progressive=True), None, None, "b")
    some = [*rows(sizes=((600, 440), (320, 900), (400, 400))), gray, slow]
    expected = {}
    for epoch in range(30):
        one = Decoders(how, 2, "gpu", 1, Shared(), gpu=GpuDecoder(how, device))
        expected[epoch] = one.start(some, (3, epoch)).wait()[0]["image"].clone()
        torch.cuda.synchronize()
        assert off({"image": expected[epoch]}, one.here(some, (3, epoch))[0]).mean((1, 2, 3)).max() < MOST_OFF
        one.close()
    busy, one = (
        torch.randn(4096, 4096, device=device),
        Decoders(how, 2, "gpu", 1, Shared(), gpu=GpuDecoder(how, device)),
    )
    pending = [one.start(some, (3, epoch)) for epoch in range(30)]
    for epoch, batch in enumerate(pending):
        busy = (busy @ busy).clamp_(-1, 1)
        made = batch.wait()[0]["image"]
        assert torch.equal(made, expected[epoch])
    one.close()
