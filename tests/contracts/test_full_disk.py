"""A small file system that fills up: the last checkpoint stays, the error says what is missing, going on is exact."""

import os
import re
import subprocess

import pytest

from scalecv import storage
from scalecv.errors import StorageError
from scalecv.train import checkpoint
from tests.contracts import tiny_run

SIZE_BYTES = 1 << 20
pytestmark = [] if os.geteuid() == 0 else pytest.mark.chaos  # only root may mount


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.fail("no tmpfs can be mounted: run `make chaos` as root, or inside `unshare -rm`")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave_bytes):
    """A file that leaves so much room, in whole pages."""
    free = os.statvfs(folder)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - leave_bytes))
    return ballast


@pytest.mark.parametrize("pages", [0, 1, 2, 4])
def test_a_checkpoint_that_does_not_fit_changes_nothing(small_disk, pages):
    run = str(small_disk / "run")
    parts = {name: os.urandom(4000) for name in ("a", "b", "c", "d")}
    kept = checkpoint.save(run, parts, 10, 0.5)
    ballast = fill(small_disk, pages * 4096)
    with pytest.raises(StorageError) as error:
        checkpoint.save(run, {**parts, "d": os.urandom(4000)}, 20, 0.6)
    said = re.search(
        r"(\S+): no space left to write there, ([\d,]+) bytes are needed and ([\d,]+) are free", str(error.value)
    )
    assert said and said[1].startswith(run), error.value
    found, again, _ = checkpoint.newest(run)
    assert found.uri == kept.uri and again == parts
    ballast.unlink()
    checkpoint.save(run, parts, 30, 0.7)
    checkpoint.collect(run, keep=2)
    assert len(storage.list_names(f"{run}/checkpoints")) == 2, "what the failed one left is gone"


@pytest.mark.parametrize("leave_pages", [4, 10, 14, 17])
def test_going_on_after_room_was_made_gives_the_same(small_disk, tmp_path, leave_pages):
    """Checkpoints and the final bundle: the disk fills at another place of the run each time."""
    tiny_run.train(str(tmp_path / "quiet"))
    run = str(small_disk / "run")
    ballast = fill(small_disk, leave_pages * 4096)
    with pytest.raises(StorageError, match="no space left"):
        tiny_run.train(run)
    ballast.unlink()
    tiny_run.train(run)
    assert tiny_run.outcome(run)[:2] == tiny_run.outcome(str(tmp_path / "quiet"))[:2]
