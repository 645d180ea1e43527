import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scalecv import storage, storage_remote
from scalecv.errors import IntegrityError, StorageDenied, StorageError, UserError


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.e2e)])
def place(request, tmp_path):
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3").bucket()


def test_what_is_put_is_there_whole(place):
    uri = storage.join(place, "a", "b.bin")
    assert storage.head(uri) is None and not storage.exists(uri)
    storage.put(uri, b"first")
    storage.put(uri, memoryview(b"second!"))
    assert storage.get(uri) == b"second!"
    assert storage.head(uri).size_bytes == 7
    assert storage.get_range(uri, 1, 4) == b"eco"
    with pytest.raises(FileNotFoundError):
        storage.get(storage.join(place, "a", "c.bin"))


def test_other_bytes_than_were_written_are_noticed(place):
    uri = storage.join(place, "x")
    storage.put(uri, b"hello")
    with pytest.raises(IntegrityError, match="has 5 bytes, 6"):
        storage.get(uri, 6)
    with pytest.raises(IntegrityError, match="sha256"):
        storage.get(uri, 5, "0" * 64)
    with pytest.raises(IntegrityError):
        storage.get_range(uri, 3, 9)


def test_put_if_absent_lets_one_writer_win(place):
    uri = storage.join(place, "claim")
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if storage.put_if_absent(uri, b"%d" % i) else None)
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and storage.get(uri) == b"%d" % won[0]


def test_put_if_match_refuses_a_changed_object(place):
    uri = storage.join(place, "state")
    storage.put(uri, b"1")
    etag = storage.head(uri).etag
    assert storage.put_if_match(uri, b"22", etag)
    assert not storage.put_if_match(uri, b"333", etag)
    assert storage.get(uri) == b"22"


def test_listing_has_one_order_everywhere_and_hides_dot_files(place):
    names = ["b/1.png", "b-1.png", "b.png", "a/z/1.png", "schild_ä 日本 (1).png", "c d/#%+&=~.png", ".hidden/x", "e/.y"]
    for name in names:
        storage.put(storage.join(place, name), name.encode())
    found = [e.path for e in storage.list_entries(place)]
    expected = sorted([n for n in names if not any(p.startswith(".") for p in n.split("/"))], key=str.encode)
    assert sorted(found, key=str.encode) == expected
    assert found == expected or place.startswith("s3://")  # SeaweedFS sorts folder by folder
    assert all(storage.get(storage.join(place, path)) == path.encode() for path in found)
    assert [e.path for e in storage.list_entries(storage.join(place, "b"))] == ["1.png"]
    assert {"a", "b", "b.png", "c d"} <= set(storage.list_names(place))


def test_deleting_what_is_not_there_is_no_error(place):
    uris = [storage.join(place, "gone", str(i)) for i in range(5)]
    for uri in uris[:3]:
        storage.put(uri, b"x")
    storage.delete(uris)
    assert not any(storage.exists(uri) for uri in uris)


@pytest.mark.e2e
def test_wrong_keys_and_missing_buckets_are_told_at_once(s3, monkeypatch):
    bucket = s3.bucket()
    with pytest.raises(StorageDenied, match="no such bucket"):
        storage.list_names("s3://no-such-bucket-here")
    with pytest.raises(StorageDenied, match="no such bucket"):
        list(storage.list_entries("s3://no-such-bucket-here/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for call in (
        lambda: storage.put(f"{bucket}/x", b""),
        lambda: storage.get(f"{bucket}/x"),
        lambda: storage.head(f"{bucket}/x"),
        lambda: storage.list_names(bucket),
        lambda: list(storage.list_entries(bucket)),
        lambda: storage.check_writable(bucket),
    ):
        with pytest.raises(StorageDenied, match=r"access denied|credentials"):
            call()


def test_a_store_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("SCALECV_STORAGE_GIVE_UP_S", "1")
    with pytest.raises(StorageError, match="no good answer for 1 s"):
        storage.get("s3://bucket/x")


@pytest.mark.parametrize("endpoint", ["htp:/x", "localhost:9000"])
def test_an_endpoint_that_is_no_url_is_refused(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageDenied, match="AWS_ENDPOINT_URL"):
        storage.get("s3://bucket/x")


def test_unknown_schemes_and_inline_secrets_are_refused():
    with pytest.raises(UserError, match="scheme 'http'"):
        storage.get("http://host/x")
    with pytest.raises(UserError, match="credentials come from the environment"):
        storage.get("s3://key:secret@bucket/x")
    assert storage.without_secrets("s3://key:secret@bucket/x?sig=1") == "s3://bucket/x"
    with pytest.raises(UserError, match=r"s3://\[bucket: expected s3://BUCKET/PATH"):
        storage.get("s3://key:secret@[bucket/x?sig=1")


def test_a_full_disk_is_one_clear_error_and_leaves_no_part(tmp_path):
    code = (
        "import resource, signal, sys; from scalecv import storage; from scalecv.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: storage.put(sys.argv[1], bytes(5000))\n"
        "except StorageError as error: print(error)"
    )
    uri = str(tmp_path / "x.bin")
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True)
    assert f"{uri}: no space left" in done.stdout and "5,000 bytes are needed" in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageDenied, match="check the path"):
        storage.put(str(tmp_path / "file" / "x"), b"")


class Generations(BaseHTTPRequestHandler):
    """Answers like Google's store for one object of generation 77, and keeps what it was asked under."""

    protocol_version = "HTTP/1.1"
    conditions: list = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer("77", 1)

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.conditions.append(self.headers.get("x-goog-if-generation-match"))
        self._answer("78", 0)

    def _answer(self, generation, length):
        self.send_response(200)
        told = {"Content-Length": length, "ETag": '"e"', "x-goog-generation": generation}
        for name, value in (told | {"Last-Modified": "Sat, 21 Nov 2026 10:00:00 GMT"}).items():
            self.send_header(name, str(value))
        self.end_headers()


def test_google_is_asked_by_generation(monkeypatch):
    from obstore.store import GCSStore

    server = ThreadingHTTPServer(("127.0.0.1", 0), Generations)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = {"gcs_base_url": f"http://127.0.0.1:{server.server_address[1]}", "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    store = GCSStore("b", client_options={"allow_http": True}, config={"service_account_key": json.dumps(key)})
    monkeypatch.setattr(storage_remote, "_store", lambda place: store)
    assert storage.put_if_match("gs://b/x", b"2", storage.head("gs://b/x").etag)
    assert storage.put_if_absent("gs://b/y", b"1")
    server.shutdown()
    assert Generations.conditions == ["77", "0"]


def test_a_place_that_cannot_be_reached_holds_nothing(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"x")
    for place in ("none", "loop", "loop/below", "file", "file/below", "n" * 300):
        assert storage.list_names(str(tmp_path / place)) == []
