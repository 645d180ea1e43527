import itertools
import random

import pytest

from scalecv.errors import ConfigError
from scalecv.shards import plan
from scalecv.sources.found import Found, LeftOut

SETTINGS = plan.UnitSettings("/src", "label", (), (), None, 4 << 20)
SHARES = (0.8, 0.1, 0.1)


def found(count: int, split: str | None = None, **more) -> list[Found]:
    return [Found(f"c{i % 5}/{i:05d}.png", 5000, "e", label=f"c{i % 5}", split=split, **more) for i in range(count)]


def cut(collected: plan.Collected, unit_mb: int = 1) -> list[tuple[str, list[str]]]:
    units = plan.units(collected, SETTINGS, unit_mb)
    return [(split, [row["path"] for row in rows]) for split, _, rows in (plan.read_unit(u.spec) for u in units)]


@pytest.mark.parametrize("text", ["80/10/10", "8/1/1"])
def test_shares_are_normalised(text):
    assert plan.parse_shares(text) == pytest.approx(SHARES)
    assert plan.parse_shares("50/50") == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("text", ["", "80", "a/b", "0/0/0", "-1/1", "1/2/3/4", "nan/1", "inf/1"])
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--split"):
        plan.parse_shares(text)


def test_units_do_not_depend_on_the_order_of_the_listing():
    items = found(3000)
    shuffled = random.Random(1).sample(items, len(items))
    plans = [plan.collect(iter(x)) for x in (items, shuffled)]
    for collected in plans:
        plan.assign_splits(collected, SHARES, given=False)
    first, second = map(cut, plans)
    assert first == second and sorted(itertools.chain(*(p for _, p in first))) == sorted(f.path for f in items)
    assert plan.identity(plans[0], SETTINGS, 1) == plan.identity(plans[1], SETTINGS, 1)
    assert len(first) > 4
    paths = next(p for split, p in first if split == "train")
    assert {p[:2] for p in paths} == {"c0", "c1", "c2", "c3", "c4"}, "a stretch of the dataset is a random sample"


def test_splits_by_hash_keep_groups_whole_and_stay_when_data_is_added():
    few = [Found(f"{i}.png", 1, "e", group=f"g{i // 10}") for i in range(1000)]
    more = few + [Found(f"new{i}.png", 1, "e", group=f"n{i // 10}") for i in range(1000)]
    splits = []
    for items in (few, more):
        collected = plan.collect(items)
        assert plan.assign_splits(collected, SHARES, given=False) == []
        splits.append(dict(collected.table.execute("SELECT path, split FROM rows")))
    assert all(splits[1][path] == split for path, split in splits[0].items())
    assert all(len({splits[0][f"{g * 10 + i}.png"] for i in range(10)}) == 1 for g in range(100))
    share = sum(s == "train" for s in splits[1].values()) / 2000
    assert abs(share - 0.8) < 0.1  # 200 groups: 3.5 standard deviations


def test_val_is_carved_from_train_where_the_source_has_none():
    collected = plan.collect([*found(1000, "train"), Found("t.png", 1, "e", label="c0", split="test")])
    said = plan.assign_splits(collected, SHARES, given=False)
    counts = dict(collected.table.execute("SELECT split, count(*) FROM rows GROUP BY split"))
    assert counts["test"] == 1 and 70 <= counts["val"] <= 130  # 3 standard deviations around 100
    assert f"{counts['val']} of 1000 training images became val" in said[0]


def test_a_source_with_val_keeps_its_splits():
    collected = plan.collect([*found(20, "train"), Found("v.png", 1, "e", split="val")])
    assert plan.assign_splits(collected, SHARES, given=True) == []
    assert dict(collected.table.execute("SELECT split, count(*) FROM rows GROUP BY split")) == {"train": 20, "val": 1}


def test_the_smallest_source_still_gets_a_val():
    collected = plan.collect(found(3))
    plan.assign_splits(collected, SHARES, given=False)
    assert plan.totals(collected) == (3, 15000)
    assert "val" in {s for (s,) in collected.table.execute("SELECT split FROM rows")}


def test_groups_over_two_splits_are_told():
    collected = plan.collect(
        [Found("a.png", 1, "e", group="g", split="train"), Found("b.png", 1, "e", group="g", split="val")]
    )
    assert "1 groups lie in more than one split, such as g" in plan.assign_splits(collected, SHARES, given=False)[0]


def test_rows_without_label_are_bad_where_others_have_one():
    collected = plan.collect([*found(2), Found("x.png", 1, "e")])
    assert plan.kind_of(collected) == "label"
    assert collected.table.execute("SELECT path FROM rows WHERE problem = 'no_label'").fetchall() == [("x.png",)]
    assert plan.kind_of(plan.collect([Found("x.png", 1, "e")])) == "image"
    assert plan.kind_of(plan.collect([Found("x.png", 1, "e", mask="m.png")])) == "mask"


def test_what_is_left_out_is_counted_and_a_path_counts_once():
    collected = plan.collect([*found(3), found(1)[0], LeftOut("a.txt", "why"), LeftOut("b.txt", "why")])
    assert plan.totals(collected)[0] == 3
    assert collected.left_out == {
        "listed more than once; the first row counts": (1, "c0/00000.png"),
        "why": (2, "a.txt"),
    }
    assert plan.drop(collected, ["c0/00000.png", "nothing.png"]) == 1
    assert not plan.holds(collected, "c0/00000.png") and plan.holds(collected, "c1/00001.png")
