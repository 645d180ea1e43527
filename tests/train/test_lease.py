"""Who owns a run's name, without trusting any clock."""

import json
import time

import pytest

from scalecv import storage
from scalecv.errors import ConfigError, ScalecvError, UserError
from scalecv.train import lease, runs


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)


def elsewhere(uri, renewal=0, **told):
    """A lease that a process of another machine wrote."""
    ticket = {"nonce": "theirs", "host": "elsewhere/1/2", "pid": 7, "started": "9", "renewal": renewal, **told}
    storage.put(uri, json.dumps(ticket).encode())


@pytest.mark.parametrize("renewed", [0.0, 1e12, -1e12])
def test_a_lease_of_another_machine_is_taken_after_it_stood_still_whatever_its_clock_says(renewed, quick, tmp_path):
    uri, said = str(tmp_path / "lease.json"), []
    elsewhere(uri, renewed=renewed)
    began = time.monotonic()
    with lease.hold(uri, "a", said.append) as held:
        assert time.monotonic() - began >= 1.0
        assert json.loads(storage.get(uri))["nonce"] == held.nonce
    assert len(said) == 1 and "process 7 on elsewhere" in said[0]
    assert not storage.exists(uri)


def test_one_renewal_means_that_the_owner_lives(quick, tmp_path, monkeypatch):
    uri, real = str(tmp_path / "lease.json"), time.sleep
    elsewhere(uri)

    def sleep(seconds):
        elsewhere(uri, renewal=time.monotonic())
        real(seconds)

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with pytest.raises(UserError, match=r"name=a is being trained by process 7 on elsewhere") as refused:
        with lease.hold(uri, "a"):
            pass
    assert "\n" not in str(refused.value) and json.loads(storage.get(uri))["nonce"] == "theirs"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"host": 7, "pid": "x"}'])
def test_a_damaged_lease_is_taken_like_one_of_another_machine(data, quick, tmp_path):
    uri = str(tmp_path / "lease.json")
    storage.put(uri, data)
    with lease.hold(uri, "a"):
        pass


def test_whoever_lost_its_lease_stops_with_one_clear_error(quick, tmp_path):
    uri = str(tmp_path / "lease.json")
    began = time.monotonic()
    with pytest.raises(ScalecvError, match=r"name=a was taken over by process 7 on elsewhere") as lost:
        with lease.hold(uri, "a"):
            elsewhere(uri)
            time.sleep(30)  # the training
    assert time.monotonic() - began < 10 and lost.value.exit_code == 1
    assert json.loads(storage.get(uri))["nonce"] == "theirs"  # it stays the other's


def test_a_lease_that_somebody_removed_is_written_again(quick, tmp_path):
    uri = str(tmp_path / "lease.json")
    with lease.hold(uri, "a"):
        storage.delete([uri])
        ends = time.monotonic() + 10
        while not storage.exists(uri):
            assert time.monotonic() < ends
            time.sleep(0.02)


def test_a_secret_in_a_key_that_counts_is_refused_before_anything_is_written(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-value-1")
    experiment = shapes(model__args={"token": "planted-value-1"})
    with pytest.raises(ConfigError, match=r"model.args.token holds the value of HF_TOKEN") as refused:
        runs.open_run(experiment, lambda _: None)
    assert "planted-value-1" not in str(refused.value) and not (tmp_path / "runs").exists()
    runs.open_run(shapes(model__args={"use_cls_token": True}), lambda _: None)


def test_one_node_and_object_storage_need_no_look(tmp_path):
    runs.check_shared(str(tmp_path), ["one"])
    runs.check_shared("s3://bucket/runs", ["one", "two"])


@pytest.mark.e2e
def test_a_node_that_does_not_see_the_folder_is_named(ray_local, tmp_path):
    import ray

    here = ray.nodes()[0]["NodeID"]
    (tmp_path / "kept").touch()
    runs.check_shared(str(tmp_path), [here, here])
    with pytest.raises(ConfigError, match=r"is a path of this machine, and 1 of 2 nodes do not see .*abababababab"):
        runs.check_shared(str(tmp_path), [here, "ab" * 28])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
