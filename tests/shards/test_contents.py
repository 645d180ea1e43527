"""Images that two splits hold: found at ingest, on disk and by parts, an append looks at all."""

from collections import defaultdict

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from scalecv.schema import SPLITS
from scalecv.shards import contents, row_facts, store
from scalecv.shards.contents import Contents
from scalecv.shards.manifest import RowFacts
from scalecv.shards.store import open_dataset
from tests.shards.images import encoded, png, write
from tests.shards.test_ingest import run


@pytest.mark.parametrize("together", [1 << 22, 100])
def test_copies_are_those_that_a_dictionary_finds(tmp_path, monkeypatch, together):
    monkeypatch.setattr(contents, "_TOGETHER", together)
    monkeypatch.setattr(contents, "_READ", 64)
    monkeypatch.setattr(contents, "_path_of", lambda uri, shards, row: str(row))
    rng = np.random.default_rng(0)
    known = [None if n % 11 == 0 else "" if n % 13 == 0 else f"{n:x}".rjust(32, "7") for n in rng.integers(0, 900, 700)]
    splits = [SPLITS[n] for n in rng.integers(0, 3, 700)]
    found = Contents(tmp_path / "rows")
    for first in range(0, 700, 90):
        found.add(splits[first : first + 90], known[first : first + 90])
    held = defaultdict(set)
    for split, content in zip(splits, known, strict=True):
        held[content].add(split)
    told = found.copies("", ())
    assert [one.splits for one in told] == [("train", "val"), ("train", "test"), ("val", "test")]
    for one in told:
        a, b = one.splits
        copies = [row for row, c in enumerate(known) if c and splits[row] == b and a in held[c]]
        assert one.images == len(copies) > 10
        of, copy = map(int, one.example)
        assert known[of] == known[copy] and (splits[of], splits[copy]) == (a, b)


@pytest.fixture
def source(tmp_path):
    """Two classes; one picture of val is one of train by another name, and three of one colour are everywhere."""
    white = encoded(PIL.Image.new("RGB", (12, 10), "white"), "PNG")
    for split, first in (("train", 0), ("val", 100)):
        for number in range(first, first + 6):
            write(tmp_path, f"images/{split}/{'ab'[number % 2]}/{number}.png", png(number))
        write(tmp_path, f"images/{split}/a/white.png", white)
    write(tmp_path, "images/val/b/again.png", png(3))
    return tmp_path / "images"


def test_copies_in_two_splits_are_told_with_an_example(source, tmp_path):
    done = run(source, tmp_path / "data")
    manifest = open_dataset(done.dataset).manifest
    (copies,) = manifest.copies
    assert (copies.splits, copies.images) == (("train", "val"), 1)
    assert copies.example == ("train/b/3.png", "val/b/again.png")
    line = "in val 1 image is a copy of what train holds, such as val/b/again.png (val) of train/b/3.png (train)"
    assert any(warning.startswith(line) for warning in manifest.warnings)
    write(source, "val/a/more.png", png(4))
    more = open_dataset(run(source, tmp_path / "data", append=True).dataset).manifest
    assert more.copies[0].images == 2, "those of the version before count too"


def test_what_an_older_release_did_not_keep_is_not_known(source, tmp_path):
    dataset = open_dataset(run(source, tmp_path / "data").dataset)
    table = pq.read_table(f"{dataset.uri}/{dataset.manifest.row_facts.path}")
    pq.write_table(table.drop_columns("content"), tmp_path / "older.parquet")
    path, sha256 = store.put_facts(dataset.uri, (tmp_path / "older.parquet").read_bytes(), "parquet")
    older = dataset.manifest.model_copy(update={"row_facts": RowFacts(path=path, sha256=sha256)})
    for parent in (older, dataset.manifest.model_copy(update={"row_facts": RowFacts()})):
        held = Contents(tmp_path / "rows")
        held.copy(dataset.uri, parent)
        assert held.copies(dataset.uri, parent.shards) == ()
    writer = row_facts.RowFactsWriter(tmp_path / "new.parquet", "label")
    writer.copy(dataset.uri, older)
    copied = writer.put(dataset.uri)
    assert not copied.has_contents and dataset.manifest.row_facts.has_contents
    assert pq.read_table(f"{dataset.uri}/{copied.path}").column("label") == table.column("label")


def test_images_without_labels_have_facts_of_rows_too(source, tmp_path):
    (source / "list.csv").write_text("file\ntrain/a/0.png\ntrain/b/1.png\n")
    manifest = open_dataset(run(source / "list.csv", tmp_path / "data", "csv").dataset).manifest
    assert manifest.kind == "image" and manifest.row_facts.path and not manifest.copies
    (known,) = row_facts.contents_of(str(tmp_path / "data"), manifest)
    assert [len(text) for text in known.to_pylist()] == [32, 32]
