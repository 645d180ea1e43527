"""The stage that enlarges images, and the task that makes a network for it, on real tiles of 4 bands."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scalecv import raster
from scalecv.artifacts import bundle, spool
from scalecv.config import build, with_overrides
from scalecv.errors import ConfigError
from scalecv.models.library import imagenet_state
from scalecv.serve.bands import rank_bands
from scalecv.serve.evaluate import evaluate
from scalecv.serve.predict import predict
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train import runs
from scalecv.train.run import train
from tests.shards.images import write

SEGMENT = {
    "name": "roofs",
    "task": "segment",
    "data.decode_threads": 1,
    "data.bands": [1, 2, 3],
    "data.size_px": 32,
    "model.arch": "unet",
    "train.epochs": 1,
    "train.batch": 4,
    "train.threads": 1,
    "scale.workers": 0,
    "track.pictures": 2,
}
UPSCALE = {
    **SEGMENT,
    "name": "larger",
    "data.size_px": 64,
    "task": "upscale",
    "data.augment.hflip": 0.5,
    "model.arch": "espcn",
    "model.args.width": 16,
    "train.epochs": 12,
    "train.lr": 3e-3,
}


@pytest.fixture(scope="module")
def tiles(shared_data, tmp_path_factory):
    """12 tiles of one place to learn from, 4 of another to score: a dataset with masks."""
    folder = tmp_path_factory.mktemp("tiles")
    for place, split, count in (("train", "train", 12), ("other_place", "val", 4)):
        for kind in ("images", "masks"):
            to = folder / "source" / split / kind
            to.mkdir(parents=True)
            for file in sorted((shared_data("pv4band") / place / kind).iterdir())[:count]:
                shutil.copy(file, to)
    to = str(folder / "data")
    ingest(IngestOptions(source=str(folder / "source"), to=to, layout="masks", concurrency=0))
    return to


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One MLflow database for all of them: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlruns.db"


@pytest.fixture
def experiment(tiles, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    threads = torch.get_num_threads()
    yield lambda base, **keys: build(
        with_overrides(
            {}, {"data.uri": tiles, "track.storage": "runs"} | base | {k.replace("__", "."): v for k, v in keys.items()}
        ),
        "test",
    )
    torch.set_num_threads(threads)


def files_of(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*.*")}


def events(experiment):
    return spool.read(Path(runs.home(experiment)) / "001" / "spool.jsonl", most_bytes=1 << 30)[0]


@pytest.mark.chaos
def test_a_network_learns_to_enlarge_and_then_stands_before_another(experiment, tiles, tmp_path):
    before = files_of(tiles)
    larger = train(experiment(UPSCALE))
    scores = larger.metrics
    assert scores["val/psnr"] > scores["val/bicubic_psnr"] + 0.1 and scores["val/ssim"] > scores["val/bicubic_ssim"]
    facts = bundle.read_facts(larger.bundle)
    assert facts.task == "upscale" and facts.call.outputs == 3 and len(facts.pixels.span) == 3
    again = evaluate(f"runs:/{larger.run_id}", tiles, split="val", to=str(tmp_path / "report"))
    assert again.metrics["val/psnr"] == pytest.approx(scores["val/psnr"], abs=1e-4)
    drawn = {p.name for p in (tmp_path / "report/pictures/val").iterdir()}
    assert drawn == {"predictions.png", "worst.png", "worst.csv"}

    keys = {"upscale__factor": 2, "upscale__method": "sr", "train__batch": 4, "train__micro_batch": "auto"}
    wanted = experiment(SEGMENT, **keys, upscale__model=f"runs:/{larger.run_id}", train__recompute=True)
    done = train(wanted)
    stage = bundle.read_facts(done.bundle).upscale
    assert stage.method == "sr" and stage.factor == 2 and stage.weights_hash == facts.weights_hash
    told = [event["tags"] for event in events(wanted) if event["kind"] == "tags"]
    assert any(tags.get("upscale/weights_hash") == facts.weights_hash for tags in told)
    whole, alone = (bundle.read_weights(b, bundle.read_facts(b)) for b in (done.bundle, larger.bundle))
    assert all(torch.equal(whole[f"enlarge.network.{name}"], value) for name, value in alone.items()), "frozen"

    shutil.rmtree(Path(larger.run_uri))
    moved = shutil.move(done.bundle, tmp_path / "moved")
    scored = evaluate(str(moved), tiles, split="val")
    assert scored.metrics["val/iou"] == pytest.approx(done.metrics["val/iou"], abs=1e-9)
    assert scored.rows == 4
    assert files_of(tiles) == before, "nothing was stored in the dataset"


@pytest.mark.chaos
def test_scores_are_of_the_native_pixels(experiment, tiles, tmp_path):
    """At 1, 2 and 4 times the side the same pixels are counted, and nothing larger is written anywhere."""
    before, counted = files_of(tiles), {}
    for factor in (1, 2, 4):
        small = experiment(SEGMENT, name=f"x{factor}", upscale__factor=factor, model__norm="group")
        done = train(small)
        told = json.loads((Path(done.bundle) / "bundle.json").read_text())
        assert (told["upscale"] or {"factor": 1})["factor"] == factor
        opened = bundle.open_bundle(done.bundle)
        assert opened.model(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)
        counted[factor] = done.metrics["val/trivial_accuracy"], done.metrics["val/rows"]
    assert counted[1] == counted[2] == counted[4]
    assert files_of(tiles) == before
    kept = {p.suffix for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    assert kept <= {".json", ".jsonl", ".safetensors", ".png", ".csv", ".lock"}
    largest = max(p.stat().st_size for p in (tmp_path / "runs/x4").rglob("model.safetensors"))
    assert largest == max(p.stat().st_size for p in (tmp_path / "runs/x2").rglob("model.safetensors"))


@pytest.mark.chaos
def test_micro_batches_of_one_give_the_update_of_the_batch_at_four_times_the_side(experiment):
    """With batch normalisation one image at a time is refused; with group normalisation it changes nothing."""
    keys = {"upscale__factor": 4, "train__optimizer": "sgd"}
    with pytest.raises(ConfigError, match=r"batch normalisation needs two: set model.norm=group or frozen.*recompute"):
        train(experiment(SEGMENT, **keys, train__micro_batch=1))
    whole, cut = (
        train(experiment(SEGMENT, name=name, **keys, model__norm="group", train__micro_batch=size))
        for name, size in (("whole", None), ("cut", 1))
    )
    a, b = (bundle.read_weights(r.bundle, bundle.read_facts(r.bundle)) for r in (whole, cut))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


@pytest.mark.parametrize(
    ("base", "keys", "said"),
    [
        (SEGMENT, {"upscale__factor": 3}, "upscale.factor"),
        (SEGMENT, {"upscale__factor": 2, "upscale__method": "sr"}, "needs upscale.model"),
        (SEGMENT, {"upscale__factor": 2, "upscale__model": "x"}, "set that, or leave upscale.model out"),
        (UPSCALE, {"upscale__factor": 2}, "task=upscale takes model.args.factor"),
        (SEGMENT, {"upscale__factor": 2, "upscale__method": "sr", "upscale__model": "nowhere"}, "no bundle at"),
        (SEGMENT, {"loss__l1": 1.0}, "compares images"),
        (UPSCALE, {"loss__dice": 1.0}, "use loss.l1, loss.charbonnier, loss.mse"),
        (UPSCALE, {"data__size_px": 63}, "needs multiples of 2: set data.size_px=6"),
        (UPSCALE, {"model__args__factor": 3}, "expected 2 or 4"),
        (UPSCALE, {"model__args__depth": 3}, "unknown model.args.depth of espcn"),
        (UPSCALE, {"model__arch": "unet"}, "network to segment, the task is upscale"),
        (SEGMENT, {"model__arch": "fpn", "data__size_px": 40, "upscale__factor": 2}, "32 enlarged 2 times: set data.s"),
        (UPSCALE, {"train__metric": "val/iou"}, "there is no iou"),
    ],
)
def test_what_does_not_fit_is_refused(experiment, base, keys, said):
    with pytest.raises(ConfigError, match=said):
        train(experiment(base, **keys))


def test_images_without_labels_and_masks(shared_data, server, tmp_path, monkeypatch):
    """A table of files is enough; four times the side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    images = shared_data("pv4band") / "train" / "images"
    names = sorted(p.name for p in images.iterdir())[:6]
    for name in names:
        shutil.copy(images / name, tmp_path)
    lines = [f"{name},{'val' if at < 2 else 'train'}" for at, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["file,split", *lines]))
    ingest(IngestOptions(source=str(tmp_path / "list.csv"), to="data", layout="csv", concurrency=0))
    keys = {"data.uri": "data", "model.arch": "edsr", "model.args.factor": 4, "model.args.width": 8, "train.epochs": 1}
    keys["data.allow_leak"] = ["overlap"]  # neighbours of one place
    done = train(build(with_overrides({}, UPSCALE | keys | {"model.args.blocks": 2, "train.recompute": True}), "test"))
    assert done.metrics["val/rows"] == 2 and done.metrics["val/psnr"] >= done.metrics["val/bicubic_psnr"] - 0.5
    assert "val/threshold" not in done.metrics
    with pytest.raises(ConfigError, match="predict takes classify and segment"):
        predict(done.bundle, str(images), "predicted")
    with pytest.raises(ConfigError, match="ranks those of models for classify and segment"):
        rank_bands(done.bundle, "data")
    assert not (tmp_path / "predicted").exists()


