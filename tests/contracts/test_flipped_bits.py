"""Single flipped bits in checkpoints and shards: every one is noticed before its bytes are used."""

import random
from pathlib import Path

import pytest

from scalecv.errors import IntegrityError
from scalecv.shards import row_groups, store
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.train import checkpoint
from tests.contracts import tiny_run
from tests.shards.images import class_folders

FLIPS = 2000


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_in_checkpoints(tmp_path):
    tiny_run.train(str(tmp_path))
    newest, before = checkpoint.complete(str(tmp_path))[0][:2]
    files = [Path(newest.uri, name) for name in (*newest.parts, checkpoint.MANIFEST)]
    draw = random.Random(0)
    for number in range(FLIPS):
        path = files[number % len(files)]
        good = path.read_bytes()
        path.write_bytes(flipped(good, draw.randrange(8 * len(good))))
        found, parts, skipped = checkpoint.newest(str(tmp_path))
        assert found.uri == before.uri and parts, f"flip {number} in {path.name} was not noticed"
        assert len(skipped) == 1 and newest.uri in skipped[0]
        path.write_bytes(good)
    assert checkpoint.newest(str(tmp_path))[0].uri == newest.uri


def test_in_shards(tmp_path):
    ingest(
        IngestOptions(
            source=str(class_folders(tmp_path / "source")),
            to=str(tmp_path / "data"),
            layout="imagefolder",
            row_group_mb=0.004,
            concurrency=0,
        )
    )
    dataset = store.open_dataset(str(tmp_path / "data"))
    shard = dataset.manifest.shards[0]
    path = Path(dataset.uri) / shard.path
    good, draw = path.read_bytes(), random.Random(0)
    starts = [start for start, _ in shard.byte_ranges]
    for _ in range(FLIPS):
        bit = draw.randrange(8 * starts[0], 8 * len(good))
        group = sum(start * 8 <= bit for start in starts) - 1
        if bit >= 8 * (len(good) - shard.footer_bytes):
            row_groups.footers.cache_clear()
        path.write_bytes(flipped(good, bit))
        with pytest.raises(IntegrityError, match=shard.path):
            store.read_row_group(dataset.uri, shard, group)
    for bit in range(8 * starts[0]):  # magic that training does not read
        path.write_bytes(flipped(good, bit))
        assert store.verify(dataset, threads=1)
    path.write_bytes(good)
    row_groups.footers.cache_clear()
    assert store.verify(dataset) == []
