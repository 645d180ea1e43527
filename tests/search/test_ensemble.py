"""Ensembles of runs that were trained: what is written, what is refused, and what is proposed."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scalecv import config, raster
from scalecv.artifacts import bundle, mlflow_model
from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.errors import ConfigError, DataError, UserError
from scalecv.search import held_out
from scalecv.search.candidates import Candidate, fields_of, find, place_of
from scalecv.search.ensemble import bundle_of, ensemble
from scalecv.search.ensemble_record import Result, put
from scalecv.search.held_out import HeldOut
from scalecv.search.judge import Judge, Judged
from scalecv.search.ledger import Ledger
from scalecv.search.trials import Trial
from scalecv.serve.evaluate import evaluate, pixels_for
from scalecv.serve.predict import predict
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.tasks import TASKS
from scalecv.train.run import train
from tests import make
from tests.shards import scenes
from tests.shards.images import write
from tests.small import FIELDS, SHAPES, _experiment

LATENCY_MS = 1e6


def ingested(folder, layout, split):
    options = {"source": str(folder / "images"), "to": str(folder / "data"), "layout": layout, "split": split}
    return ingest(IngestOptions(**options, concurrency=0)).dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, and the tracking store of all that happens in this module."""
    return tmp_path_factory.mktemp("ensembles")


@pytest.fixture(scope="module")
def trained(place):
    """A function that trains once for each name: keys of an experiment -> its result."""
    results = {}

    def run(base, name, **keys):
        if name not in results:
            track = {"track.storage": str(place / "runs"), "track.uri": f"sqlite:///{place}/mlruns.db"}
            results[name] = train(_experiment({**base, "name": name, "track.pictures": 0, **track}, keys))
        return results[name]

    return run


@pytest.fixture(scope="module")
def shapes(place, trained):
    """Two small networks on noisy pictures, of other bands; and the experiment."""
    make.shapes(place / "shapes" / "images", 480)
    rng = np.random.default_rng(1)
    for file in sorted((place / "shapes" / "images").rglob("*.png")):
        pixels = np.asarray(Image.open(file)) + rng.normal(0, 150, (16, 16, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file)
    base = {**SHAPES, "data.uri": ingested(place / "shapes", "imagefolder", "40/60/0"), "model.args.width": 8}
    trained(base, "first")
    trained(base, "second", seed=1, data__bands=(3, 1), train__epochs=1)
    return base


@pytest.fixture(scope="module")
def fields(place, trained):
    """Two runs on tiles with masks, of other bands; and the experiment."""
    make.fields(place / "fields" / "images", 32)
    base = {**FIELDS, "data.uri": ingested(place / "fields", "masks", None)}
    trained(base, "all-bands", train__epochs=1)
    trained(base, "two-bands", data__bands=(4, 2), train__epochs=1)
    return base


def lopsided(uri, to, number, *, mean=0.0, bias=0.0):
    """A bundle that is less sure of one class, and whose pixels are not quite the same."""
    facts = bundle.read_facts(uri)
    state = bundle.read_weights(uri, facts)
    state["fc.bias"][number] += bias
    pixels = facts.pixels.model_copy(update={"mean": tuple(one + mean for one in facts.pixels.mean)})
    put(to, bundle.parts(state, **fields_of(facts) | {"name": to, "pixels": pixels}))
    return to


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlruns.db")


def probabilities(uri, data):
    """What a bundle says of each row of val, behind its own pixels."""
    opened, dataset = bundle.open_bundle(uri), open_dataset(data)
    pixels = pixels_for(opened, dataset.manifest)
    out = []
    with torch.no_grad():
        for _, raw in Feed(dataset, "val", pixels, 16).epoch(0):
            batch = to_device(raw, pixels, torch.device("cpu"), False)
            logits = opened.model(batch["image"][batch["valid"]])
            out.append(torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, 1))
    return torch.cat(out)


def made(folder, runs, data, shares, **told):
    """The bundle of some runs with these shares, behind what the verb asks of them."""
    found = [Candidate(run.name, run.bundle, bundle.read_facts(run.bundle), run.run_id) for run in runs]
    (folder / "answers").mkdir()
    judge = Judge(found, open_dataset(data), folder / "answers")
    put(str(folder / "made"), bundle_of(judge, "made", shares, **told))
    return str(folder / "made"), judge


