import ray.cloudpickle
from ray.train import UserCallback

from scalecv.artifacts import spool
from scalecv.artifacts.callback import SpoolCallback


def test_what_rank_0_reports_reaches_the_spool_in_order(tmp_path):
    path = tmp_path / "spool.jsonl"
    # Ray pickles it into the controller.
    callback = ray.cloudpickle.loads(ray.cloudpickle.dumps(SpoolCallback(str(path))))
    assert isinstance(callback, UserCallback)
    events = [{"kind": "metrics", "step": n, "metrics": {"train/loss": 0.5}} for n in range(3)]
    callback.after_report(None, [{"events": events}, {"events": [{"kind": "metrics", "step": 9}]}], None)
    callback.after_report(None, [{}, {}], None)
    assert [e["step"] for e in spool.read(path)[0]] == [0, 1, 2]
