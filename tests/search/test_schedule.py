import math
from dataclasses import replace

import numpy as np
import pytest

from scalecv.config import Search, build
from scalecv.errors import ConfigError
from scalecv.search.schedule import (
    Plan,
    best_of,
    first_rung,
    front_of,
    kept_s,
    leader,
    next_segment,
    ranking,
)
from scalecv.search.searchers import check_living, perturbed, runnable, values_of
from scalecv.search.space import draw, grid
from scalecv.search.trials import Point, Trial

BASE = {"name": "s", "task": "segment", "data": {"uri": "d"}, "model": {"arch": "unet"}}


def sweep(search, quality, epochs, seconds=None):
    """Run segments one after the other: the objective of a trial is its quality times its epochs."""
    plan, trials = Plan(search, epochs, 1.0, *first_rung(search)), []
    seconds = seconds or [1.0] * len(quality)
    spent = lambda: sum(one.device_s for one in trials)  # noqa: E731
    left = lambda: (search.budget_s or math.inf) - spent() - kept_s(plan, trials)  # noqa: E731
    while (found := next_segment(plan, trials, left())) is not None:
        trial = Trial(found, {}, until=plan.first(found)) if isinstance(found, int) else found
        points, number = list(trial.points), trial.number
        begin = points[-1].epoch if points else trial.inherited
        for epoch in range(begin + 1, epochs + 1):
            if points and trial.until and plan.until(points, trial.until):
                break
            points.append(Point(epoch, quality[number] * epoch, epoch * seconds[number]))
        status = "finished" if points[-1].epoch == epochs else "paused"
        spent_s = points[-1].device_s
        trials[number : number + 1] = [replace(trial, status=status, device_s=spent_s, points=tuple(points))]
    return plan, trials


def test_the_best_are_promoted_and_most_trials_stay_at_the_first_rung():
    quality = [(7 * number) % 27 for number in range(27)]
    plan, trials = sweep(Search(trials=27, eta=3, finalists=0), quality, epochs=9)
    assert quality[best_of(plan, trials).number] == 26
    assert sum(one.epochs == 1 for one in trials) >= 14
    assert sum(one.device_s for one in trials) < 27 * 9 / 2


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "pbt", "none"])
def test_a_sweep_ends_and_its_best_trial_is_trained_to_its_end(scheduler):
    quality = [(7 * number) % 12 + 1 for number in range(100)]
    for trials in (1, 2, 12):
        plan, told = sweep(Search(trials=trials, scheduler=scheduler), quality, epochs=9)
        assert best_of(plan, told).number == leader(plan, told).number
        assert len(told) == trials or scheduler == "pbt"
        assert scheduler != "none" or all(one.status == "finished" for one in told)


def test_the_worst_of_a_population_are_replaced_by_children_of_the_best():
    quality = [1.0, 2.0, 3.0, 4.0] * 100
    _, told = sweep(Search(trials=4, scheduler="pbt", rung="3epochs"), quality, epochs=9)
    first = told[4]
    assert (first.replaces, first.parent, first.born, first.inherited) == (0, 3, 3.0, 3)
    assert told[0].status == "paused" and told[0].epochs == 3
    assert first.points[0].epoch == 4 and first.epochs in (6, 9)
    second = told[5]  # at the next rung, where the worst is one of those that are left
    assert second.born == 6.0 and second.replaces != 0 and len(told) == 6


def test_rungs_in_seconds_give_small_and_large_networks_the_same_time():
    seconds = [1.0 if number % 2 else 10.0 for number in range(8)]
    plan, told = sweep(Search(trials=8, rung="10s", finalists=0), [1.0 + n for n in range(8)], 100, seconds)
    assert {plan.until(one.points, 10.0) for one in told[::2]} == {1}
    assert {plan.until(one.points, 10.0) for one in told[1::2]} == {10}
    ends = [Point(epoch, 0.1, 2.2 * epoch) for epoch in range(1, 7)]
    assert plan.until(ends, 9.8) == 4 and plan.until(ends, 10.0) == 5 and plan.until(ends, 99.0) is None


def test_a_budget_leaves_room_to_finish_the_best_trial():
    for budget in (100, 200, 400):
        plan, told = sweep(
            Search(trials=1000, budget=f"{budget}s", rung="1s", finalists=0), [1.0 + n % 7 for n in range(1000)], 9
        )
        assert best_of(plan, told) is not None
        assert 0.8 * budget <= sum(one.device_s for one in told) <= budget + 9


