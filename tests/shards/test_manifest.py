"""A manifest of a million rows: what opening it and planning an epoch may cost, counted and not timed."""

import json
import tracemalloc
from dataclasses import dataclass, field

import pytest

from scalecv.batches.plan import LANES, Picks, Plan, order_key
from scalecv.errors import DataError, IntegrityError
from scalecv.shards import manifest as manifests
from scalecv.shards.store import open_dataset
from tests.reference.manifest_bench import write


@dataclass(frozen=True)
class Counted(Plan):
    """A plan that counts how often it is asked for rows."""

    asked: list[int] = field(default_factory=list)

    def picks(self, step: int, rank: int = 0, ranks: int = 1) -> Picks:
        self.asked.append(step)
        return super().picks(step, rank, ranks)


def test_a_million_rows_open_and_are_planned_in_little_memory(tmp_path):
    encoded_bytes = write(tmp_path / "ds", 1_000_000, 27_000)
    tracemalloc.start()
    try:
        dataset = open_dataset(str(tmp_path / "ds"))
        opened, peak = tracemalloc.get_traced_memory()
        groups = sum(len(shard.row_groups) for shard in dataset.manifest.shards)
        assert dataset.manifest.rows == 1_000_000 and groups > 6_000
        assert opened < 500 * groups, "a row group costs a hash, a range and a count, a row nothing"
        assert peak < opened + 4 * encoded_bytes, "no second copy as a tree"
        tracemalloc.reset_peak()
        counts = tuple(count for shard in dataset.manifest.shards for count in shard.row_groups)
        plan = Counted(counts, 1024, order_key(dataset.manifest.fingerprint, "train", 0, 0), True, 10_000)
        step, fetch, _ = next(plan.reads(0, 3, 8))
        assert (step, plan.asked) == (0, [0]), "an epoch is not walked before its first batch"
        assert 0 < len(fetch) <= 128 and len(plan._windows) <= LANES
        _, peak = tracemalloc.get_traced_memory()
        assert peak - opened < 5e6, "no array as long as the epoch, which would be 8 MB"
    finally:
        tracemalloc.stop()


def test_manifests_of_older_releases_open_and_others_are_told(tmp_path):
    write(tmp_path / "ds", 5_000, 27_000)
    manifest = open_dataset(str(tmp_path / "ds")).manifest
    assert manifests.decode(manifests.encode(manifest), "here") == manifest
    tree = json.loads(manifests.encode(manifest))
    for shard in tree["shards"]:
        del shard["group_sha256"], shard["footer_sha256"]
    older = manifests.decode(json.dumps(tree).encode(), "here")
    assert older.fingerprint == manifest.fingerprint and older.shards[0].group_sha256 == ()
    with pytest.raises(DataError, match="manifest format 2, this scalecv reads 1"):
        manifests.decode(json.dumps(tree | {"format": 2}).encode(), "here")
    with pytest.raises(DataError, match="manifest format 2"):
        manifests.decode(b'{"format": 2, "other": []}', "here")
    wrong = json.dumps(tree | {"classes": ["a", "c"]}).encode()
    for damaged in (b"", b"[]", b"{", b"[" * 5_000, b"\xff", json.dumps(tree).encode()[:-9], wrong):
        with pytest.raises(IntegrityError):
            manifests.decode(damaged, "here")
