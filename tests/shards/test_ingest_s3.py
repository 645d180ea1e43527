"""Ingest with Ray Data from and to a real S3 server."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scalecv import storage
from scalecv.errors import DataError, StorageDenied
from scalecv.shards import store
from scalecv.shards.ingest import IngestOptions, Progress, ingest
from scalecv.shards.store import open_dataset
from scalecv.testing.servers import S3Server
from tests.shards.images import write
from tests.shards.test_ingest import TRACK, run

pytestmark = pytest.mark.e2e


def upload(folder: Path, uri: str) -> str:
    with ThreadPoolExecutor(16) as pool:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        list(pool.map(lambda n: storage.put(storage.join(uri, n), (folder / n).read_bytes()), names))
    return uri


def test_a_bucket_and_a_folder_give_the_same_dataset(s3: S3Server, ray_local: None, shared_data, tmp_path):
    bucket = s3.bucket()
    source = upload(shared_data("gtsrb"), f"{bucket}/raw/gtsrb")
    options = {"layout": "imagefolder", "group": TRACK, "shard_mb": 1}
    steps: list[Progress] = []
    remote = ingest(IngestOptions(source=source, to=f"{bucket}/ds", **options), steps.append)
    local = run(shared_data("gtsrb"), tmp_path / "ds", group=TRACK, shard_mb=1)
    assert remote.fingerprint == local.fingerprint and remote.rows == 2069
    assert len({s.rows for s in steps if s.phase == "ingesting"}) > 3, "progress comes while units finish"
    dataset = open_dataset(f"{bucket}/ds")
    assert store.verify(dataset) == []
    shard = dataset.manifest.shards[0]
    there = store.read_row_group(dataset.uri, shard, 0)
    assert there.equals(store.read_row_group(local.dataset, shard, 0))
    assert not [e.path for e in storage.list_entries(dataset.uri) if e.path.startswith("_ingest")]

    again = ingest(IngestOptions(source=source, to=f"{bucket}/ds", **options))
    assert (again.version, again.new_rows) == (0, 0)
    storage.put(f"{source}/train/00000/new_1.png", storage.get(f"{source}/test/00000/00403.png"))
    more = ingest(IngestOptions(source=source, to=f"{bucket}/ds", append=True, **options))
    assert (more.version, more.new_rows, more.rows) == (1, 1, 2070)

    path = storage.join(dataset.uri, shard.path)
    good = storage.get(path)
    storage.put(path, good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    assert [p.split(" ")[0] for p in store.verify(open_dataset(dataset.uri))] == [shard.path]


def test_names_of_any_letters_come_through(s3: S3Server, tmp_path, shared_data):
    data = (shared_data("bad") / "schild_ä 日本 (1).png").read_bytes()
    names = [f"cläss #{c}/schild_ä 日本 ({i})%20+&.png" for c in range(2) for i in range(5)]
    for name in names:
        write(tmp_path / "s", name, data + name.encode())
    bucket = s3.bucket()
    remote = run(upload(tmp_path / "s", f"{bucket}/s"), f"{bucket}/ds")
    assert remote.fingerprint == run(tmp_path / "s", tmp_path / "ds").fingerprint
    assert remote.classes == ("cläss #0", "cläss #1")


def test_missing_buckets_and_wrong_keys_are_one_clear_error(s3: S3Server, tmp_path, monkeypatch):
    bucket = s3.bucket()
    write(tmp_path, "s/a/1.png", b"x")
    with pytest.raises(StorageDenied, match="no such bucket"):
        run("s3://no-such-bucket-at-all/x", tmp_path / "ds")
    with pytest.raises(StorageDenied, match="no such bucket"):
        run(tmp_path / "s", "s3://no-such-bucket-at-all/x")
    with pytest.raises(DataError, match="is empty"):
        run(f"{bucket}/nothing", tmp_path / "ds")
    with pytest.raises(DataError, match="no dataset at"):
        open_dataset(f"{bucket}/ds")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for source, target in ((f"{bucket}/x", tmp_path / "ds"), (tmp_path / "s", f"{bucket}/x")):
        with pytest.raises(StorageDenied, match="credentials") as caught:
            run(source, target)
        assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value) and "wrong" not in str(caught.value)