def test_tiles_without_data_change_no_score(server, tmp_path, monkeypatch):
    """A scene's dark margin is a tile like any other; what it scores would be 100 dB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    rng = np.random.default_rng(0)
    for name in ("train/0", "train/1", "val/0", "val/1"):
        image = rng.integers(100, 3000, (32, 32, 2)).astype(np.uint16)
        image[:, :10] = 0
        for kind, pixels, nodata in (("images", image, 0), ("masks", (image[..., :1] > 900).astype(np.uint8), None)):
            write(tmp_path, f"a/{name.replace('/', f'/{kind}/')}.tif", raster.encode(pixels, nodata))
    shutil.copytree("a", "b")
    write(tmp_path, "b/val/images/2.tif", raster.encode(np.zeros((32, 32, 2), np.uint16), 0))
    write(tmp_path, "b/val/masks/2.tif", raster.encode(np.zeros((32, 32, 1), np.uint8)))
    for place in "ab":
        ingest(IngestOptions(source=place, to=f"data-{place}", layout="masks", concurrency=0))
    keys = {"data.uri": "data-a", "data.bands": [1, 2], "data.size_px": None, "train.epochs": 1}
    done = train(build(with_overrides({}, UPSCALE | keys), "test"))
    alone, beside = (evaluate(done.bundle, f"data-{place}", split="val") for place in "ab")
    assert (alone.rows, beside.rows) == (2, 3)
    for name in ("val/psnr", "val/ssim", "val/bicubic_psnr", "val/bicubic_ssim"):
        assert beside.metrics[name] == pytest.approx(alone.metrics[name], abs=1e-9), name


def test_a_model_behind_its_stage_predicts_images_at_their_own_size(experiment, tiles, shared_data, tmp_path):
    done = train(experiment(SEGMENT, upscale__factor=2, model__norm="group"))
    source = shared_data("pv4band") / "other_place" / "images"
    found = predict(done.bundle, str(source), str(tmp_path / "files"), concurrency=0)
    assert (found.rows, found.quarantined) == (14, 0)
    made = sorted((tmp_path / "files").rglob("*.tif"))
    assert [raster.profile(p.read_bytes()).width for p in made] == [256] * 14
    again = predict(done.bundle, str(tiles), str(tmp_path / "rows"), concurrency=0, split="val")
    assert again.rows == done.metrics["val/rows"]


@pytest.mark.parametrize("arch", ["espcn", "edsr", "resnet10"])
def test_networks_of_our_own_have_no_imagenet_weights(arch):
    with pytest.raises(ConfigError, match=f"model.arch={arch} has no ImageNet weights: take .*model.weights=runs:/ID"):
        imagenet_state(arch, "")
