import pytest

from scalecv.chaos.verdict import Outcome, Run, judge, share_done_once, went_back_to

QUIET = Run(0, "", "w", "o", (1, 2, 3, 4), 10.0)


def verdict(run, **more):
    return judge("worker", 3, "killed at step 3", QUIET, run, **more)


def ran(steps=(1, 2, 3, 3, 4), code=0, weights="w", order="o"):
    return Run(code, "what it said", weights, order, steps, 12.0)


@pytest.mark.parametrize(
    ("steps", "back"),
    [((1, 2, 3, 4), None), ((1, 2, 3, 3, 4), 2), ((1, 2, 3, 1, 2, 3, 4), 0), ((2, 3, 4), None), ((), None)],
)
def test_where_a_run_went_on_from(steps, back):
    assert went_back_to(steps) == back


def test_the_same_end_passes_and_says_what_was_done_twice():
    found = verdict(ran(), held=2)
    assert (found.verdict, found.steps, found.steps_done) == ("PASS", 4, 5)
    assert found.detail == "killed at step 3; 1 of 4 steps done twice"


@pytest.mark.parametrize(
    ("run", "more", "name", "says"),
    [
        (ran(code=1), {}, "HARD_FAIL", "exit code 1: what it said"),
        (ran(weights="x"), {}, "SILENT", "same samples, other weights"),
        (ran(order="x"), {}, "SILENT", "other samples"),
        (ran(steps=(1, 2, 3, 1, 2, 3, 4)), {"held": 2}, "LOST_WORK", "went on from step 0, a checkpoint held 2"),
        (ran(), {"record": "MLflow lacks 1 points"}, "LOST_WORK", "MLflow lacks 1"),
    ],
)
def test_what_is_not_a_pass(run, more, name, says):
    found = verdict(run, **more)
    assert found.verdict == name and says in found.detail


def test_steps_done_once_counts_what_was_tried():
    tried = [verdict(ran()), verdict(ran(steps=(1, 2, 3, 4)))]
    assert share_done_once([*tried, Outcome("disk", "NOT_RUN", "no right to mount")]) == pytest.approx(8 / 9)
    assert share_done_once([]) == 1.0
