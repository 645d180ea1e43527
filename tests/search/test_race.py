import math
import re
from dataclasses import replace

import numpy as np
import pytest

from scalecv.config import Search
from scalecv.search.decide import search_left_s
from scalecv.search.race import Pair, Standing, standing, standing_of
from scalecv.search.report import best_trial, verdict
from scalecv.search.schedule import Plan, finalists, least_budget_s
from scalecv.search.trials import AS_WRITTEN, Point, Trial
from tests.reference.search_sim import World, alike, simulate, spread, told


def race(means, seeds, noise=0.01, most=5, seed=0):
    """All that a race needs, one seed after the other. Returns: how it stands, trainings."""
    rng, values, count = np.random.default_rng(seed), {}, 0
    shared = rng.normal(0, 0.05, most)  # what a seed does to all
    while (found := standing(list(means), values, most)).needs:
        for entrant, at in found.needs:
            values.setdefault(entrant, {})[at] = means[entrant] + shared[at] + rng.normal(0, noise)
            count += 1
    return found, count


def test_an_entrant_that_is_worse_drops_out_and_the_race_ends_early():
    found, count = race({0: 0.80, 1: 0.60, 2: 0.79, AS_WRITTEN: 0.61}, 5)
    assert found.order[0] in (0, 2) and set(found.order) == {0, 1, 2, AS_WRITTEN}
    apart = {frozenset((pair.better, pair.other)): pair.is_told_apart for pair in found.pairs}
    assert apart[frozenset((found.order[0], 1))] and apart[frozenset((found.order[0], AS_WRITTEN))]
    assert count < 20


def test_what_seeds_do_to_all_alike_is_no_noise():
    found, _ = race({0: 0.75, AS_WRITTEN: 0.70, 1: 0.70}, 5, noise=0.005)
    assert found.order[0] == 0 and all(pair.is_told_apart for pair in found.pairs)
    assert all(pair.low < 0.05 < pair.high + 0.01 for pair in found.pairs)


def test_nothing_is_told_apart_where_nothing_differs_and_a_gain_is_found():
    wrong = [
        any(pair.is_told_apart for pair in race({0: 0, 1: 0, 2: 0, AS_WRITTEN: 0}, 5, seed=s)[0].pairs)
        for s in range(200)
    ]
    right = [race({0: 0.03, 1: 0, 2: 0, AS_WRITTEN: 0}, 5, seed=s)[0] for s in range(50)]
    assert np.mean(wrong) <= 0.06  # 0.045 of 3,000
    best = [any(pair.other == AS_WRITTEN and pair.is_told_apart for pair in found.pairs) for found in right]
    assert np.mean(best) >= 0.9


def test_an_entrant_that_fails_is_out_and_one_alone_is_no_race():
    values = {0: {0: 0.5, 1: 0.5, 2: 0.51}, 1: {0: math.nan}, AS_WRITTEN: {0: 0.1, 1: 0.1, 2: 0.11}}
    assert standing([0, 1, AS_WRITTEN], values, 3).order == (0, AS_WRITTEN)
    assert standing([0, 1], values, 3).order == (0,)
    assert "failed" in verdict(standing([0, 1], values, 3), "val/iou", None, Search()).sentence


@pytest.mark.parametrize(
    ("means", "winner", "says"),
    [
        ((0.8, 0.6), 0, "trial 0 is better than the experiment as written by 0.2000 (val/iou, 95 % "),
        ((0.6, 0.8), AS_WRITTEN, "the experiment as written is better than trial 0 by 0.2000"),
        ((0.701, 0.70), None, "no difference found between trial 0 and the experiment as written"),
    ],
)
def test_the_verdict_says_what_the_figures_allow(means, winner, says):
    shifts = (0.0, 0.01, -0.01)
    values = {0: {s: means[0] + shift for s, shift in enumerate(shifts)}}
    values[AS_WRITTEN] = {s: means[1] + (0.002, -0.001, -0.001)[s] + shift for s, shift in enumerate(shifts)}
    found = verdict(standing([0, AS_WRITTEN], values, 3), "val/iou", None, Search())
    assert found.winner == winner and says in found.sentence and found.seeds == 3


def test_a_cost_is_better_the_smaller():
    values = {0: {0: 0.2, 1: 0.21, 2: 0.2}, AS_WRITTEN: {0: 0.4, 1: 0.41, 2: 0.4}}
    found = standing([0, AS_WRITTEN], values, 3, sign=-1.0)
    assert found.order == (0, AS_WRITTEN) and found.means[0] == pytest.approx(0.2033, abs=1e-3)


