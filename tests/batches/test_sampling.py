"""Rows drawn more often: in planned windows, the same for any number of ranks, each draw with another augmentation."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.batches.plan import Plan
from scalecv.batches.sampling import limited
from scalecv.batches.strata import STEPS, Strata, weights
from scalecv.config import Augment, Data, Sampling
from scalecv.errors import ConfigError, DataError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.manifest import RowFacts
from scalecv.shards.row_facts import classes_of, foreground_of
from scalecv.shards.store import open_dataset, verify
from scalecv.train.checks import check
from tests.batches.test_plan import groups_of, walk
from tests.small import fields, fields_dataset  # noqa: F401 - fixtures

SIZES = {"car": 120, "bus": 24, "tram": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """150 pictures of three classes, sorted by class, in two versions: the trams came later."""
    root = tmp_path_factory.mktemp("classes")
    for name in ("car", "bus", "tram"):
        file = root / "images" / "val" / name / "v.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (8, 8, 3), np.uint8)).save(file)
    for number, (name, rows) in enumerate(SIZES.items()):
        for row in range(rows):
            file = root / "images" / "train" / name / f"{row:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([number, row]).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(noise).save(file)
        options = {"source": str(root / "images"), "to": str(root / "data"), "layout": "imagefolder"}
        if name != "car":
            ingest(IngestOptions(**options, concurrency=0, row_group_mb=0.004, append=name == "tram"))
    return str(root / "data")


def feed(dataset, **more):
    augment = more.pop("augment", {})
    pixels = pixels_of(dataset.manifest, Data(uri=dataset.uri, augment=augment), dataset.uri)
    return Feed(dataset, "train", pixels, **{"batch": 16, "is_training": True, **more})


def drawn(one, epoch=0):
    """Rows of an epoch by position: (id, first pixels)."""
    rows = {}
    for _, batch in one.epoch(epoch):
        for at, row, image, valid in zip(batch["position"], batch["id"], batch["image"], batch["valid"], strict=True):
            if valid:
                rows[int(at)] = (row, image.numpy().tobytes(), batch)
    return [rows[at][:2] for at in sorted(rows)]


def test_facts_of_rows_stand_in_the_order_of_the_shards(folders, fields_dataset):  # noqa: F811
    dataset = open_dataset(folders)
    assert verify(dataset) == []
    found = Counter(dataset.manifest.classes[c] for c in classes_of(dataset, "train"))
    assert found == SIZES, "those of the first version too"
    by_row = {}
    for table in feed(dataset).tables(0):
        by_row.update(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    ids = [row for one in feed(dataset)._all_groups for row in _ids(dataset, one)]
    assert [by_row[row] for row in ids] == [dataset.manifest.classes[c] for c in classes_of(dataset, "train")]
    tiles = open_dataset(fields_dataset)
    shares = foreground_of(tiles, "train")
    total = tiles.manifest.class_counts["train"]
    assert shares.mean() == pytest.approx(total["1"] / sum(total.values()))
    assert (shares == 0).any() and (shares > 0).any()


def _ids(dataset, group):
    from scalecv.shards.store import read_row_group

    return read_row_group(dataset.uri, *group, ["id"])["id"].to_pylist()


def test_a_dataset_without_facts_of_rows_names_ingest(folders, fields):  # noqa: F811
    dataset = open_dataset(folders)
    older = dataset.manifest.model_copy(update={"row_facts": RowFacts()})
    experiment = fields(task="classify", data__uri=folders, data__limit=5, model__arch="resnet18", model__encoder="")
    with pytest.raises(DataError, match="scalecv ingest"):
        check(experiment, older)
    check(experiment, dataset.manifest)
    with pytest.raises(ConfigError, match=r"positive=0\.5 needs masks"):
        check(
            fields(task="classify", data__uri=folders, data__sampling__positive=0.5, model__arch="resnet18"),
            dataset.manifest,
        )


@pytest.mark.parametrize("window", [1 << 40, 900], ids=["one window", "lanes"])
def test_half_of_the_draws_are_positive_and_ranks_share_them(window):
    kinds = (np.random.default_rng(0).random(20_000) < 0.03).astype(np.uint16)
    strata = Strata(kinds, weights(np.bincount(kinds), np.array([0.5, 0.5]), 100.0))
    plan = Plan(groups_of(20_000, 50), 64, "key", True, window, strata)
    once = walk(plan, 1)
    assert len(once) == 20_000, "an epoch has as many draws as rows"
    assert np.mean([kinds[group * 50 + row] for _, group, row in once]) == pytest.approx(0.5, abs=0.01)
    assert walk(plan, 2) == once and walk(plan, 4) == once
    assert walk(plan, 2, start=100) == [row for row in once if row[0] >= 6400]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    size=st.integers(1, 60),
    batch=st.sampled_from([4, 16, 36]),
    window=st.integers(1, 400),
    seed=st.integers(0, 9),
    each=st.lists(st.integers(0, 20 * STEPS), min_size=3, max_size=3).filter(any),
)
def test_each_row_is_drawn_floor_or_ceil_of_its_part_and_each_draw_has_a_number(rows, size, batch, window, seed, each):
    kinds = np.random.default_rng(seed).integers(0, 3, rows).astype(np.uint16)
    kinds[0] = int(np.argmax(each))
    weight = np.array(each)[kinds]
    plan = Plan(groups_of(rows, size), batch, f"key {seed}", True, window, Strata(kinds, np.array(each)))
    drawn = []
    for step in range(plan.steps):
        p = plan.picks(step)
        drawn += list(zip((p.group * size + p.row)[p.valid].tolist(), p.draw[p.valid].tolist(), strict=True))
    assert len(set(drawn)) == len(drawn) == rows, "no draw comes twice"
    times = np.bincount([row for row, _ in drawn], minlength=rows)
    assert (np.abs(times - weight * rows / weight.sum()) < 1 + 1e-9).all()
    assert all(again < times[row] for row, again in drawn)
    assert walk(plan, 2) == walk(plan, 1) == walk(plan, 4)


def test_the_order_of_draws_is_frozen():
    kinds = (np.arange(400) % 10 == 0).astype(np.uint16)
    strata = Strata(kinds, weights(np.bincount(kinds), np.array([0.5, 0.5]), 100.0))
    picks = Plan(groups_of(400, 20), 16, "frozen", True, 100, strata).picks(3)
    # Where these numbers change, runs cannot go on: checkpoint.FORMAT changes with them.
    assert list(zip(picks.group.tolist(), picks.row.tolist(), picks.draw.tolist(), strict=True)) == FROZEN


def test_a_rare_kind_is_not_drawn_beyond_reason():
    assert weights(np.array([999_999, 1]), np.array([0.5, 0.5]), 100.0)[1] == 100 * STEPS
    counts = np.array([19_000, 4, 0, 996])
    each = weights(counts, np.array([0.1, 0.6, 0.2, 0.1]), 10.0)
    assert each[1] == each[3] == 10 * STEPS, "what one may not have goes to the others, up to their own limit"
    assert int((each * counts).sum()) == pytest.approx(counts.sum() * STEPS, rel=1e-4), "as many draws as rows"


def test_classes_come_equally_often_and_each_draw_looks_different(folders):
    dataset = open_dataset(folders)
    one = feed(dataset, sampling=Sampling(balance=1.0), augment=Augment(rotate_deg=90, brightness=0.5))
    names = {row: dataset.manifest.classes[c] for row, c in _classes(dataset).items()}
    rows = drawn(one)
    counts = Counter(names[row] for row, _ in rows)
    assert set(counts) == set(SIZES) and all(abs(count - 50) < 8 for count in counts.values())
    assert len({row for row, _ in rows}) < len({pixels for _, pixels in rows}) == 150
    assert drawn(one) == rows and drawn(one, 1) != rows
    both = [drawn(feed(dataset, rank=r, ranks=2, sampling=one.sampling, augment=one.pixels.augment)) for r in (0, 1)]
    assert sorted(both[0] + both[1]) == sorted(rows)


def _classes(dataset):
    ids = [row for one in feed(dataset)._all_groups for row in _ids(dataset, one)]
    return dict(zip(ids, classes_of(dataset, "train").tolist(), strict=True))


def test_a_subset_of_a_class_sorted_source_holds_every_class_in_its_share(folders):
    """`range(1000)` of such a source would be one class."""
    dataset = open_dataset(folders)
    kinds = _classes(dataset)
    one = feed(dataset, limit=30)
    rows = [row for row, _ in drawn(one)]
    assert len(rows) == len(set(rows)) == one.rows == 30
    assert Counter(dataset.manifest.classes[kinds[row]] for row in rows) == {"car": 23, "bus": 5, "tram": 2}, (
        "largest remainder, one each first"
    )
    assert {row for row, _ in drawn(one, 3)} == set(rows), "the same in each epoch"
    assert {row for row, _ in drawn(feed(dataset, limit=30, seed=1))} != set(rows)
    assert len(drawn(feed(dataset, limit=1000))) == 150
    assert len(one.groups) <= len(one._all_groups)
    few = limited(np.array([0] * 9 + [1]), [5, 5], 2, "key")
    assert sorted(np.array([0] * 9 + [1])[few]) == [0, 1], "one of each kind at least"


def test_a_limit_and_sampling_go_together(folders):
    dataset = open_dataset(folders)
    rows = drawn(feed(dataset, limit=40, sampling=Sampling(balance=0.5)))
    assert len(rows) == 40 and len({row for row, _ in rows}) < 40


def test_tiles_with_foreground_make_up_what_was_asked(fields_dataset):  # noqa: F811
    dataset = open_dataset(fields_dataset)
    positive = dict(
        zip(
            [row for one in feed(dataset)._all_groups for row in _ids(dataset, one)],
            foreground_of(dataset, "train") > 0,
            strict=True,
        )
    )
    rows = drawn(feed(dataset, batch=6, sampling=Sampling(positive=0.25)))
    assert sum(positive[row] for row, _ in rows) in range(3, 7) and len(rows) == 18
    with pytest.raises(DataError, match=r"0 of 18 training images have more than 0\.9 of"):
        feed(dataset, sampling=Sampling(positive=0.5, min_share=0.9)).plan(0)


FROZEN = [
    (19, 0, 3),
    (5, 8, 0),
    (8, 10, 3),
    (12, 17, 0),
    (16, 0, 3),
    (15, 8, 0),
    (2, 10, 3),
    (6, 0, 0),
    (3, 1, 0),
    (13, 8, 0),
    (17, 13, 0),
    (7, 18, 0),
    (14, 1, 0),
    (9, 8, 0),
    (11, 10, 3),
    (1, 18, 0),
]
