"""What segments hold while they run."""

import time

from scalecv.config import build
from scalecv.search.segment import run_segment
from scalecv.search.trials import Point, Trial
from scalecv.search.under_way import UnderWay


def test_what_a_process_held_before_it_died_counts():
    segments = UnderWay(devices=2)
    for name in ("whole", "died", "silent"):
        segments.begin(name, Trial(0, {}, points=(Point(1, 0.5, 1.0),)))
    segments.died("died")
    time.sleep(0.2)
    assert segments.held_s >= 3 * 2 * 0.2
    assert segments.end("whole", 0.1)[1] == 0.1, "a process that lived knows best"
    trial, held_s = segments.end("died", 0.1)
    assert trial is not None and held_s >= 2 * 0.2
    assert segments.end("silent", None)[1] >= 2 * 0.2
    assert segments.end("silent", None) == (None, 0.0) and not segments


def test_a_checkpoint_that_cannot_be_read_is_told_as_the_cause(tmp_path):
    place = tmp_path / "runs" / "s" / "001" / "checkpoints" / "00000008-00000000"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text('{"format": 1}')
    tree = {"name": "s", "task": "classify", "data": {"uri": str(tmp_path / "d")}, "model": {"arch": "resnet18"}}
    experiment = build({**tree, "track": {"storage": str(tmp_path / "runs")}}, "test")
    told = run_segment(experiment, "val/accuracy", None, {})
    assert told["status"] == "failed" and told["cause"] and told["device_s"] >= 0 and "points" not in told