def test_a_bundle_of_classes_gives_the_mean_of_its_members(shapes, trained, tmp_path):
    runs, data = [trained({}, name) for name in ("first", "second")], shapes["data.uri"]
    uri, _ = made(tmp_path, runs, data, [0.25, 0.75])
    a, b = (probabilities(run.bundle, data) for run in runs)
    found = probabilities(uri, data)
    torch.testing.assert_close(found, 0.25 * a + 0.75 * b, rtol=0, atol=1e-6)
    assert [one.origins[0].run_id for one in bundle.read_facts(uri).members] == [run.run_id for run in runs]
    scored = evaluate(uri, data, split="val").metrics["val/accuracy"]
    assert predict(uri, data, str(tmp_path / "predicted"), split="val").rows == len(found)
    table = pq.read_table(tmp_path / "predicted").sort_by("id")
    names = np.array(open_dataset(data).manifest.classes)
    truth = np.array([path.split("/")[0] for path in table["path"].to_pylist()])
    assert (np.array(table["class"].to_pylist()) == truth).mean() == pytest.approx(scored) and truth[0] in names
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    told = mlflow_model.ImageModel(bundle.open_bundle(uri)).predict(images)
    each = [mlflow_model.ImageModel(bundle.open_bundle(run.bundle)) for run in runs]
    expected = 0.25 * each[0].predict(images) + 0.75 * each[1].predict(images[..., [2, 0]])
    np.testing.assert_allclose(told, expected, atol=1e-6)


def test_masks_are_averaged_with_one_threshold(fields, trained, tmp_path, place):
    runs, data = [trained({}, name) for name in ("all-bands", "two-bands")], fields["data.uri"]
    uri, judge = made(tmp_path, runs, data, [0.5, 0.5], threshold=0.25)
    a, b = (probabilities(run.bundle, data) for run in runs)
    torch.testing.assert_close(probabilities(uri, data), (a + b) / 2, rtol=0, atol=1e-6)
    scored = evaluate(uri, data, split="val")
    assert bundle.read_facts(uri).pixels.bands is None and scored.threshold == 0.25
    each = judge.held.confusions(judge.mean([1, 1]), np.arange(8), 0.25)
    assert each.sum() == 8 * 32 * 32 and judge.held.of(each.sum(axis=0)) == pytest.approx(scored.metrics["val/iou"])
    exact, quick = judge.held.exact_score(judge.mean([1, 1])), judge.held.score(judge.mean([1, 1]))
    assert exact.value == pytest.approx(quick.value, abs=1e-3)
    done = predict(uri, str(place / "fields/images/val/images"), str(tmp_path / "out"), tile=32)
    assert (done.rows, done.quarantined) == (8, 0)
    found = ensemble([run.bundle for run in runs], latency_ms=LATENCY_MS)
    assert found.metric == "val/iou" and 0 < found.threshold < 1
    assert found.rows_choosing + found.rows_checking == 8


def test_both_halves_together_are_what_training_scored(shapes, trained):
    runs = [trained({}, name) for name in ("first", "second")]
    found = ensemble([run.bundle for run in runs], latency_ms=LATENCY_MS, most=1)
    assert found.is_single and len(found.members) == 1 and found.bundle is None
    alone = next(run for run in runs if run.bundle == found.single.bundle)
    halves = found.single.score * found.rows_choosing + found.single_score * found.rows_checking
    rows = found.rows_choosing + found.rows_checking
    assert halves / rows == pytest.approx(alone.metrics["val/accuracy"])


def test_a_gain_is_written_recorded_and_opens_from_mlflow(shapes, trained, tmp_path):
    """Two models of which each misses another class: the mean of the two knows all."""
    import mlflow

    run = trained({}, "first")
    for number in (0, 1):
        lopsided(run.bundle, f"lopsided-{number}", number, bias=-20.0, mean=number * 1e-5)
    found = ensemble(["lopsided-0", "lopsided-1"], latency_ms=LATENCY_MS, to="whole")
    assert found.is_gain and found.bundle and found.bundle.startswith(str(tmp_path / "runs" / "whole")), found.verdict
    assert len(found.members) == 2 and sum(one.weight for one in found.members) == pytest.approx(1)
    assert found.gain == pytest.approx(found.score - found.single_score) and found.interval[0] > 0
    scored = evaluate(found.bundle, shapes["data.uri"], split="val")
    assert scored.weights_hash == found.weights_hash
    assert bundle.read_facts(found.bundle).metrics["val/accuracy"] == found.score
    client = mlflow.MlflowClient()
    told = client.get_run(found.run_id)
    hashes = {bundle.read_facts(f"lopsided-{number}").weights_hash for number in (0, 1)}
    assert {told.data.tags[f"scalecv.member.{number}"].split()[1] for number in (0, 1)} == hashes
    assert told.data.tags["scalecv.verdict"] == found.verdict and told.data.metrics["gain"] == found.gain
    images = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    (model,) = client.search_logged_models([told.info.experiment_id], f"source_run_id = '{found.run_id}'")
    ours = mlflow_model.ImageModel(bundle.open_bundle(found.bundle)).predict(images)
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict(images), ours)
    assert evaluate(f"runs:/{found.run_id}", shapes["data.uri"], split="val").metrics == scored.metrics


