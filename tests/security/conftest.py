"""A guard around every hostile file: nothing of it runs, writes outside its folder, or connects to anybody."""

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest

CANARY = "scalecv_canary"
EXECUTED = (
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.startfile subprocess.Popen pty.spawn "
    "pickle.find_class ctypes.dlopen code.__new__ webbrowser.open"
).split()
CONNECTED = "socket.connect socket.getaddrinfo socket.gethostbyname socket.sendto urllib.Request ftplib.connect".split()
CHANGED = "os.mkdir os.remove os.rmdir os.rename os.link os.symlink os.chmod os.truncate shutil.rmtree".split()


class Watch:
    """What the process did while a hostile file was looked at."""

    def __init__(self) -> None:
        self.on = False
        self.inside: tuple[str, ...] = ()
        self.executed: list[str] = []
        self.connected: list[str] = []
        self.written: list[str] = []

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in EXECUTED or (event == "import" and str(args[0]).startswith(CANARY)):
            self.executed.append(f"{event} {args[:2]}")
        elif event in CONNECTED:
            self.connected.append(f"{event} {args[1:]}")
        elif event in CHANGED:
            self._changes(args[0])
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._changes(args[0])

    def _changes(self, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if not place.startswith(self.inside) and "__pycache__" not in place and place != "/dev/null":
                self.written.append(place)


_watch = Watch()
sys.addaudithook(_watch.hook)


class Listener:
    """Counts who connects, also from code that Python's audit does not see."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.count = 0
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            self.count += 1
            near.close()


@pytest.fixture(scope="session")
def listener():
    listening = Listener()
    yield listening
    listening.server.close()


@pytest.fixture(scope="session", autouse=True)
def warm():
    """What the first use of a library imports and looks up is not the hostile file's doing."""
    import rasterio
    import timm  # noqa: F401
    import torch

    from scalecv.models import build_model
    from tests.security import hostile

    build_model("resnet10", in_channels=3, outputs=2)
    build_model("unet", in_channels=3, outputs=2)
    build_model("timm/resnet18", in_channels=3, outputs=2)
    torch.load(hostile.saved({"a": torch.zeros(1)}), weights_only=True)
    return rasterio


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that says when it is imported."""
    (tmp_path / f"{CANARY}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return CANARY


@pytest.fixture
def watched(tmp_path, tmp_path_factory, listener, monkeypatch):
    """Watches one test; a hostile name of a file leads to `tmp_path`, where the file must not be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = listener.count
    _watch.__init__()
    _watch.inside = (os.path.realpath(tmp_path),)
    _watch.on = True
    try:
        yield _watch
    finally:
        _watch.on = False
    assert _watch.executed == [] and _watch.connected == [] and _watch.written == []
    assert listener.count == before
    assert not (Path(tmp_path) / "PWNED").exists()