def test_no_trial_begins_when_twice_as_many_would_gain_too_little():
    quality = np.random.default_rng(0).normal(0.7, 0.1, 400).tolist()
    _, few = sweep(Search(trials=400, min_gain=0.05, finalists=0), quality, epochs=1)
    _, more = sweep(Search(trials=400, min_gain=0.02, finalists=0), quality, epochs=1)
    assert 8 <= len(few) < len(more) < 400


def test_with_a_cost_those_that_are_best_for_it_go_on():
    assert front_of([1.0, 2.0, 3.0, 2.5], [0.5, 0.8, 0.9, 0.7]) == [0, 0, 0, 1]
    assert front_of([1.0, 1.0], [0.5, 0.6]) == [1, 0]
    plan = Plan(Search(cost="flops"), 9, 1.0, 1.0, False)
    at = lambda number, cost, value: Trial(number, {}, "paused", points=(Point(1, value, 1.0),), cost=cost)  # noqa: E731
    trials = [at(0, 1.0, 0.5), at(1, 2.0, 0.4), at(2, 3.0, 0.9)]
    assert [one.number for one in ranking(plan, trials)] == [2, 0, 1]


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
        ({"budget": "0s"}, "is not a time"),
        ({"space": {"seed": {"int": [1, 9]}}}, "cannot be compared"),
        (
            {
                "space": {
                    "model.arch": {"choice": ["unet"]},
                    "train.lr": {"uniform": [0, 1], "when": {"model.arch": ["unett"]}},
                }
            },
            "'unett', which is none of",
        ),
        ({"rung": "0epochs"}, "is no rung"),
        ({"rung": "3"}, "is no rung"),
        ({"searcher": "grid", "space": {"train.lr": {"uniform": [1, 2]}}}, "made of choices alone"),
        ({"searcher": "optuna", "scheduler": "pbt"}, "do not go together"),
        ({"space": {"train.lr": {"uniform": [2, 1]}}}, "a smaller number before a larger one"),
        ({"space": {"train.lr": {"loguniform": [0, 1]}}}, "above 0"),
        ({"space": {"train.lr": {}}}, "exactly one of"),
        ({"space": {"train.epochs_": {"int": [1, 1 << 63]}}}, "64 bits"),
        ({"space": {"loss": {"simplex": ["bce", "bce"]}}}, "a term twice"),
        (
            {"space": {"loss": {"simplex": ["bce", "dice"]}, "loss.dice": {"uniform": [0, 1]}}},
            "loss.dice is a term of the simplex",
        ),
        (
            {"space": {"model.arch": {"choice": ["a"]}, "train.lr": {"uniform": [0, 1], "when": {"model.arch": []}}}},
            "when model.arch has no value",
        ),
        (
            {
                "space": {
                    "train.lr": {"uniform": [0, 1]},
                    "model.norm": {"choice": ["batch"], "when": {"train.lr": [1]}},
                }
            },
            "when names train.lr, which is drawn from no choice or int",
        ),
        ({"space": {"name": {"choice": ["a"]}}}, "leave it out"),
        ({"space": {"train.lr": {"loguniforn": [1, 2]}}}, r"did you mean 'search.space.train.lr.loguniform'"),
        ({"space": {"train.lr": [1, 2]}}, r"search.space.train.lr=\[1, 2\]: expected how it is drawn, as {loguniform"),
        ({"space": {"train.lr": {"choice": []}}}, r"choice=\[\]: expected 1 or more values"),
        ({"space": {"train.lr": {"uniform": [1]}}}, r"uniform=\[1\]: expected more than 1 values"),
        ({"space": {"train.lr": {"uniform": [1, 2, 3]}}}, "expected at most 2 values"),
        (
            {"space": {"model.arch": {"choice": ["a"]}, "train.lr": {"uniform": [0, 1], "when": {"model.arch": "a"}}}},
            r"when.model.arch='a': expected a list, as \[a, b\]",
        ),
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
    plan = Plan(Search(), 2, 1.0, 1.0, False)
    nan = Trial(0, {}, status="finished", points=(Point(1, float("nan")), Point(2, 0.1)))
    other = Trial(1, {}, status="finished", points=(Point(1, 0.2), Point(2, float("nan"))))
    lost = Trial(2, {}, status="finished", points=(Point(1, float("inf")),))
    assert best_of(plan, [nan, other, lost]) is other
    assert nan.value(1.0, 1) == float("-inf")


