"""Predictions: of scenes as of one pass, with the place of the images, the same here and in Ray, and once."""

import dataclasses
import io
import json
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from torchvision.transforms.v2 import functional as F

from scalecv import raster
from scalecv.artifacts import bundle
from scalecv.artifacts.bundle import Call, DataFacts, PixelFacts, UpscaleFacts
from scalecv.artifacts.networks import behind
from scalecv.errors import ConfigError, DataError, ScalecvError
from scalecv.models import build_model
from scalecv.serve.predict import predict
from scalecv.serve.predictor import Windows, windows_for
from scalecv.shards.ingest import IngestOptions, ingest
from tests.shards.images import class_folders, png, write
from tests.shards.scenes import place, scene, wkt

NET = """
from torch import nn
def build(in_channels, outputs, pooled=False):
    body = [nn.Conv2d(in_channels, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, outputs, 5, padding=2)]
    return nn.Sequential(*body, *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else []))
"""
REACH_PX = 4
"""What a pixel of the network sees on each side: two convolutions of 5 px."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that gives a bundle of a small network of random weights."""
    (tmp_path / "reachnet.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(
        task: str,
        bands: int,
        dtype: str,
        classes=("ground", "roof"),
        size_px=None,
        values=(0, 1),
        sides_px=None,
        factor=1,
        enlarged_by="bicubic",
        call=None,
        **norm,
    ) -> str:
        import reachnet

        torch.manual_seed(0)
        outputs = 1 if task == "segment" and len(classes) == 2 else len(classes)
        args = {"pooled": True} if task == "classify" else {}
        net = build_model(**call.model_dump()) if call else reachnet.build(bands, outputs, **args)
        how = {"stem": "default", "norm": "group"}
        call = call or Call(arch="reachnet:build", encoder="", in_channels=bands, outputs=outputs, args=args, **how)
        taken = {"bands": None, "color": "native", "channels": bands, "source_dtype": dtype, "size_px": size_px}
        pixels = PixelFacts(
            **taken,
            dtype=dtype if dtype in ("uint8", "int16") else "float32",
            resize="stretch",
            sides_px=sides_px,
            mean=(norm.get("mean", 120.0),) * bands,
            std=(norm.get("std", 60.0),) * bands,
            mask_values=values if task == "segment" else (),
        )
        its = {}
        if enlarged_by == "sr":
            espcn = Call(arch="espcn", encoder="", in_channels=bands, outputs=bands, args={"width": 8}, **how)
            its = {"call": espcn, "pixels": pixels, "weights_hash": "its own"}
        stage = UpscaleFacts(method=enlarged_by, factor=factor, **its) if factor > 1 else None
        whole = behind(stage, pixels, net) if stage else net
        if its:
            torch.nn.init.normal_(whole.enlarge.network.last.weight)
        parts = bundle.parts(
            whole.state_dict(),
            name="reach",
            task=task,
            upscale=stage,
            call=call,
            pixels=pixels,
            classes=classes,
            data=DataFacts(uri="x", version=0, fingerprint="x"),
        )
        folder = tmp_path / f"bundle-{task}-{bands}-{dtype}"
        for name, data in parts.items():
            write(folder, name, data)
        return str(folder)

    return make


def run(model: str, source: Path, to: Path, **more):
    return predict(model, str(source), str(to), allow_import=True, **{"concurrency": 0, **more})


def opened(path: Path):
    with rasterio.open(path) as file:
        return file.read(), file.crs, tuple(file.transform)[:6], file.nodata, file.tags(ns="IMAGE_STRUCTURE")


