import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from scalecv.artifacts import spool, tracking
from scalecv.errors import UserError
from scalecv.ui import serve_ui
from tests.servers import empty_store, free_port, wait_for


def test_it_refuses_what_would_be_open_to_others(tmp_path):
    with pytest.raises(UserError, match="no login"):
        serve_ui(f"sqlite:///{tmp_path}/m.db", "0.0.0.0", free_port())
    with pytest.raises(UserError, match="no runs yet"):
        serve_ui(f"sqlite:///{tmp_path}/m.db", "127.0.0.1", free_port())
    (tmp_path / "m.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        serve_ui(f"sqlite:///{tmp_path}/m.db", "127.0.0.1", taken.getsockname()[1])


def test_the_uri_of_a_server_is_printed_without_secrets(capsys):
    with pytest.raises(UserError, match="does not answer"):
        serve_ui(f"http://me:secret@127.0.0.1:{free_port()}")
    assert "secret" not in capsys.readouterr().out


@pytest.mark.e2e
def test_it_serves_runs_and_their_artifacts_and_leaves_nothing_behind(tmp_path):
    uri, path = empty_store(tmp_path / "mlruns.db"), tmp_path / "s"
    spool.append(path, {"kind": "text", "text": "name: a\n", "file": "experiment.yaml"})
    sender = tracking.Sender(path, tmp_path / "s.sent.json", uri, "e", "a", "k")
    assert sender.close(60)
    port = free_port()
    code = "import sys; from scalecv.ui import serve_ui; sys.exit(serve_ui(port=int(sys.argv[1])))"
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    ui = subprocess.Popen(
        [sys.executable, "-c", code, str(port)], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    place = f"http://127.0.0.1:{port}"
    try:
        ready = lambda: urllib.request.urlopen(f"{place}/health", timeout=2).status == 200  # noqa: E731
        wait_for(ready, 180, ui)
        with urllib.request.urlopen(f"{place}/get-artifact?run_uuid={sender.run_id}&path=experiment.yaml") as answer:
            assert answer.read() == b"name: a\n"
        assert "http://127.0.0.1" in ui.stderr.readline()
    finally:
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(30) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{place}/health", timeout=1)