def test_weights_of_one_basin_make_a_soup_that_costs_one_model(shapes, trained):
    run = trained({}, "first")
    for name, bias in (("lopsided-0", -20.0), ("lopsided-1", 20.0)):
        lopsided(run.bundle, name, 0, bias=bias)
    found = ensemble(["lopsided-0", "lopsided-1"], latency_ms=LATENCY_MS, most=1)
    soup = found.candidates[-1]
    assert soup.name in ("soup of lopsided-0, lopsided-1", "soup of lopsided-1, lopsided-0") and soup.bundle == ""
    assert soup.score >= np.mean([one.score for one in found.candidates[:2]])
    if found.bundle is None:
        pytest.fail(found.verdict)
    facts = bundle.read_facts(found.bundle)
    assert facts.members == () and {one.name for one in facts.origins} == {"lopsided-0", "lopsided-1"}
    assert evaluate(found.bundle, shapes["data.uri"], split="val").metrics["val/accuracy"] > found.single_score
    state = bundle.read_weights(found.bundle, facts)
    first = bundle.read_weights(run.bundle, bundle.read_facts(run.bundle))
    torch.testing.assert_close(state["fc.bias"], first["fc.bias"], rtol=0, atol=1e-5)
    assert not torch.equal(state["layer1.0.bn1.running_mean"], first["layer1.0.bn1.running_mean"])


def test_what_a_sweep_and_its_race_trained_to_the_end_are_the_candidates(shapes, trained, tmp_path):
    tree = _experiment({**shapes, "name": "sweep", "track.storage": str(tmp_path / "kept")}, {})
    ledger = Ledger(str(tmp_path / "kept" / "sweep"), tree)
    for name, raced in (("first", {}), ("second", {"entrant": 0, "seed": 2})):
        run = trained({}, name)
        about = {"run_id": run.run_id, "bundle": run.bundle, "weights_hash": run.weights_hash}
        ledger.keep(Trial(0, {}, status="finished", **about, **raced))
    ledger.keep(Trial(1, {}, status="failed", cause="it broke"))
    (tmp_path / "sweep.yaml").write_text(config.dump(tree))
    for sweep in ("sweep.yaml", "kept/sweep", str(tmp_path / "kept" / "sweep")):
        place, folder = place_of(sweep, None, "scalecv")
        assert [one.name for one in find([], folder, place)] == ["sweep-0000", "sweep-race-0000-seed2"]
        assert (place.home, place.name) == (str(tmp_path / "kept"), "sweep-ensemble")
    found = ensemble(from_sweep="sweep.yaml", latency_ms=LATENCY_MS)
    assert [one.run_id for one in found.candidates] == [trained({}, name).run_id for name in ("first", "second")]


def test_without_a_gain_nothing_is_written_and_the_best_is_named(shapes, trained, tmp_path):
    """Nearly the same weights and pixels: no mean is better."""
    first = trained({}, "first")
    lopsided(first.bundle, "twin", 0, bias=1e-6, mean=1e-6)
    found = ensemble([first.bundle, "twin"], latency_ms=LATENCY_MS, anyway=True)
    assert not found.is_gain and found.bundle is None and found.gain == 0
    assert found.verdict.startswith("no gain found: ") and found.single.bundle in (first.bundle, "twin")
    assert not list(tmp_path.rglob("ensembles/*/bundle"))
    assert json.loads(json.dumps(asdict(found)))["single"]["name"] in ("first", "twin")


@pytest.mark.parametrize(
    ("low", "says"), [(0.001, "val/iou 0.8000, +0.1000 over a alone"), (0.0, "no gain found: val/")]
)
def test_a_gain_lies_above_nothing_with_its_whole_interval(low, says):
    one = Judged("a", None, "a", 0.7, 1.0, ())
    numbers = {"score": 0.8, "single_score": 0.7, "gain": 0.1, "threshold": 0.5, "latency_ms": 2.0}
    rows = {"rows_choosing": 9, "rows_checking": 9, "latency_budget_ms": 5.0}
    about = {"name": "m", "metric": "val/iou", "members": (one, one), "single": one, "candidates": (one, one)}
    found = Result(**numbers, **rows, **about, interval=(low, 0.2), is_single=False)
    assert found.verdict.startswith(says) and found.is_gain == (low > 0)
    alone = Result(**numbers, **rows, **about, interval=(low, 0.2), is_single=True)
    assert not alone.is_gain and alone.verdict.startswith("no gain found: ")