def test_a_stitched_scene_is_that_of_one_pass(made, tmp_path):
    image, _ = scene(0, 384, 320)  # multiples of 32: one pass over other sizes fills up its far edges
    image[:100, 300:] = 0
    data = raster.encode(image, 0, wkt(), place(0, 0))
    write(tmp_path / "s", "deep/a.tif", data)
    model = made("segment", 4, "uint16", ("ground", "roof", "water"), values=(0, 5, 9), mean=2000.0, std=1500.0)
    one = run(model, tmp_path / "s", tmp_path / "one", tile=512, probability="float32")
    many = run(model, tmp_path / "s", tmp_path / "many", tile=96, overlap=4 * REACH_PX, batch=3, probability="float32")
    assert one.rows == many.rows == 1 and json.loads(json.dumps(dataclasses.asdict(one)))["quarantined"] == 0
    (a, crs, transform, nodata, how), (b, *_) = (opened(tmp_path / n / "deep/a.tif") for n in ("one", "many"))
    np.testing.assert_array_equal(a, b)
    found = raster.profile(data)
    assert (crs.to_wkt(), transform, nodata, how["LAYOUT"]) == (found.wkt, found.transform, 255, "COG")
    assert set(np.unique(a)) == {0, 5, 9, 255} and (a[0, :100, 300:] == 255).all() and (a[0, 100:] != 255).all()
    p, q = (opened(tmp_path / n / "deep/a.probability.tif")[0] for n in ("one", "many"))
    assert p.shape == (3, 320, 384) and np.isnan(p[0, 0, 350])
    np.testing.assert_allclose(p, q, atol=1e-4)
    np.testing.assert_allclose(p[:, 100:].sum(0), 1, atol=1e-5)
    narrow = run(model, tmp_path / "s", tmp_path / "narrow", tile=96, overlap=0, probability="float32")
    assert narrow.rows == 1
    gap = np.abs(opened(tmp_path / "narrow/deep/a.probability.tif")[0] - p)
    assert np.nanmax(gap) > 1e-3, "without overlap the cuts are seen, so the comparison can fail"


def test_a_scene_through_an_encoder_and_decoder_is_that_of_one_pass(made, tmp_path):
    """Linknet over three stages of resnet18, which sees some 70 px on each side."""
    image, _ = scene(0, 768, 512)
    write(tmp_path / "s", "a.tif", raster.encode(image, None, wkt(), place(0, 0)))
    about = {"arch": "linknet", "encoder": "resnet18", "in_channels": 4, "outputs": 3, "args": {"encoder_depth": 3}}
    call = Call(**about, stem="default", norm="batch")
    model = made("segment", 4, "uint16", ("ground", "roof", "water"), None, (0, 5, 9), call=call, mean=2e3, std=1.5e3)
    run(model, tmp_path / "s", tmp_path / "one", tile=768, probability="float32")
    run(model, tmp_path / "s", tmp_path / "many", tile=384, overlap=288, batch=2, probability="float32")
    run(model, tmp_path / "s", tmp_path / "narrow", tile=384, overlap=32, probability="float32")
    p, q, r = (opened(tmp_path / name / "a.probability.tif")[0] for name in ("one", "many", "narrow"))
    np.testing.assert_allclose(p, q, atol=1e-4)
    assert p.std() > 0.01 and np.abs(r - p).max() > 1e-3, "with little overlap the cuts are seen"


def test_a_scene_is_seen_at_the_scale_of_the_tiles_of_training(made, tmp_path):
    image, _ = scene(0, 512, 384)
    write(tmp_path / "s", "a.tif", raster.encode(image, None, wkt(), place(0, 0)))
    model = made("segment", 4, "uint16", size_px=64, sides_px=(128, 128), mean=2000.0, std=1500.0)
    one = run(model, tmp_path / "s", tmp_path / "one", tile=512, probability="float32")
    many = run(model, tmp_path / "s", tmp_path / "many", tile=128, overlap=64, probability="float32")
    told: list[str] = []
    default = run(
        *(model, tmp_path / "s", tmp_path / "default"),
        overlap=64,
        probability="float32",
        tell=lambda event: told.append(event.get("message", "")),
    )
    assert "scenes go through in windows of 128 px, one every 64 px, which the network sees as 64 px" in told
    assert one.rows == many.rows == default.rows == 1
    p, q, r = (opened(tmp_path / n / "a.probability.tif")[0][0] for n in ("one", "many", "default"))
    net = bundle.open_bundle(model, allow_import=True).model
    half = F.resize(torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1), [192, 256], antialias=True)
    with torch.no_grad():
        logits = net((half[None] - 2000) / 1500)
        expected = torch.nn.functional.interpolate(logits, (384, 512), mode="bilinear").sigmoid()[0, 0].numpy()
    np.testing.assert_allclose(p, expected, atol=1e-5)
    np.testing.assert_allclose(q, p, atol=1e-4)
    np.testing.assert_array_equal(q, r)
    older = made("segment", 4, "uint16", size_px=64, mean=2000.0, std=1500.0)
    run(older, tmp_path / "s", tmp_path / "older", tile=128, overlap=64, probability="float32")
    gap = np.abs(opened(tmp_path / "older/a.probability.tif")[0][0] - p)
    assert gap.max() > 0.05, "at the scale of the file something else is found, so the comparison can fail"


