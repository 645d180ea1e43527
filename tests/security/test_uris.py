"""Every door that takes a URI: what is neither a path nor s3, gs or az is refused before anybody is asked."""

import pytest
import torch

from scalecv import doctor, storage
from scalecv.artifacts import bundle, tracking
from scalecv.errors import UserError
from scalecv.models.weights import load_weights
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.store import open_dataset
from scalecv.sources.csv_table import csv_table
from scalecv.submit import submit

# L is the address of a listener that counts who connects.
URIS = [
    "http://L/x",
    "https://L/x",
    "HTTP://L/x",
    "ftp://L/x",
    "file://L/etc/passwd",
    "file://etc/passwd",
    "file:http://L/x",
    "/vsicurl/http://L/x.tif",
    "/vsis3/bucket/x",
    "/vsizip/vsicurl/http://L/x.zip",
    "s3://me:planted-pw@L/x",
    "s3://me@L/x",
    "s3://bucket@L/x",
    "s3://b/x?endpoint=http://L",
    "s3://b/x?X-Amz-Signature=planted-pw",
    "s3://b#http://L/x",
    "s3:///x",
    "s3://",
    "s3a://b/x",
    "az://account/c?sv=1&sig=planted-pw",
    "gs://b/x?token=planted-pw",
    "hf://evil/model",
    "s3:/b/x",
    "x\x00/etc/passwd",
    "s3://b/x\r\nHost: L",
]
DOORS = {
    "storage.get": lambda uri, to: storage.get(uri),
    "storage.put": lambda uri, to: storage.check_writable(uri),
    "dataset": lambda uri, to: open_dataset(uri),
    "bundle": lambda uri, to: bundle.open_bundle(uri),
    "weights": lambda uri, to: load_weights(torch.nn.Linear(1, 1), uri),
    "source": lambda uri, to: ingest(IngestOptions(source=uri, to=to, layout="imagefolder", concurrency=0)),
    "target": lambda uri, to: ingest(IngestOptions(source=to, to=uri, layout="imagefolder", concurrency=0)),
    "table": lambda uri, to: list(csv_table(uri + "/x.csv")),
}


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("door", DOORS)
def test_a_strange_uri_is_refused_at_every_door(door, uri, watched, listener, tmp_path):
    (tmp_path / "to").mkdir()
    given = uri.replace("L", listener.url.removeprefix("http://"))
    with pytest.raises(UserError) as refused:
        DOORS[door](given, str(tmp_path / "to"))
    assert "planted-pw" not in str(refused.value)


@pytest.mark.parametrize("uri", ["data:image/png;base64,AAAA", "jdbc:sqlite:x", "a?b#c/@d", "C:/x"])
def test_an_odd_path_is_a_path_of_this_folder(uri, watched, tmp_path):
    storage.put(uri, b"1")
    assert storage.absolute(uri) == str(tmp_path / uri) and storage.get(uri) == b"1"


@pytest.mark.parametrize(
    "uri", ["file:///x", "ftp://L/x", "mlruns", "javascript:x", "sqlite://", "http://", "s3://b/x", "\x00"]
)
def test_a_tracking_uri_of_another_kind_is_refused(uri, watched, listener):
    with pytest.raises(UserError):
        tracking.tracking_uri(uri.replace("L", listener.url.removeprefix("http://")))


@pytest.mark.parametrize(
    "address", ["ray://L", "file:///etc/passwd", "ftp://L", "http://me:planted-pw@L", "L", "//L", "unix:///x"]
)
def test_the_address_of_a_job_server_is_http_without_a_login(address, watched, listener):
    with pytest.raises(UserError, match="job server") as refused:
        submit(["schema"], address.replace("L", listener.url.removeprefix("http://")))
    assert "planted-pw" not in str(refused.value)


@pytest.mark.parametrize("uri", ["ftp://h/x", "s3://me:planted-pw@h/x", "http://h/x?sig=planted-pw"])
def test_doctor_says_it_without_the_secret(uri, watched):
    found = doctor._looked("storage", lambda: doctor._storage(uri))
    assert found.ok is False and "planted-pw" not in str(found)
