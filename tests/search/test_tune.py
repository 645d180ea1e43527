"""Sweeps as the command runs them: on Ray Tune, with MLflow on SQLite."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scalecv import config, storage
from scalecv.errors import ConfigError
from scalecv.search.sweep import tune
from scalecv.testing.servers import MlflowServer
from scalecv.train.run import train
from tests.small import shapes, shapes_dataset

__all__ = ["shapes", "shapes_dataset"]

SPACE = {"train.lr": {"loguniform": [1e-3, 1e-1]}, "model.norm": {"choice": ["group", "batch"]}}
SEARCH = {"trials": 3, "eta": 2, "space": SPACE, "finalists": 0}


def command(folder, *more):
    words = [str(Path(sys.executable).with_name("scalecv")), "tune", "sweep.yaml", "--json", *more]
    env = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    log = open(Path(folder) / "stderr.txt", "a")
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log, text=True)


def write(experiment, folder, epochs=2, **search):
    tree = experiment(name="sweep", scale__workers=0, train__epochs=epochs, train__threads=1).model_dump(mode="json")
    tree["search"] = SEARCH | search
    tree["cache"]["dir"] = str(Path(folder) / "cache")
    (Path(folder) / "sweep.yaml").write_text(yaml.safe_dump(tree))
    return config.load(Path(folder) / "sweep.yaml")


def of_mlflow(place):
    import mlflow

    client = mlflow.MlflowClient(place if isinstance(place, str) else f"sqlite:///{place}/mlruns.db")
    (found,) = [one for one in client.search_experiments() if one.name == "scalecv"]
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_trials_are_those_of_a_run_alone_and_the_best_is_raced_against_the_experiment_as_written(shapes, tmp_path):
    base = write(shapes, tmp_path, finalists=1, seeds=3, budget="1h", searcher="optuna")
    job = command(tmp_path)
    out, _ = job.communicate(timeout=800)
    said = (tmp_path / "stderr.txt").read_text()
    assert job.returncode == 0, said
    told = json.loads(out)
    trials, best = told["trials"], told["best"]
    assert [one["number"] for one in trials] == [0, 1, 2] and best["status"] == "finished", said
    assert "stopped" in {one["status"] for one in trials}
    assert all(one["device_s"] > 0 and one["run_id"] for one in trials)
    assert [*(tmp_path / "cache").glob("*/*.slots")], "trials share the images that they decode"
    # Paused at rungs and promoted, in other processes: the weights of a run that was left alone.
    one = next(one for one in trials if one["status"] == "finished")
    tree, metric = base.model_dump(mode="json", exclude={"search"}), {"train.metric": told["metric"]}
    alone = train(config.build(config.with_overrides(tree, {**one["overrides"], **metric, "name": "alone"}), "test"))
    assert alone.weights_hash == one["weights_hash"]

    entrants = {one["entrant"] for one in told["race"]}
    assert len(entrants) == 2 and -1 in entrants and best["number"] in entrants, said
    assert sorted((one["entrant"], one["seed"]) for one in told["race"]) == [
        (entrant, seed) for entrant in sorted(entrants) for seed in range(3)
    ]
    assert told["verdict"]["seeds"] == 3 and "paired seeds" in told["verdict"]["sentence"], said
    assert len({one["weights_hash"] for one in told["race"]}) == 6
    page = (tmp_path / "runs" / "sweep" / "report.html").read_text()
    assert told["verdict"]["sentence"] in page and page.count("data:image/png;base64,") >= 3
    assert 'src="http' not in page and "<script" not in page

    runs = of_mlflow(tmp_path)
    del runs["alone"]
    heats = {f"sweep-race-{who}-seed{seed}" for who in ("as-written", f"{max(entrants):04d}") for seed in range(3)}
    assert set(runs) == {"sweep", *(f"sweep-{number:04d}" for number in range(3)), *heats}
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "sweep"} == {
        told["run_id"]
    }


def checkpoints(folder):
    return {*Path(folder).glob("runs/sweep/runs/*/001/checkpoints/*")}


def wait_for_a_checkpoint(job, folder, before):
    """One that was not there: the process is past its start, and trains."""
    until = time.monotonic() + 200
    while checkpoints(folder) <= before:
        assert time.monotonic() < until and job.poll() is None, (folder / "stderr.txt").read_text()
        time.sleep(0.1)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_early_loses_and_repeats_nothing(shapes, tmp_path, how):
    write(shapes, tmp_path, scheduler="none")
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    (quiet / "sweep.yaml").write_text(
        (tmp_path / "sweep.yaml").read_text().replace(f"{tmp_path}/runs", f"{quiet}/runs")
    )
    out, _ = command(quiet).communicate(timeout=400)
    expected = json.loads(out)
    for _ in range(2):
        before = checkpoints(tmp_path)
        job = command(tmp_path)
        wait_for_a_checkpoint(job, tmp_path, before)
        job.send_signal(how)
        job.communicate(timeout=100)
        said = (tmp_path / "stderr.txt").read_text()
        assert job.returncode == (75 if how == signal.SIGINT else -signal.SIGKILL), said
    job = command(tmp_path)
    out, _ = job.communicate(timeout=400)
    told = json.loads(out)
    assert [one["status"] for one in told["trials"]] == ["finished"] * 3
    for name in ("overrides", "weights_hash"):
        assert [one[name] for one in told["trials"]] == [one[name] for one in expected["trials"]]
    assert told["best"]["number"] == expected["best"]["number"]
    assert len(of_mlflow(tmp_path)) == 4
    job = command(tmp_path, "search.trials=4")
    out, _ = job.communicate(timeout=400)
    more = json.loads(out)
    assert len(more["trials"]) == 4 and more["trials"][:3] == told["trials"] and more["sweep_id"] == told["sweep_id"]


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_driver_killed_at_five_points_ends_with_the_same_trials_and_weights(shapes, tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    for folder in (quiet, killed):
        folder.mkdir()
        # One at a time: which trials are promoted does not hang on which ends first.
        write(shapes, folder, trials=24, eta=3, concurrent=1, epochs=4)
        text = (folder / "sweep.yaml").read_text()
        (folder / "sweep.yaml").write_text(text.replace(f"{tmp_path}/runs", f"{folder}/runs"))
    out, _ = command(quiet).communicate(timeout=800)
    expected = json.loads(out)
    assert {one["status"] for one in expected["trials"]} == {"finished", "stopped"}
    before = set()
    for point in range(5):
        job, records = command(killed), killed / "runs" / "sweep" / "trials"
        until = time.monotonic() + 300
        while len([*records.glob("*.json")]) < 3 + 4 * point or checkpoints(killed) <= before:
            assert time.monotonic() < until and job.poll() is None, (killed / "stderr.txt").read_text()
            time.sleep(0.05)
        job.kill()
        job.communicate(timeout=100)
        before = checkpoints(killed)
    out, _ = command(killed).communicate(timeout=800)
    told = json.loads(out)
    for name in ("number", "status", "overrides", "weights_hash"):
        assert [one[name] for one in told["trials"]] == [one[name] for one in expected["trials"]], name
    assert told["best"]["number"] == expected["best"]["number"] and len(told["trials"]) == 24
    assert len(of_mlflow(killed)) == 25


@pytest.mark.chaos
def test_a_population_goes_on_from_the_checkpoints_of_its_best(shapes, tmp_path):
    space = {"train.lr": {"choice": [1e-6, 1e-5, 1e-3, 3e-3]}}
    write(shapes, tmp_path, trials=4, scheduler="pbt", searcher="random", epochs=3, space=space, rung="1epochs")
    out, _ = command(tmp_path).communicate(timeout=500)
    said, told = (tmp_path / "stderr.txt").read_text(), json.loads(out)
    assert told["verdict"]["sentence"].startswith("not raced: values change"), said
    read = lambda number: json.loads((tmp_path / f"runs/sweep/trials/{number:04d}.json").read_text())  # noqa: E731
    children = [read(one["number"]) for one in told["trials"][4:]]
    assert children and children[0]["inherited"] == 1, said
    for child in children:
        lost = told["trials"][child["replaces"]]
        assert lost["status"] == "stopped" and f"trial {child['number']} took its place" in lost["cause"]
        assert [point["epoch"] for point in child["points"]][:1] == [child["inherited"] + 1]
        seconds = {point["epoch"]: point["device_s"] for point in read(child["parent"])["points"]}
        assert child["points"][0]["device_s"] > seconds[child["inherited"]]
    assert sum(one["status"] == "finished" for one in told["trials"]) == 4, said


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("trials", "workers", "stopped"), [(170, 1, 102), (6, 2, 3)])
def test_stopped_trials_leave_no_actor_placement_group_or_file_handle(shapes, tmp_path, trials, workers, stopped):
    import psutil
    import ray
    from ray.util import placement_group_table

    from scalecv import runtime

    base = write(shapes, tmp_path, trials=trials, eta=3)
    base = config.build(config.with_overrides(base.model_dump(mode="json"), {"scale.workers": workers}), "test")
    runtime.connect(local_cpus=2)
    try:
        swept = tune(base)  # what is opened once stays open
        before = psutil.Process().num_fds()
        more = config.with_overrides(base.model_dump(mode="json"), {"search.trials": trials + 3})
        again = tune(config.build(more, "test"))
        assert sum(one.status == "stopped" for one in swept.trials) >= stopped
        assert len(again.trials) == trials + 3 and all(one.status in ("stopped", "finished") for one in again.trials)
        until = time.monotonic() + 60
        held = lambda: {group["state"] for group in placement_group_table().values()} - {"REMOVED"}  # noqa: E731
        while held() or ray.available_resources().get("CPU") != 2:
            assert time.monotonic() < until, (placement_group_table(), ray.available_resources())
            time.sleep(0.5)
        actors = [one for one in ray._private.state.actors().values() if one["State"] != "DEAD"]
        assert not actors, actors
        assert psutil.Process().num_fds() <= before + 8
    finally:
        runtime.shutdown()


@pytest.mark.chaos
def test_a_trial_that_errs_is_told_and_one_whose_process_dies_goes_on(shapes, tmp_path):
    import psutil

    values = [1e-2, 2e-2, 3e-2, 1e30, 2e30]
    space = {"train.lr": {"choice": values}}
    base = write(shapes, tmp_path, scheduler="none", space=space, searcher="grid", trials=5)
    job = command(tmp_path)
    wait_for_a_checkpoint(job, tmp_path, set())
    processes = psutil.Process(job.pid).children(recursive=True)
    trials = [one for one in processes if one.is_running() and "ImplicitFunc" in " ".join(one.cmdline())]
    assert trials, [one.cmdline() for one in processes]
    for one in trials:
        one.kill()
    out, _ = job.communicate(timeout=500)
    told = json.loads(out)
    assert job.returncode == 0, (tmp_path / "stderr.txt").read_text()
    sane = [one for one in told["trials"] if one["overrides"]["train.lr"] < 1]
    wild = [one for one in told["trials"] if one["overrides"]["train.lr"] > 1]
    assert len(sane) == 3 and len(wild) == 2
    assert {one["status"] for one in sane} == {"finished"} and len({one["weights_hash"] for one in sane}) == 3
    for one in sane[:2]:  # those that were killed
        keys = {**one["overrides"], "train.metric": told["metric"], "name": f"alone-{one['number']}"}
        tree = base.model_dump(mode="json", exclude={"search"})
        assert train(config.build(config.with_overrides(tree, keys), "test")).weights_hash == one["weights_hash"]
    assert {one["status"] for one in wild} == {"failed"} and all("train.lr" in one["cause"] for one in wild), wild


@pytest.mark.chaos
def test_the_same_failure_in_every_trial_ends_the_sweep(shapes, tmp_path):
    write(shapes, tmp_path, space={"train.lr": {"loguniform": [1e30, 1e31]}}, trials=20)
    job = command(tmp_path)
    job.communicate(timeout=400)
    said = (tmp_path / "stderr.txt").read_text()
    assert job.returncode == 1 and "Traceback" not in said, said
    assert "trials failed alike, and none got any further" in said, said
    assert len(of_mlflow(tmp_path)) < 8


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_sweep_goes_on_while_mlflow_is_away_and_the_same_command_sends_its_record_later(shapes, tmp_path):
    server = MlflowServer(tmp_path / "mlflow")
    server.start()
    try:
        write(shapes, tmp_path, trials=4, scheduler="none")
        job = command(tmp_path, f"track.uri={server.uri}")
        wait_for_a_checkpoint(job, tmp_path, set())
        server.kill()
        out, _ = job.communicate(timeout=600)
        said, told = (tmp_path / "stderr.txt").read_text(), json.loads(out)
        assert job.returncode == 0 and {one["status"] for one in told["trials"]} == {"finished"}, said
        assert "scalecv sync" in said and "Traceback" not in said
        server.start()
        again, _ = command(tmp_path, f"track.uri={server.uri}").communicate(timeout=300)
        assert json.loads(again)["trials"] == told["trials"]
        words = [str(Path(sys.executable).with_name("scalecv")), "sync", str(tmp_path / "runs"), "--uri", server.uri]
        sent = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=300)
        assert sent.returncode == 0 and json.loads(sent.stdout) == {"sent": 0, "waiting": 0}, sent.stderr
        runs = of_mlflow(server.uri)
        parent = runs.pop("sweep")
        assert set(runs) == {f"sweep-{number:04d}" for number in range(4)}
        assert {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} == {parent.info.run_id}
        assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
        assert all(told["metric"] in run.data.metrics for run in runs.values())
    finally:
        server.kill()


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_budget_that_ends_on_the_way_saves_what_is_under_way_and_a_larger_one_goes_on(shapes, tmp_path):
    write(shapes, tmp_path, trials=4, epochs=80, scheduler="none", budget="60s")
    out, _ = command(tmp_path).communicate(timeout=500)
    said, told = (tmp_path / "stderr.txt").read_text(), json.loads(out)
    assert "search.budget" in said and "Traceback" not in said, said
    assert 0.9 * 60 < told["device_s"] <= 1.05 * 60, told["device_s"]
    cut = [one for one in told["trials"] if one["status"] == "stopped"]
    assert cut and all("the budget was spent after epoch" in one["cause"] for one in cut), told["trials"]
    out, _ = command(tmp_path, "search.budget=1h").communicate(timeout=800)
    told = json.loads(out)
    assert len(told["trials"]) == 4 and {one["status"] for one in told["trials"]} == {"finished"}
    for number in range(4):  # each epoch was trained once; that of the stop may be told again
        spool = tmp_path / f"runs/sweep/runs/sweep-{number:04d}/001/spool.jsonl"
        lines = map(json.loads, spool.read_text().splitlines())
        ends = [one["step"] for one in lines if one["kind"] == "metrics" and "time/train_s" in one["metrics"]]
        assert len(set(ends)) == 80 and len(ends) <= 81, (number, ends)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_sweep_that_lives_in_a_bucket_is_killed_and_goes_on(shapes, tmp_path, s3):
    bucket = s3.bucket()
    write(shapes, tmp_path, trials=3, scheduler="none")
    keys = [f"track.storage={bucket}/runs"]
    job = command(tmp_path, *keys)
    until = time.monotonic() + 200
    while not (places := storage.list_names(f"{bucket}/runs/sweep/runs/sweep-0000/001/checkpoints")):
        assert time.monotonic() < until and job.poll() is None, (tmp_path / "stderr.txt").read_text()
        time.sleep(0.2)
    job.kill()
    job.communicate()
    out, _ = command(tmp_path, *keys).communicate(timeout=600)
    said, told = (tmp_path / "stderr.txt").read_text(), json.loads(out)
    assert [one["status"] for one in told["trials"]] == ["finished"] * 3, said
    assert all(one["bundle"].startswith(bucket) for one in told["trials"]) and places
    assert not list(tmp_path.glob("runs/*")), "nothing lies on this machine"
    assert storage.exists(f"{bucket}/runs/sweep/report.html")


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_quality_against_cost_in_brackets(shapes, tmp_path):
    space = {"model.arch": {"choice": ["resnet10", "resnet18"]}, "train.lr": SPACE["train.lr"]}
    how = {"cost": "parameters", "searcher": "optuna", "scheduler": "hyperband"}
    write(shapes, tmp_path, trials=8, epochs=4, space=space, **how)
    out, _ = command(tmp_path).communicate(timeout=900)
    said, told = (tmp_path / "stderr.txt").read_text(), json.loads(out)
    assert {one["status"] for one in told["trials"]} == {"stopped", "finished"}, said
    read = lambda number: json.loads((tmp_path / f"runs/sweep/trials/{number:04d}.json").read_text())  # noqa: E731
    costs = {one["overrides"]["model.arch"]: set() for one in told["trials"]}
    for one in told["trials"]:
        costs[one["overrides"]["model.arch"]].add(read(one["number"])["cost"])
    assert all(len(found) == 1 and found != {None} for found in costs.values()), costs
    # Brackets begin at other rungs: some trials paused after one epoch, some went on without being compared there.
    assert len({len(read(one["number"])["points"]) for one in told["trials"]}) > 1


def test_what_cannot_work_is_told_before_anything_is_written(shapes, tmp_path):
    for search, says in (
        ({"space": {}}, "search.space is empty"),
        ({"space": {"train.lrr": {"uniform": [0, 1]}}}, "train.lr"),
        (
            {"metric": "val/acuracy"},
            r"^search.metric=val/acuracy: there is no acuracy.*accuracy.*has val/loss, val/accuracy",
        ),
        ({"metric": "accuracy"}, "search.metric=accuracy: expected a name such as val/accuracy"),
        ({"space": {"train.lr": SPACE["train.lr"], "model.depth": {"choice": [1]}}}, "^search.space: unknown key"),
        ({"space": {"model.arch": {"choice": ["resnet10", "resnet1O"]}}}, "'resnet1O' can run in no draw.*unknown"),
        ({"space": {"model.arch": {"choice": ["resnet10", "unet"]}}}, "'unet' can run in no draw.*network to segment"),
        (
            {
                "space": {
                    "model.arch": {"choice": ["resnet10", "mobilenet_v3_small"]},
                    "model.stem": {"choice": ["default", "small"], "when": {"model.arch": ["resnet10"]}},
                }
            },
            r"'mobilenet_v3_small' can run in no draw.*model.stem=small is for the resnets.*not set \(`when`\)",
        ),
        ({"space": {"model.arch": {"choice": ["resnet19"]}}}, "resnet1"),
        ({"space": {"model.arch": {"choice": ["mobilenet_v3_small"]}}}, "model.stem=small is for the resnets"),
    ):
        with pytest.raises(ConfigError, match=says):
            tune(write(shapes, tmp_path, **search))
    with pytest.raises(ConfigError, match=r"set search\.metric"):
        tune(
            config.build(
                config.with_overrides(write(shapes, tmp_path).model_dump(mode="json"), {"train.metric": "val/loss"}),
                "test",
            )
        )
    assert not (tmp_path / "runs").exists()


def test_choices_are_checked_where_a_run_has_the_name_and_not_again_where_a_sweep_has_it(shapes, tmp_path):
    from scalecv.search.ledger import Ledger
    from scalecv.search.prepare import prepared
    from scalecv.search.sweep import same_everywhere
    from scalecv.train import runs

    wrong = write(shapes, tmp_path, space={"model.arch": {"choice": ["resnet10", "resnet1O"]}})
    Path(runs.home(wrong), "001").mkdir(parents=True)  # as `scalecv train` leaves it
    with pytest.raises(ConfigError, match="'resnet1O' can run in no draw"):
        tune(wrong)
    assert sorted(path.name for path in Path(runs.home(wrong)).iterdir()) == ["001"]
    Ledger(runs.home(wrong), prepared(same_everywhere(wrong)))
    said = []
    with pytest.raises(ConfigError, match="another sweep"):
        tune(wrong.model_copy(update={"seed": 7}), tell=lambda event: said.append(event.get("message", "")))
    assert not any("choice" in line for line in said)


def test_a_run_that_no_record_names_is_passed_over_where_it_saved_nothing(shapes, tmp_path):
    """As a driver leaves it that dies before a record of the trial is written, where its number is drawn anew."""
    from scalecv.train import runs

    base = write(shapes, tmp_path)
    one, other = (
        config.build(config.with_overrides(base.model_dump(mode="json"), {"train.lr": lr}), "t") for lr in (1, 2)
    )
    began = runs.open_run(one, lambda dataset: None)
    again = runs.open_run(one, lambda dataset: None)
    anew = runs.open_run(other, lambda dataset: None)
    assert (again.uri, again.goes_on) == (began.uri, True)
    assert (Path(anew.uri).name, anew.goes_on) == ("002", False)


def test_trials_tell_mlflow_where_the_sweep_does(shapes, tmp_path, monkeypatch):
    """Though their processes have another folder, and another environment."""
    from scalecv.search.approval import approval
    from scalecv.search.ledger import Ledger
    from scalecv.search.prepare import prepared
    from scalecv.search.sweep import _Sweep
    from scalecv.shards.store import open_dataset

    base = prepared(write(shapes, tmp_path))
    approve = approval(open_dataset(base.data.uri).manifest)

    def place() -> str:
        sweep = _Sweep(base, Ledger(str(tmp_path / "home"), base), approve, lambda _: None)
        found = sweep.suggest("one")
        sweep.ended("one", None)
        sweep.record.end("FINISHED")
        return json.loads(found["experiment"])["track"]["uri"]

    assert place() == f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    assert place() == f"sqlite:///{tmp_path}/other.db"


def test_a_record_that_is_none_is_told(shapes, tmp_path):
    from scalecv.errors import DataError
    from scalecv.search.ledger import Ledger

    experiment, home = write(shapes, tmp_path), str(tmp_path / "home")
    Ledger(home, experiment)
    (tmp_path / "home" / "trials").mkdir()
    record = tmp_path / "home" / "trials" / "0000.json"
    for text in ("{", "[]", "{}"):
        record.write_text(text)
        with pytest.raises(DataError, match=r"0000.json is no.*another name"):
            Ledger(home, experiment)
    (record.parent / "0001.json").write_text("{}")
    record.unlink()
    with pytest.raises(DataError, match=r"0000.json is missing"):
        Ledger(home, experiment)
    (record.parent / "0001.json").unlink()
    with pytest.raises(ConfigError, match="another sweep"):
        Ledger(home, write(shapes, tmp_path, eta=3))
    (tmp_path / "home" / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match=r"sweep.json is no record"):
        Ledger(home, experiment)


def test_records_that_are_written_meanwhile_come_in_turn_and_their_failure_is_told(shapes, tmp_path):
    from dataclasses import replace

    from scalecv.errors import StorageDenied
    from scalecv.search.ledger import Ledger
    from scalecv.search.trials import Point, Trial

    experiment, home = write(shapes, tmp_path), str(tmp_path / "home")
    ledger = Ledger(home, experiment)
    for status in ("paused", "running", "paused", "running", "finished"):
        one = Trial(0, {"train.lr": 0.1}, status=status, points=(Point(1, 0.5, 2.0),))
        ledger.keep(one)
        ledger.keep(replace(one, number=1))
    ledger.settle()
    assert Ledger(home, experiment).trials == ledger.trials == [one, replace(one, number=1)]
    records = tmp_path / "home" / "trials"
    records.rename(tmp_path / "away")
    records.write_text("no folder")
    ledger.keep(one)
    with pytest.raises(StorageDenied, match=r"0000\.json: Not a directory"):
        ledger.settle()
    ledger.keep(one)
    with pytest.raises(StorageDenied, match=r"0000\.json: Not a directory"):
        ledger.keep(one)