def test_a_latency_that_allows_none_is_refused(shapes, trained):
    runs = [trained({}, name).bundle for name in ("first", "second")]
    with pytest.raises(ConfigError, match=r"--latency-ms 1e-06: no trained model .* the fastest is \w+ with"):
        ensemble(runs, latency_ms=1e-6)


def test_what_does_not_go_together_is_refused(shapes, fields, trained, tmp_path):
    first, tiles = trained({}, "first").bundle, trained({}, "all-bands").bundle
    with pytest.raises(DataError, match=r"all-bands \(.*\) has task segment, first has classify: .* name runs that"):
        ensemble([first, tiles], latency_ms=LATENCY_MS)
    with pytest.raises(UserError, match="at least two trained models, found first alone"):
        ensemble([first, first], latency_ms=LATENCY_MS)
    with pytest.raises(UserError, match="at least two trained models, found none"):
        ensemble([], latency_ms=LATENCY_MS)
    with pytest.raises(UserError, match=r"no run named 'frist'.*did you mean 'first'"):
        ensemble([first, "frist"], latency_ms=LATENCY_MS)
    with pytest.raises(DataError, match=r"no sweep at .*nowhere: expected what scalecv tune wrote"):
        ensemble(from_sweep="nowhere", latency_ms=LATENCY_MS)
    with pytest.raises(ConfigError, match="--to a/b: expected a name"):
        ensemble([first], latency_ms=LATENCY_MS, to="a/b")
    second = trained({}, "second").bundle
    with pytest.raises(ConfigError, match=r"--metric acuracy; did you mean 'accuracy'"):
        ensemble([first, second], latency_ms=LATENCY_MS, metric="acuracy")
    several, _ = made(tmp_path, [trained({}, "first"), trained({}, "second")], shapes["data.uri"], [0.5, 0.5])
    with pytest.raises(DataError, match="is an ensemble itself: name trained models"):
        ensemble([first, several], latency_ms=LATENCY_MS)


def test_rows_beyond_the_bound_are_left_out_by_their_hash(shapes, trained, monkeypatch):
    monkeypatch.setattr(held_out, "MOST_VALUES", 3 * 100)
    found = ensemble([trained({}, name).bundle for name in ("first", "second")], latency_ms=LATENCY_MS)
    assert 70 < found.rows_choosing + found.rows_checking < 130


@pytest.mark.parametrize("count", [40, 8])
def test_tiles_of_one_scene_choose_or_check_together_where_there_are_enough(tmp_path, count):
    for number in range(count):
        image, mask = scenes.scene(number, 96, 64, bands=3)
        at = scenes.place(number * 4000, 0)
        write(tmp_path / "images", f"images/{number}.tif", raster.encode(image, 0, scenes.wkt(), at, ("r", "g", "b")))
        write(tmp_path / "images", f"masks/{number}.tif", raster.encode(mask[:, :, None], None, scenes.wkt(), at))
    options = {"source": str(tmp_path / "images"), "to": str(tmp_path / "data"), "layout": "masks", "tile": 32}
    dataset = open_dataset(ingest(IngestOptions(**options, split="20/80/0", concurrency=0)).dataset)
    pixels = pixels_of(dataset.manifest, config.Data(uri=dataset.uri), dataset.uri)
    held = HeldOut(dataset, TASKS["segment"], pixels, tmp_path, torch.device("cpu"))
    torch.manual_seed(0)
    answers = held.answers(torch.nn.Conv2d(3, 2, 1).eval())
    feed = Feed(dataset, "val", pixels, 64)
    rows = [path.partition("#")[0] for _, raw in feed.epoch(0) for path in np.array(raw["path"])[raw["valid"]]]
    halves = [{rows[at] for at in half} for half in (held.choosing, held.checking)]
    assert len(answers) == dataset.manifest.splits["val"] == sum(map(len, (held.choosing, held.checking)))
    assert bool(halves[0] & halves[1]) == (count == 8)
    confusions = held.confusions([(answers, 1.0)], held.checking, 0.5)
    units = held.by_unit(confusions)
    assert units.shape[0] == (len(halves[1]) if count == 40 else len(held.checking))
    assert (units.sum(axis=0) == confusions.sum(axis=0)).all() and units.sum() == 32 * 32 * len(held.checking)
