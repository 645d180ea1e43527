import pytest

from scalecv.config import Search, build
from scalecv.errors import ConfigError
from scalecv.search.promotion import best_of, first_rung, next_segment
from scalecv.search.space import draw
from scalecv.search.trials import Point, Trial

BASE = {"name": "s", "task": "segment", "data": {"uri": "d"}, "model": {"arch": "unet"}}


def sweep(search, quality, epochs):
    """Run segments one after the other: the objective of a trial is its quality times its epochs."""
    trials = []
    while (found := next_segment(trials, search, epochs, 1.0)) is not None:
        trial = Trial(found, {}, until=first_rung(search, epochs)) if isinstance(found, int) else found
        done = trial.until or epochs
        points = tuple(Point(epoch, quality[trial.number] * epoch) for epoch in range(1, done + 1))
        status = "finished" if done == epochs else "paused"
        seconds = trial.device_s + done - trial.epochs
        trials[trial.number : trial.number + 1] = [Trial(trial.number, {}, status, device_s=seconds, points=points)]
    return trials


def test_the_best_are_promoted_and_most_trials_stay_at_the_first_rung():
    quality = [(7 * number) % 27 for number in range(27)]
    trials = sweep(Search(trials=27, eta=3), quality, epochs=9)
    assert quality[best_of(trials, 9, 1.0).number] == 26
    assert sum(one.epochs == 1 for one in trials) >= 14
    assert sum(one.device_s for one in trials) < 27 * 9 / 2


def test_a_sweep_of_one_trial_ends_with_a_model():
    assert [one.status for one in sweep(Search(trials=1), [1.0], epochs=9)] == ["finished"]


def test_nothing_begins_once_the_budget_is_spent():
    trials = sweep(Search(trials=100, budget="20s"), [1.0] * 100, epochs=9)
    assert 20 <= sum(one.device_s for one in trials) <= 20 + 8


def test_weights_of_a_simplex_add_up_and_conditions_hold():
    space = {
        "model.arch": {"choice": ["unet", "fpn"]},
        "model.encoder": {"choice": ["resnet18", "resnet34"], "when": {"model.arch": ["fpn"]}},
        "loss": {"simplex": ["bce", "dice", "focal"]},
        "train.lr": {"loguniform": [1e-4, 1e-2]},
    }
    base = build({**BASE, "search": {"space": space}}, "test")
    for number in range(20):
        drawn = draw(base, number, lambda experiment: None).overrides
        assert drawn == draw(base, number, lambda experiment: None).overrides
        assert sum(drawn[f"loss.{term}"] for term in ("bce", "dice", "focal")) == pytest.approx(1, abs=1e-5)
        assert ("model.encoder" in drawn) == (drawn["model.arch"] == "fpn")
        assert 1e-4 <= drawn["train.lr"] <= 1e-2


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"metric": "val/loss"}, "depends on the weights that are searched"),
        ({"budget": "soon"}, "is not a time"),
        ({"space": {"train.lr": {"uniform": [2, 1]}}}, "a smaller number before a larger one"),
        ({"space": {"train.lr": {"loguniform": [0, 1]}}}, "above 0"),
        ({"space": {"train.lr": {}}}, "exactly one of"),
        ({"space": {"name": {"choice": ["a"]}}}, "leave it out"),
        (
            {"space": {"train.lr": {"uniform": [0, 1], "when": {"model.arch": ["unet"]}}}},
            "must stand in the space before",
        ),
    ],
)
def test_a_wrong_space_is_refused(search, says):
    with pytest.raises(ConfigError, match=says):
        build({**BASE, "search": search}, "test")


def test_an_unknown_key_in_the_space_is_refused_with_the_nearest():
    base = build({**BASE, "search": {"space": {"train.lrr": {"uniform": [0, 1]}}}}, "test")
    with pytest.raises(ConfigError, match="lrr"):
        draw(base, 0, lambda experiment: None)


def test_no_number_is_the_worst_objective():
    nan = Trial(0, {}, status="finished", points=(Point(1, float("nan")), Point(2, 0.1)))
    other = Trial(1, {}, status="finished", points=(Point(1, 0.2), Point(2, float("nan"))))
    lost = Trial(2, {}, status="finished", points=(Point(1, float("inf")),))
    assert best_of([nan, other, lost], 2, 1.0) is other
    assert nan.value(1, 1.0) == float("-inf")