@pytest.mark.parametrize(("method", "factor"), [("bicubic", 2), ("bicubic", 4), ("sr", 2), ("sr", 4)])
def test_a_scene_behind_the_stage_is_that_of_one_pass_at_its_own_size(made, tmp_path, method, factor):
    image, _ = scene(0, 192, 160)
    data = raster.encode(image, None, wkt(), place(0, 0))
    write(tmp_path / "s", "a.tif", data)
    about = {"factor": factor, "enlarged_by": method, "mean": 2e3, "std": 1.5e3}
    model = made("segment", 4, "uint16", ("ground", "roof", "water"), values=(0, 5, 9), **about)
    one = run(model, tmp_path / "s", tmp_path / "one", tile=256, probability="float32")
    many = run(model, tmp_path / "s", tmp_path / "many", tile=96, overlap=32, batch=2, probability="float32")
    assert one.rows == many.rows == 1
    (a, crs, transform, *_), (b, *_) = (opened(tmp_path / n / "a.tif") for n in ("one", "many"))
    found = raster.profile(data)
    assert a.shape == (1, 160, 192) and (crs.to_wkt(), transform) == (found.wkt, found.transform)
    np.testing.assert_array_equal(a, b)
    p, q = (opened(tmp_path / n / "a.probability.tif")[0] for n in ("one", "many"))
    np.testing.assert_allclose(p, q, atol=1e-4)
    net = bundle.open_bundle(model, allow_import=True).model.eval()
    with torch.no_grad():
        logits = net((torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] - 2e3) / 1.5e3)
    np.testing.assert_allclose(p, logits.softmax(1)[0].numpy(), atol=1e-5)


def test_windows_have_the_side_of_training():
    assert windows_for(None, None, None, None) == Windows(512, 128, 512, 0, 0)
    assert windows_for(64, None, None, None) == Windows(64, 16, 64, 2048, 2048)
    assert windows_for(128, (250, 250), None, 50) == Windows(250, 50, 128, 2048, 250)
    assert windows_for(128, (256, 256), 1024, None) == Windows(1024, 256, 512, 1024, 256)
    assert windows_for(64, (100, 400), None, None) == Windows(200, 50, 64, 2048, 400)


@pytest.mark.parametrize(
    ("name", "bands", "dtype"), [("pvroof", 3, "uint8"), ("naip4", 4, "uint8"), ("water12", 12, "int16")]
)
def test_real_rasters_keep_their_georeference(made, shared_data, tmp_path, name, bands, dtype):
    folder = shared_data(name)
    files = sorted((folder / "test" / "images").glob("*"))[:2]
    for file in files:
        write(tmp_path / "s", file.name, file.read_bytes())
    done = run(made("segment", bands, dtype), tmp_path / "s", tmp_path / "out", probability="uint8", tile=96)
    assert (done.rows, done.quarantined) == (len(files), 0)
    for file in files:
        with rasterio.open(file) as image, rasterio.open(tmp_path / "out" / file.name) as out:
            assert (out.width, out.height, out.count, out.dtypes) == (image.width, image.height, 1, ("uint8",))
            assert out.transform == image.transform and out.crs == image.crs
            assert image.crs is None or out.crs.to_wkt() == image.crs.to_wkt()
            classes = out.read(1)
        share = opened(tmp_path / "out" / (file.stem + ".probability.tif"))[0][0]
        assert share.max() <= 254 and np.where(classes == 1, share >= 127, share <= 127).all()


PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""ModelPixelScale, ModelTiepoint, ModelTransformation; directory, numbers and texts of the GeoKeys."""


def place_tags(data: bytes) -> dict[int, bytes]:
    """The raw values of the tags that place a classic TIFF of little-endian order, of its first directory."""
    assert data[:4] == b"II*\0"
    sizes = {2: 1, 3: 2, 12: 8}
    (at,) = struct.unpack_from("<I", data, 4)
    found = {}
    for entry in range(struct.unpack_from("<H", data, at)[0]):
        tag, kind, count, offset = struct.unpack_from("<HHII", data, at + 2 + 12 * entry)
        if tag in PLACE_TAGS:
            size = sizes[kind] * count
            found[tag] = data[offset : offset + size] if size > 4 else struct.pack("<I", offset)[:size]
    return found


@pytest.mark.parametrize(("name", "bands"), [("pvroof", 3), ("naip4", 4)])
def test_the_tags_of_the_place_are_those_of_the_image_byte_for_byte(made, shared_data, tmp_path, name, bands):
    file = min((shared_data(name) / "test" / "images").glob("*"))
    run(made("segment", bands, "uint8"), file, tmp_path / "out", probability="uint8")
    wanted = place_tags(file.read_bytes())
    assert {33550, 33922, 34735} <= set(wanted)
    for ending in (".tif", ".probability.tif"):
        assert place_tags((tmp_path / "out" / (file.stem + ending)).read_bytes()) == wanted


def test_a_dataset_of_masks_is_predicted_as_its_files_are(made, shared_data, tmp_path):
    folder = shared_data("naip4")
    held = ingest(
        IngestOptions(source=str(folder), to=str(tmp_path / "ds"), layout="masks", split="100/0/0", concurrency=0)
    )
    model = made("segment", 4, "uint8")
    done = run(model, tmp_path / "ds", tmp_path / "rows", split="test")
    run(model, folder / "test" / "images", tmp_path / "files")
    assert done.rows == held.splits["test"] == 2
    rows, files = (sorted((tmp_path / n).rglob("*.tif")) for n in ("rows", "files"))
    assert [p.name for p in rows] == [p.name for p in files] and len(rows) == 2
    for one, other in zip(rows, files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_classes_below_zero_are_written_as_they_are(made, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16), dtype=np.uint8)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=16, height=16, count=2, dtype="uint8") as file:
        file.write(pixels)
    run(made("segment", 2, "uint8", values=(-1, 1)), tmp_path / "a.tif", tmp_path / "out")
    found, *_ = opened(next((tmp_path / "out").glob("*.tif")))
    assert found.dtype == np.int16 and set(np.unique(found)) <= {-1, 1}


def test_photographs_give_png_and_bad_files_are_set_aside(made, tmp_path):
    write(tmp_path / "s", "a.png", png(1, (70, 50)))
    write(tmp_path / "s", "b.jpg", _jpeg(90, 64))
    write(tmp_path / "s", "gray.png", png(1, (70, 50), "L"))
    write(tmp_path / "s", "cut.png", png(2, (70, 50))[:60])
    write(tmp_path / "s", "notes.txt", b"not an image")
    done = run(made("segment", 3, "uint8", size_px=64), tmp_path / "s", tmp_path / "out")
    assert (done.rows, done.quarantined) == (2, 2) and set(done.reasons) == {"unsupported", "truncated"}
    for name, size in (("a.png", (70, 50)), ("b.jpg.png", (90, 64))):
        with PIL.Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == size and set(np.unique(np.asarray(picture))) <= {0, 1}
    aside = pq.read_table(tmp_path / "out/_predict/quarantine.parquet").to_pylist()
    assert [row["path"] for row in aside] == ["cut.png", "gray.png"]
    assert "the model was trained on uint8 with 3 bands" in aside[1]["detail"]
    write(tmp_path / "bad", "cut.png", png(2)[:60])
    with pytest.raises(ScalecvError, match="none of 1 images could be predicted"):
        run(made("segment", 3, "uint8"), tmp_path / "bad", tmp_path / "bad-out")


def _jpeg(width: int, height: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.effect_noise((width, height), 60).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def test_the_same_command_again_does_only_what_is_missing(made, tmp_path):
    model = made("classify", 3, "uint8", ("a", "b", "c"))
    class_folders(tmp_path / "s", each=4)
    first = run(model, tmp_path / "s", tmp_path / "out", probability="float32")
    table = pq.read_table(tmp_path / "out").sort_by("path").to_pylist()
    assert (
        first.rows == len(table) == 12 and table[0]["path"] == "class0/0000.png" and len(table[0]["probabilities"]) == 3
    )
    assert table[0]["probability"] == max(table[0]["probabilities"]) and table[0]["class"] in "abc"
    again = run(model, tmp_path / "s", tmp_path / "out", probability="float32")
    assert (again.rows, again.skipped) == (12, 12)
    (part,) = (tmp_path / "out").glob("*.parquet")
    part.write_bytes(b"cut")
    mended = run(model, tmp_path / "s", tmp_path / "out", probability="float32")
    assert mended.skipped == 0 and pq.read_table(tmp_path / "out").num_rows == 12
    with pytest.raises(DataError, match="holds predictions of another source or with other options"):
        run(model, tmp_path / "s", tmp_path / "out")
    with pytest.raises(ConfigError, match="--overlap 9: expected less than --tile 8"):
        run(model, tmp_path / "s", tmp_path / "new", tile=8, overlap=9)
    for overlap in (512, 600):
        with pytest.raises(ConfigError, match=f"--overlap {overlap}: expected less than --tile 512, which this model"):
            run(model, tmp_path / "s", tmp_path / "new", overlap=overlap)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        run(model, tmp_path / "empty", tmp_path / "new")


def test_a_dataset_and_its_files_are_predicted_alike(made, tmp_path):
    model = made("classify", 3, "uint8", ("class0", "class1", "class2"))
    class_folders(tmp_path / "s", each=12)
    options = {"source": str(tmp_path / "s"), "to": str(tmp_path / "ds"), "layout": "imagefolder", "concurrency": 0}
    held = ingest(IngestOptions(**options))
    run(model, tmp_path / "s", tmp_path / "files")
    done = run(model, tmp_path / "ds", tmp_path / "rows")
    a, b = (pq.read_table(tmp_path / n).sort_by("path").to_pylist() for n in ("files", "rows"))
    assert done.rows == 36 and [r["path"] for r in a] == [r["path"] for r in b]
    assert [r["class"] for r in a] == [r["class"] for r in b] and all(r["id"] and r["split"] for r in b)
    np.testing.assert_allclose([r["probability"] for r in a], [r["probability"] for r in b], atol=1e-6)
    assert run(model, tmp_path / "ds", tmp_path / "val", split="val").rows == held.splits["val"]
    with pytest.raises(DataError, match="has no split 'tset'; did you mean 'test'"):
        run(model, tmp_path / "ds", tmp_path / "x", split="tset")


@pytest.mark.e2e
def test_actors_give_what_one_process_gives(made, tmp_path, monkeypatch, ray_local):
    image, _ = scene(0, 300, 260)
    for i in range(3):
        write(tmp_path / "s", f"{i}.tif", raster.encode(np.roll(image, i * 40, 1), None, wkt(), place(300 * i, 0)))
    monkeypatch.chdir(tmp_path)  # where the network's own module lies
    model = made("segment", 4, "uint16", mean=2000.0, std=1500.0)
    here = run(model, tmp_path / "s", tmp_path / "here", tile=128)
    # By a path that only this process, whose folder it is in, understands.
    there = run(Path(model).name, tmp_path / "s", tmp_path / "there", tile=128, concurrency=1)
    assert here.rows == there.rows == 3
    for i in range(3):
        a, b = (opened(tmp_path / n / f"{i}.tif")[0] for n in ("here", "there"))
        assert (a == b).mean() > 0.9999