def test_the_first_of_the_race_is_the_trial_to_use_with_a_bundle_of_the_race_if_it_was_not_finished():
    plan = Plan(Search(), 9, 1.0, 1.0, False)
    trials = [Trial(0, {}, "finished", points=(Point(9, 0.9),), bundle="a"), Trial(1, {}, "stopped")]
    heats = [
        Trial(n, {}, "finished", points=(Point(9, value),), bundle=str(n), entrant=1, seed=n)
        for n, value in enumerate((0.5, 0.8, 0.6))
    ]
    values = {1: {0: 0.5, 1: 0.8, 2: 0.6}, 0: {0: 0.1, 1: 0.4, 2: 0.2}}
    best = best_trial(verdict(standing([0, 1], values, 3), "m", None, Search()), trials, heats, plan)
    assert (best.number, best.bundle, best.status) == (1, "1", "finished")
    assert best_trial(verdict(standing([], {}, 3), "m", trials[0], Search()), trials, [], plan).number == 0


def test_a_whole_sweep_keeps_to_its_budget_and_races_what_it_found():
    for seed in range(10):
        world = World(spread(seed), 27, 0.005, 0.005, seed)
        search = Search(trials=200, budget="60000s")
        plan, trials, heats, _ = simulate(search, world)
        spent = sum(one.device_s for one in [*trials, *heats])
        assert spent / 60000 <= 1.05, seed
        _, _, seeds = told(plan, trials, heats)
        assert seeds >= 3
    world = World(alike(planted=0.1), 9, 0.002, 0.005, 0)
    plan, trials, heats, _ = simulate(Search(trials=9), world)
    assert told(plan, trials, heats)[0] == 3


def test_a_winner_is_the_first_of_the_race_or_nothing_separates_the_two():
    declared = 0
    for seed in range(100):
        world = World(spread(seed), 9, 0.004, (0.002, 0.005, 0.01)[seed % 3], seed)
        plan, trials, heats, _ = simulate(Search(trials=27), world)
        found = standing_of(plan, trials, heats, 0.0)
        said = verdict(found, "quality", None, plan.search)
        if said.winner is not None:
            declared += 1
            assert said.winner == found.order[0] or {said.winner, found.order[0]} <= {*found.tied}, (seed, said)
    assert declared > 20


def test_what_is_kept_of_the_budget_is_enough_for_a_race():
    for seed in range(10):
        world = World(spread(seed), 27, 0.005, 0.005, seed)
        for budget in (12000, 20000, 60000):
            _, trials, heats, _ = simulate(Search(trials=40, budget=f"{budget}s"), world)
            assert sum(one.device_s for one in [*trials, *heats]) <= 1.05 * budget
            whole = max(one.points[-1].device_s for one in trials if one.status == "finished")
            assert heats or 6 * whole > 0.6 * budget, (seed, budget)


def test_a_budget_that_pays_no_race_goes_to_the_search():
    unraced = 0
    for seed in range(12):
        search = Search(trials=400, budget="2000s", rung="1epochs", finalists=1)
        plan, trials, heats, _ = simulate(search, World(spread(seed), 9, 0.005, 0.007, seed))
        if not heats:
            unraced += 1
            assert sum(one.device_s for one in trials) > 0.98 * 2000
            found = verdict(standing_of(plan, trials, heats, 0.0), "m", None, search, least_budget_s(plan, trials))
            enough = re.fullmatch(r"not raced: .*; with search.budget=(\d+m) the same command has room", found.sentence)
            larger = search.model_copy(update={"budget": enough[1]})
            assert simulate(larger, World(spread(seed), 9, 0.005, 0.007, seed))[2], seed
    assert 0 < unraced < 12


def test_what_trainings_take_to_stop_is_kept_beside_what_else_is_kept_and_not_alone():
    search = Search(trials=9, budget="1000s", finalists=1)
    plan, begun = Plan(search, 9, 1.0, 1.0, False), [Trial(0, {}, "running"), Trial(1, {}, "running")]
    assert search_left_s(plan, begun, [], 40.0, devices=2) == 40.0  # nothing is known: to stop would gain nothing
    points = tuple(Point(epoch, 0.5, 10.0 * epoch) for epoch in range(1, 4))
    known = [Trial(0, {"train.lr": 0.1}, "paused", points=points, device_s=30.0), begun[1]]
    left = [search_left_s(plan, known, [], 900.0, devices) for devices in (0, 1, 2, 9)]
    assert [left[0] - one for one in left[1:]] == [20.0, 40.0, 50.0]  # 20 s each, 5 % of the budget at most


def test_why_there_was_no_race_is_told():
    said = lambda best, least_s: verdict(standing([], {}, 3), "m", best, Search(budget="1m"), least_s).sentence  # noqa: E731
    assert said(Trial(0, {}), 0.0) == "not raced: no trial differs from the experiment as written"
    assert (
        said(None, 60.0)
        == "not raced: no trial was trained to its end; with search.budget=2m the same command has room"
    )


