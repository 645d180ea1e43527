"""Row groups that are damaged or gone: rows left out within the budget, told, the same for any number of ranks."""

import shutil
from pathlib import Path

import pytest

from scalecv.batches import ray_reader
from scalecv.batches.feed import Feed
from scalecv.batches.pixels import pixels_of
from scalecv.config import Data
from scalecv.errors import IntegrityError
from scalecv.shards import row_groups, store
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from tests.shards.images import class_folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """120 rows in row groups of 5 to 10."""
    root = tmp_path_factory.mktemp("whole")
    source = class_folders(root / "source", each=40)
    ingest(
        IngestOptions(
            source=str(source), to=str(root / "data"), layout="imagefolder", row_group_mb=0.004, concurrency=0
        )
    )
    return str(root / "data")


@pytest.fixture
def dataset(whole, tmp_path):
    row_groups.footers.cache_clear()
    return open_dataset(str(shutil.copytree(whole, tmp_path / "data")))


def damage(dataset, group=1):
    """Flip a bit in a row group of the training split; its number of rows."""
    shard = dataset.manifest.shards_of("train")[0]
    path = Path(dataset.uri) / shard.path
    data = bytearray(path.read_bytes())
    data[shard.byte_ranges[group][0] + 300] ^= 8
    path.write_bytes(data)
    return shard.row_groups[group]


def feed(dataset, **more):
    pixels = pixels_of(dataset.manifest, Data(uri=dataset.uri), dataset.uri)
    return Feed(dataset, "train", pixels, **{"batch": 16, "is_training": True, "max_bad": 0.2, **more})


def walk(one, epoch=0, start=0):
    """(position, id) of the rows that count, one id for each place; and what was left out."""
    batches = one.epoch(epoch, start)
    rows = []
    for _, batch in batches:
        valid = batch["valid"].numpy()
        assert len(batch["id"]) == len(batch["image"]) == one.batch // one.ranks
        rows += [(int(p), row) for p, row, counts in zip(batch["position"], batch["id"], valid, strict=True) if counts]
    return rows, batches.damaged


@pytest.mark.parametrize("window_mb", [256, 0], ids=["kept", "streamed"])
def test_its_rows_are_left_out_and_all_others_stay_in_place(dataset, window_mb):
    quiet, _ = walk(feed(dataset, window_mb=window_mb))
    rows = damage(dataset)
    one = feed(dataset, window_mb=window_mb)
    found, damaged = walk(one)
    assert set(found) < set(quiet) and len(found) == len(quiet) - rows
    (told,) = damaged
    assert (told.rows, told.row_group) == (rows, 1)
    assert told.shard in told.reason and "row group 1 is damaged" in told.reason
    both = [walk(feed(dataset, window_mb=window_mb, rank=rank, ranks=2))[0] for rank in (0, 1)]
    assert sorted([*both[0], *both[1]]) == sorted(found)
    assert walk(feed(dataset, window_mb=window_mb), start=3)[0] == [row for row in found if row[0] >= 3 * 16]
    again, damaged = walk(one, epoch=1)
    assert len(again) == len(found) and len(damaged) == 1, "each epoch tells what it left out"


def test_whoever_measures_is_told(dataset):
    rows = damage(dataset, group=0)
    assert rows
    with pytest.raises(IntegrityError, match="row group 0 is damaged"):
        feed(dataset).some_rows(10_000)
    with pytest.raises(IntegrityError, match="row group 0 is damaged"):
        list(feed(dataset).tables(0))


def test_a_restored_row_group_comes_back_in_the_next_epoch(dataset):
    one, path = feed(dataset), Path(dataset.uri) / dataset.manifest.shards_of("train")[0].path
    good = path.read_bytes()
    damage(dataset)
    rows = sum(shard.rows for shard in dataset.manifest.shards_of("train"))
    assert len(walk(one)[0]) < rows
    path.write_bytes(good)
    assert len(walk(one, epoch=1)[0]) == rows


def test_more_than_the_budget_is_one_clear_error(dataset):
    damage(dataset)
    with pytest.raises(
        IntegrityError, match=r"row group 1 is damaged.*data.max_bad=0.01 allows 0.*scalecv data verify"
    ):
        walk(feed(dataset, max_bad=0.01))
    (Path(dataset.uri) / dataset.manifest.shards_of("train")[0].path).unlink()
    row_groups.footers.cache_clear()
    with pytest.raises(IntegrityError, match="is gone"):
        walk(feed(dataset, max_bad=1.0))


def test_an_evaluation_never_leaves_rows_out(dataset):
    damage(dataset)
    with pytest.raises(IntegrityError, match="cannot be scored"):
        walk(feed(dataset, is_training=False, max_bad=1.0))


def test_one_bad_read_is_only_read_again(dataset, monkeypatch):
    damage(dataset)
    good, calls = store.storage.get_range, []

    def once_bad(uri, start, end, memory=None):
        data = good(uri, start, end)
        calls.append(start)
        if calls.count(start) > 1:
            data = bytearray(data)
            if len(data) > 300 and start == dataset.manifest.shards_of("train")[0].byte_ranges[1][0]:
                data[300] ^= 8  # as it was written: the damage was on the way
        return bytes(data)

    monkeypatch.setattr(store.storage, "get_range", once_bad)
    found, damaged = walk(feed(dataset))
    assert not damaged and len(found) == sum(s.rows for s in dataset.manifest.shards_of("train"))


@pytest.mark.e2e
def test_ray_data_leaves_out_the_same_rows_in_several_stretches(dataset, ray_local, monkeypatch):
    import ray

    monkeypatch.setattr(ray_reader, "FIRST_BYTES", 10_000)
    monkeypatch.setattr(ray_reader, "STRETCH_BYTES", 25_000)
    assert ray.is_initialized()
    damage(dataset)
    here, _ = walk(feed(dataset, window_mb=0))
    there, damaged = walk(feed(dataset, window_mb=0, reader="ray"))
    assert there == here and len(damaged) == 1


def test_the_order_is_walked_only_as_far_as_a_stretch_needs(dataset, monkeypatch):
    asked = []

    def wanted():
        for group in range(len(groups)):
            asked.append(group)
            yield group

    groups = feed(dataset).groups
    size = ray_reader._size(*groups[0])
    stretch = ray_reader._Stretch.__new__(ray_reader._Stretch)
    monkeypatch.setattr(ray_reader.ray.data, "read_datasource", lambda *a, **k: _Nothing())
    stretch.__init__(dataset, ((at, *groups[at]) for at in wanted()), 2 * size)
    assert len(asked) <= 3 < len(groups)


class _Nothing:
    def iter_batches(self, **_):
        return iter(())
