import json
import multiprocessing
import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from scalecv.artifacts import spool


def test_events_come_back_in_order_and_once(tmp_path):
    path = tmp_path / "new" / "spool.jsonl"
    for step in range(5):
        spool.append(path, {"kind": "metrics", "step": step, "metrics": {"train/loss": 1.0 / (step + 1)}})
    first, offset = spool.read(path)
    assert [e["step"] for e in first] == [0, 1, 2, 3, 4]
    assert first[2]["metrics"] == {"train/loss": 1 / 3} and first[2]["time_ms"] > 1_600_000_000_000
    assert spool.read(path, offset) == ([], offset)
    spool.append(path, {"kind": "end", "status": "FINISHED"})
    assert [e["kind"] for e in spool.read(path, offset)[0]] == ["end"]


def test_a_missing_file_holds_nothing(tmp_path):
    assert spool.read(tmp_path / "no") == ([], 0)


@given(cut=st.integers(0, 60))
@settings(max_examples=20, deadline=None)
def test_a_torn_last_line_is_left_then_passed_over(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "s"
    spool.append(path, {"kind": "tags", "tags": {"a": "1"}})
    whole = path.read_bytes()
    torn = json.dumps({"kind": "tags", "tags": {"b": "é" * 10}}).encode()[:cut]
    path.write_bytes(whole + torn)
    events, offset = spool.read(path)
    assert len(events) == 1 and offset == len(whole)
    spool.append(path, {"kind": "tags", "tags": {"c": "3"}})
    again, _ = spool.read(path, offset)
    assert again[-1]["tags"] == {"c": "3"} and len(again) in (1, 2)


def test_non_finite_values_and_large_texts_come_back(tmp_path):
    path = tmp_path / "s"
    spool.append(path, {"kind": "metrics", "step": 1, "metrics": {"a": float("inf"), "b": float("nan")}})
    spool.append(path, {"kind": "text", "text": "x" * 3_000_000, "file": "a.txt"})
    events, _ = spool.read(path)
    assert events[0]["metrics"]["a"] == float("inf") and events[0]["metrics"]["b"] != events[0]["metrics"]["b"]
    assert len(events[1]["text"]) == 3_000_000


def test_reading_in_pieces_gives_all(tmp_path):
    path = tmp_path / "s"
    for step in range(100):
        spool.append(path, {"kind": "progress", "step": step})
    seen, offset = [], 0
    while True:
        events, offset = spool.read(path, offset, most_bytes=300)
        if not events:
            break
        seen += [e["step"] for e in events]
    assert seen == list(range(100))


def test_a_tail_reads_on_and_starts_over_when_the_file_is_new(tmp_path):
    path = tmp_path / "s"
    tail = spool.Tail(path)
    assert tail.new() == []
    spool.append(path, {"kind": "progress", "n": 1})
    spool.append(path, {"kind": "progress", "n": 2})
    assert [e["n"] for e in tail.new()] == [1, 2]
    path.unlink()
    spool.append(path, {"kind": "progress", "n": 3})
    assert [e["n"] for e in tail.new()] == [3]


def _write(path, who):
    for n in range(200):
        spool.append(path, {"kind": "progress", "who": who, "n": n, "pad": "x" * 5000})


def test_two_writers_never_mix_their_lines(tmp_path):
    path = tmp_path / "s"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(path), who)) for who in range(2)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    events = spool.Tail(path).new()
    for who in range(2):
        assert [e["n"] for e in events if e["who"] == who] == list(range(200))


def test_only_the_owner_can_read_it(tmp_path):
    spool.append(tmp_path / "s", {"kind": "progress"})
    assert os.stat(tmp_path / "s").st_mode & 0o077 == 0


def test_importing_it_brings_nothing_heavy():
    heavy = "[m for m in ('ray', 'mlflow', 'torch', 'numpy', 'pydantic') if m in sys.modules]"
    code = f"import sys, scalecv.artifacts.spool; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