def test_each_set_of_values_races_once_and_the_experiment_as_written_beside_them():
    plan = Plan(Search(finalists=3), 9, 1.0, 1.0, False, {"train.lr": 0.1})
    lrs = (0.1, 0.2, 0.2, 0.3, 0.4)
    trials = [Trial(n, {"train.lr": lr}, "finished", points=(Point(9, 0.9 - n / 10, 9.0),)) for n, lr in enumerate(lrs)]
    assert [one.number for one in finalists(plan, trials, 3)] == [1, 3, 4]
    assert {entrant for entrant, _ in standing_of(plan, trials, [], 1e9).needs} == {1, 3, 4, AS_WRITTEN}


def test_where_the_experiment_as_written_wins_its_own_best_seed_is_what_to_use():
    plan = Plan(Search(), 9, 1.0, 1.0, False)
    values = {0: {0: 0.1, 1: 0.1, 2: 0.11}, AS_WRITTEN: {0: 0.9, 1: 0.91, 2: 0.9}}
    heats = [
        Trial(n, {}, "finished", points=(Point(9, value),), bundle=str(n), entrant=AS_WRITTEN, seed=n)
        for n, value in values[AS_WRITTEN].items()
    ]
    found = verdict(standing([0, AS_WRITTEN], values, 3), "m", None, Search())
    best = best_trial(found, [Trial(0, {}, "finished", bundle="x")], heats, plan)
    assert found.winner == AS_WRITTEN and best.bundle == "1" and best.number == AS_WRITTEN


def test_whoever_goes_on_after_a_verdict_is_judged_at_half_the_error(tmp_path):
    from scalecv import config
    from scalecv.search.ledger import Ledger

    def ledger(seeds):
        tree = {"name": "s", "task": "classify", "data": {"uri": "d"}, "model": {"arch": "resnet18"}}
        return Ledger(str(tmp_path), config.build({**tree, "search": {"seeds": seeds}}, "test"))

    for seeds, before in ((3, 0), (3, 0), (5, 1), (3, 0), (7, 2)):
        assert ledger(seeds).verdicts_before == before
        ledger(seeds).judged()
    values = {0: {0: 0.50, 1: 0.51, 2: 0.52}, AS_WRITTEN: {0: 0.40, 1: 0.42, 2: 0.405}}
    first, second = (standing([0, AS_WRITTEN], values, 3, error=error) for error in (0.05, 0.025))
    assert second.pairs[0].low < first.pairs[0].low < first.pairs[0].effect
    assert "97.5 % " in verdict(second, "val/iou", None, Search()).sentence
    assert verdict(first, "val/iou", None, Search(finalists=0)).sentence.startswith("not raced: search.finalists=0")


def test_who_led_when_the_experiment_as_written_dropped_out_may_be_overtaken():
    """Trial 1 leads and beats it over three seeds; trial 0, whose first seed was a bad one, beats trial 1 later."""
    early = Pair(1, AS_WRITTEN, 0.2, 0.1, 0.3, True, 3)
    late = Pair(0, 1, 0.05, 0.02, 0.08, True, 5)
    means = {0: 0.80, 1: 0.75, AS_WRITTEN: 0.55}
    found = Standing((), (0, 1, AS_WRITTEN), (late, early), (0,), means, 5, 0.05)
    told = verdict(found, "val/iou", None, Search())
    assert told.winner == 0
    assert told.sentence.startswith("trial 1 is better than the experiment as written by 0.2000")
    assert told.sentence.endswith(", and trial 0 is better than trial 1 by 0.0500")
    last = Pair(2, 0, 0.01, 0.005, 0.015, True, 5)
    told = verdict(replace(found, pairs=(last, late, early), tied=(2, 3)), "val/iou", None, Search())
    assert told.winner == 2
    assert told.sentence.endswith("trial 2 is better than trial 0 by 0.0100; no difference found from trial 3")
    tied = replace(found, pairs=(replace(late, is_told_apart=False), early), tied=(0, 1))
    told = verdict(tied, "val/iou", None, Search())
    assert told.winner == 1 and told.sentence.endswith("; no difference found from trial 0")


def test_a_budget_that_ends_within_a_seed_leaves_the_whole_ones_before_to_be_judged():
    plan = Plan(Search(budget="100s", finalists=1), 3, 1.0, 1.0, False)
    trials = [Trial(0, {}, status="finished", device_s=1.0, points=(Point(3, 0.6, 1.0),))]
    heats = [(seed, *one) for seed in range(3) for one in ((0, 0.61 + seed / 100), (AS_WRITTEN, 0.6 + seed / 200))]
    race = [
        Trial(number, {}, "finished", device_s=1.0, points=(Point(3, value),), entrant=entrant, seed=seed)
        for number, (seed, entrant, value) in enumerate(heats)
    ]
    race.append(Trial(6, {}, "finished", device_s=80.0, points=(Point(3, 0.62),), entrant=0, seed=3))
    assert standing_of(plan, trials, race, 13.0).needs == ((AS_WRITTEN, 3),)
    found = standing_of(plan, trials, race, 0.0)
    assert not found.needs and found.seeds == 3 and found.order == (0, AS_WRITTEN)
