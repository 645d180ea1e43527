import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalecv.errors import DataError, IntegrityError
from scalecv.shards import row_groups, store
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset, read_row_group, read_rows, verify
from tests.shards.images import class_folders


def small(root: Path, **more) -> store.Dataset:
    source = class_folders(root / "source")
    options = {"row_group_mb": 0.004, "concurrency": 0, "layout": "imagefolder", **more}
    ingest(IngestOptions(source=str(source), to=str(root / "ds"), **options))
    return open_dataset(str(root / "ds"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> store.Dataset:
    return small(tmp_path_factory.mktemp("store"))


def test_row_groups_hold_every_row_as_it_came(dataset):
    rows = [row for table in read_rows(dataset.uri, dataset.manifest.shards) for row in table.to_pylist()]
    assert len(rows) == dataset.manifest.rows == 36
    source = Path(dataset.uri).parent / "source"
    for row in rows:
        assert row["image"]["bytes"] == (source / row["image"]["path"]).read_bytes()
        assert (row["width"], row["height"], row["bands"], row["format"]) == (12, 10, 3, "PNG")
        assert row["label"] == row["image"]["path"].split("/")[0] and row["mask"] is None
        assert row["group"] == row["image"]["path"] and row["nodata"] is None and len(row["id"]) == 32
    assert len({row["id"] for row in rows}) == 36
    shard = dataset.manifest.shards[0]
    assert len(shard.row_groups) == 3 and sum(shard.row_groups) == shard.rows


def test_encoded_images_lie_in_a_shard_as_they_are_and_facts_are_compressed(dataset):
    """What is compressed already is not compressed again, so a range of the shard is a row group's images."""
    shard = dataset.manifest.shards[0]
    data = (Path(dataset.uri) / shard.path).read_bytes()
    for number, (start, end) in enumerate(shard.byte_ranges):
        for image in read_row_group(dataset.uri, shard, number)["image"].to_pylist():
            assert image["bytes"] in data[start:end]
    group = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    used = {column.path_in_schema: column.compression for column in map(group.column, range(group.num_columns))}
    assert {name for name, kind in used.items() if kind != "ZSTD"} == {"image.bytes", "mask.bytes"}


def test_columns_can_be_read_alone(dataset):
    shard = dataset.manifest.shards[0]
    table = read_row_group(dataset.uri, shard, 1, ["id", "image.path"])
    whole = read_row_group(dataset.uri, shard, 1)
    assert table.column_names == ["id", "image"]
    assert table["id"] == whole["id"]
    assert [r["path"] for r in table["image"].to_pylist()] == [r["path"] for r in whole["image"].to_pylist()]


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    dataset = small(tmp_path)
    shard = dataset.manifest.shards[0]
    path = Path(dataset.uri) / shard.path
    good, groups = path.read_bytes(), range(len(shard.row_groups))

    def read() -> list[pa.Table]:
        row_groups.footers.cache_clear()
        return [read_row_group(dataset.uri, shard, i) for i in groups]

    tables, noticed, draw = read(), 0, random.Random(0)
    for _ in range(400):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            assert all(a.equals(b) for a, b in zip(read(), tables, strict=True))
        except IntegrityError as error:
            assert shard.path in str(error)
            noticed += 1
    assert noticed > 380  # the rest sits in statistics that nobody reads


def test_verify_names_the_damaged_shard_and_row_group(tmp_path):
    dataset = small(tmp_path)
    assert verify(dataset) == []
    shard = dataset.manifest.shards[-1]
    path = Path(dataset.uri) / shard.path
    good = path.read_bytes()
    place = shard.byte_ranges[0][0] + 200
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    row_groups.footers.cache_clear()
    assert verify(dataset) == [f"{shard.path} does not have the sha256 it was written with; damaged row groups: 0"]
    path.write_bytes(good[:-1])
    assert verify(dataset) == [f"{shard.path} has {len(good) - 1} bytes, {len(good)} were written"]
    path.unlink()
    assert verify(dataset) == [f"{shard.path} is gone"]
    with pytest.raises(IntegrityError, match="is gone"):
        row_groups.footers.cache_clear()
        read_row_group(dataset.uri, shard, 0)


def test_what_is_not_there_is_told_with_the_nearest_name(dataset, tmp_path):
    above = Path(dataset.uri).parent
    with pytest.raises(DataError, match=r"no dataset at .*did you mean 'ds'"):
        open_dataset(str(above / "dss"))
    with pytest.raises(DataError, match="is not a dataset: it holds class0"):
        open_dataset(str(above / "source"))
    with pytest.raises(DataError, match="has no version 3: it has 0 to 0"):
        open_dataset(dataset.uri, 3)


def test_a_damaged_manifest_is_never_believed(tmp_path):
    dataset = small(tmp_path)
    (facts,) = (Path(dataset.uri) / "_facts").glob("*.json")
    facts.write_bytes(facts.read_bytes().replace(b'"class0"', b'"class9"', 1))
    with pytest.raises(IntegrityError, match="sha256"):
        open_dataset(dataset.uri)
    facts.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        open_dataset(dataset.uri)


def test_a_commit_of_another_tool_is_not_taken_for_ours(tmp_path):
    import deltalake

    dataset = small(tmp_path)
    table = deltalake.DeltaTable(dataset.uri)
    assert table.to_pyarrow_table(columns=["id", "split", "label"]).num_rows == 36, "other tools read the table"
    table.delete("split = 'val'")
    with pytest.raises(DataError, match=r"version 1 was written by another tool.*open version 0"):
        open_dataset(dataset.uri)
    assert open_dataset(dataset.uri, 0).manifest == dataset.manifest