def test_a_grid_has_every_combination_once_and_keys_only_where_they_count():
    space = {
        "model.arch": {"choice": ["unet", "fpn"]},
        "model.encoder": {"choice": ["resnet18", "resnet34"], "when": {"model.arch": ["fpn"]}},
        "train.lr": {"choice": [0.1, 0.01]},
    }
    base = build({**BASE, "search": {"space": space, "searcher": "grid"}}, "test")
    every = list(grid(base))
    assert len(every) == 6
    said = []

    def approve(one):
        if one.model.arch == "unet" and one.train.lr == 0.1:
            raise ConfigError("does not fit")

    left = runnable(base, approve, said.append)
    assert left == every[1:] and said == ["left out model.arch=unet train.lr=0.1: does not fit"]
    plan = Plan(base.search, 9, 1.0, 1.0, False)
    trials = []
    for number in range(5):
        drawn = draw(base, number, approve, values_of(plan, trials, left)).overrides
        trials.append(Trial(number, drawn))
    assert [one.overrides for one in trials] == left
    assert sum("model.encoder" in one for one in every) == 4


@pytest.mark.parametrize("searcher", ["random", "optuna", "grid"])
def test_the_same_values_are_not_tried_twice_and_a_space_may_be_exhausted(searcher):
    space = {"model.arch": {"choice": ["unet", "fpn"]}, "train.batch": {"choice": [2, 4, 8]}}
    base = build({**BASE, "search": {"space": space, "searcher": searcher}}, "test")
    plan, trials = Plan(base.search, 9, 1.0, 1.0, False), []

    def approve(one):
        if one.model.arch == "fpn" and one.train.batch == 8:
            raise ConfigError("does not fit")

    left = runnable(base, approve, lambda line: None)
    while True:
        tried = [one.overrides for one in trials]
        drawn = draw(base, len(trials), approve, values_of(plan, trials, left), tried)
        if drawn is None:
            break
        trials.append(Trial(len(trials), drawn.overrides, "finished", points=(Point(1, 0.5, 1.0),)))
    assert len(trials) == 5 == len({tuple(one.overrides.items()) for one in trials})


@pytest.mark.parametrize("cost", [None, "flops"])
def test_optuna_learns_from_the_records_alone(cost):
    space = {
        "model.arch": {"choice": ["unet", "fpn"]},
        "model.encoder": {"choice": ["resnet18", "resnet34"], "when": {"model.arch": ["fpn"]}},
        "loss": {"simplex": ["bce", "dice"]},
        "train.lr": {"loguniform": [1e-5, 1]},
        "train.batch": {"int": [1, 9]},
    }
    base = build({**BASE, "search": {"space": space, "searcher": "optuna", "cost": cost}}, "test")
    plan, trials = Plan(base.search, 9, 1.0, 1.0, False), []
    for number in range(40):
        values = values_of(plan, trials)
        drawn = draw(base, number, lambda one: None, values).overrides
        assert number % 10 or drawn == draw(base, number, lambda one: None, values).overrides
        good = -abs(math.log(drawn["train.lr"] / 1e-2)) + drawn["loss.dice"]
        status = ("finished", "paused", "failed", "running")[number % 4 if number % 5 == 0 else 0]
        points = () if status == "running" else (Point(1, good, 1.0),)
        trials.append(Trial(number, drawn, status, points=points, cost=1.0))
    far = [abs(math.log(one.overrides["train.lr"] / 1e-2)) for one in trials]
    assert np.median(far[25:]) < np.median(far[:10])


def test_children_change_only_what_may_change_while_a_network_learns():
    space = {
        "model.arch": {"choice": ["unet", "fpn"]},
        "loss": {"simplex": ["bce", "dice"]},
        "train.lr": {"loguniform": [1e-3, 1e-2]},
    }
    base = build({**BASE, "search": {"space": space, "scheduler": "pbt"}}, "test")
    parent = {"model.arch": "fpn", "loss.bce": 0.5, "loss.dice": 0.5, "train.lr": 1e-3}
    lrs = set()
    for number in range(20):
        child = perturbed(base, Trial(number, parent, parent=0))
        assert child["model.arch"] == "fpn" and child["loss.bce"] + child["loss.dice"] == pytest.approx(1, abs=1e-5)
        assert child == perturbed(base, Trial(number, parent, parent=0))
        lrs.add(child["train.lr"])
    assert lrs == {1e-3, 1.25e-3}
    without = {"model.arch": "fpn", "train.lr": 1e-3}  # as where the mixture is for another network
    assert perturbed(base, Trial(1, without, parent=0)).keys() == without.keys()
    dead = build({**BASE, "search": {"space": {"model.arch": {"choice": ["unet"]}}, "scheduler": "pbt"}}, "test")
    with pytest.raises(ConfigError, match="has none that may"):
        check_living(dead)
