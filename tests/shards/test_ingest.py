import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from scalecv import storage
from scalecv.errors import ConfigError, DataError
from scalecv.shards import store, unit
from scalecv.shards.ingest import IngestOptions, IngestResult, Progress, ingest
from scalecv.shards.store import open_dataset
from tests.shards.images import class_folders, encoded, png, write

TRACK = r"/(\d+/\d+)_\d+\.png$"


def run(source: Path | str, to: Path | str, layout: str = "imagefolder", **more) -> IngestResult:
    return ingest(IngestOptions(source=str(source), to=str(to), layout=layout, **{"concurrency": 0, **more}))


def rows_of(uri: Path | str, *columns: str, version: int | None = None) -> list[dict]:
    dataset = open_dataset(str(uri), version)
    found = []
    for shard in dataset.manifest.shards:
        for table in store.read_rows(dataset.uri, [shard], columns or None):
            found += [{**row, "split": shard.split} for row in table.to_pylist()]
    return found


def asides(uri: Path | str, kind: str = "quarantine") -> dict[str, str]:
    facts = getattr(open_dataset(str(uri)).manifest, kind)
    return {r["path"]: r["reason"] for r in pq.read_table(Path(uri) / facts.path).to_pylist()} if facts.path else {}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("source"))


def test_gtsrb_by_folders_and_by_table_are_the_same_images(shared_data, tmp_path):
    steps: list[Progress] = []
    folder = shared_data("gtsrb")
    options = IngestOptions(
        source=str(folder), to=str(tmp_path / "a"), layout="imagefolder", group=TRACK, concurrency=0
    )
    by_folders = ingest(options, steps.append)
    assert by_folders.splits == {"train": 1464, "val": 261, "test": 344} and by_folders.quarantined == 0
    assert by_folders.classes == tuple(f"{i:05d}" for i in range(43))
    assert "tracks/ is none of train, val, test" in " ".join(by_folders.warnings)
    assert [s.phase for s in steps][-1] == "committing" and steps[-2].rows == steps[-2].total == 2069
    assert steps[-2].images_per_s > 0 and steps[-2].left_s == 0

    by_table = run(folder, tmp_path / "b", "csv", csv="labels.csv", group="class_id,track")
    assert by_table.splits == by_folders.splits and by_table.classes == tuple(str(i) for i in range(43))
    a, b = open_dataset(by_folders.dataset).manifest, open_dataset(by_table.dataset).manifest
    assert a.stats == b.stats and a.stats["uint8x3"].rows == 1464
    assert a.class_counts["train"] == {f"{int(c):05d}": n for c, n in b.class_counts["train"].items()}
    assert "roi_x1" in b.meta
    row = rows_of(tmp_path / "b", "meta_roi_x1", "group", "image.path")[0]
    assert row["meta_roi_x1"].isdigit() and "," in row["group"]
    train = {r["group"] for r in rows_of(tmp_path / "a", "group") if r["split"] == "train"}
    assert len(train) == 488, "one group for each track of the training split"


@pytest.mark.parametrize(("name", "bands", "rows"), [("pv4band", "uint8x4", 25), ("water12", "int16x12", 26)])
def test_rasters_with_masks_keep_bands_and_bytes(shared_data, tmp_path, name, bands, rows):
    done = run(shared_data(name), tmp_path / "ds", "masks", mask_values=(0, 1))
    facts = open_dataset(done.dataset).manifest
    assert done.rows == rows and done.quarantined == 0 and facts.kind == "mask"
    assert (facts.classes, facts.mask_values, facts.band_counts) == (("0", "1"), (0, 1), {bands: rows})
    for row in rows_of(tmp_path / "ds"):
        assert row["image"]["bytes"] == (shared_data(name) / row["image"]["path"]).read_bytes()
        assert row["mask"]["bytes"] == (shared_data(name) / row["mask"]["path"]).read_bytes()
    pixels = sum(sum(counts.values()) for counts in facts.class_counts.values())
    assert pixels == rows * facts.sizes_px[0] * facts.sizes_px[1]
    assert len(facts.stats[bands].mean) == int(bands.split("x")[1])


def test_all_bad_files_end_as_they_should(shared_data, tmp_path):
    with (shared_data("bad") / "files.csv").open(newline="") as table:
        expected = {row["file"]: row["expect"] for row in csv.DictReader(table)}
    done = run(shared_data("bad"), tmp_path / "ds", "csv", max_bad=1.0)
    refused, noted = asides(tmp_path / "ds"), asides(tmp_path / "ds", "notes")
    assert done.rows + done.quarantined == 40
    for name, expect in expected.items():
        if name.startswith("mask_"):
            continue
        assert (name in refused) == (expect == "reject"), name
        told = name in noted or any(name in w for w in done.warnings)
        assert told or expect != "warn", name
        assert name not in noted or expect == "warn", name


def test_bad_masks_and_odd_rasters_among_good_ones(shared_data, tmp_path):
    bad, good = shared_data("bad"), shared_data("pv4band") / "train"
    source = tmp_path / "source"
    for name in sorted(os.listdir(good / "images"))[:8]:
        write(source, f"images/{name}", (good / "images" / name).read_bytes())
        write(source, f"masks/{name}", (good / "masks" / name).read_bytes())
    three = (bad / "three_bands.tif").read_bytes()
    for name, mask in (("size", "mask_wrong_size.tif"), ("label", "mask_bad_label.tif")):
        write(source, f"images/{name}.tif", three)
        write(source, f"masks/{name}.tif", (bad / mask).read_bytes())
    write(source, "images/alone.tif", three)
    write(source, "images/three.tif", three)
    write(source, "masks/three.png", encoded(PIL.Image.new("L", (64, 64), 1), "PNG"))
    done = run(source, tmp_path / "ds", "masks", mask_values=(0, 1), max_bad=0.5)
    assert asides(tmp_path / "ds") == {
        "images/size.tif": "mask_size",
        "images/label.tif": "mask_value",
        "images/alone.tif": "no_mask",
    }
    assert any("uint8x3 such as images/three.tif" in w for w in done.warnings)
    assert done.rows == 9


def test_mask_values_seen_become_classes_and_ignored_ones_do_not(tmp_path):
    for i in range(8):
        write(tmp_path, f"s/images/{i}.png", png(i, (4, 4)))
        mask = np.full((4, 4), (0, 5, 255)[i % 3], np.uint8)
        write(tmp_path, f"s/masks/{i}.png", encoded(PIL.Image.fromarray(mask), "PNG"))
    run(tmp_path / "s", tmp_path / "ds", "masks", mask_ignore=255, classes=("ground", "water"))
    facts = open_dataset(str(tmp_path / "ds")).manifest
    assert (facts.classes, facts.mask_values, facts.mask_ignore) == (("ground", "water"), (0, 5), 255)
    assert sum(sum(c.values()) for c in facts.class_counts.values()) == 6 * 16, "ignored pixels count nowhere"


def test_the_same_source_gives_the_same_dataset_wherever_it_lies(source, tmp_path):
    first = run(source, tmp_path / "a")
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    second = run(moved, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    shards = [sorted(p.name for p in (tmp_path / d).glob("split=*/*")) for d in "ab"]
    assert shards[0] == shards[1]
    ids = [{r["id"] for r in rows_of(tmp_path / d, "id")} for d in "ab"]
    assert ids[0] == ids[1] and len(ids[0]) == 36


def test_the_same_command_again_makes_nothing_new(source, tmp_path):
    first = run(source, tmp_path / "ds")
    again = run(source, tmp_path / "ds")
    assert (again.version, again.fingerprint, again.new_rows) == (0, first.fingerprint, 0)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    touched = run(moved, tmp_path / "ds")
    assert (touched.version, touched.new_rows) == (0, 0), "other etags, the same images"
    assert store.versions(str(tmp_path / "ds")) == [0]
    write(moved, "class0/new.png", png(99))
    with pytest.raises(DataError, match=r"holds a dataset of other images.*--append"):
        run(moved, tmp_path / "ds")


def test_append_adds_only_what_is_new_and_keeps_class_numbers(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    write(copy, "class1/broken.png", b"not yet")
    first = run(copy, tmp_path / "ds", max_bad=0.1)
    assert asides(tmp_path / "ds") == {"class1/broken.png": "not_an_image"}
    write(copy, "class1/broken.png", png(7))
    write(copy, "a-new-class/1.png", png(8))
    write(copy, "class0/9999.png", b"")
    done = run(copy, tmp_path / "ds", append=True, max_bad=0.5)
    assert (done.version, done.new_rows, done.rows) == (1, 2, 38)
    assert done.classes == ("class0", "class1", "class2", "a-new-class")
    assert asides(tmp_path / "ds") == {"class0/9999.png": "empty"}, "the repaired image is no longer set aside"
    old, new = (open_dataset(done.dataset, v).manifest for v in (0, 1))
    assert new.parent == old.fingerprint == first.fingerprint and new.shards[: len(old.shards)] == old.shards
    assert len(rows_of(tmp_path / "ds", "id", version=0)) == 36
    split = {r["image"]["path"]: r["split"] for r in rows_of(tmp_path / "ds", "image.path", version=0)}
    assert all(split.get(r["image"]["path"], r["split"]) == r["split"] for r in rows_of(tmp_path / "ds", "image.path"))
    again = run(copy, tmp_path / "ds", append=True)
    assert (again.version, again.new_rows) == (1, 0) and "1 images were set aside before" in " ".join(again.warnings)
    fresh = run(copy, tmp_path / "fresh", max_bad=0.5)
    a, b = (open_dataset(d).manifest.stats["uint8x3"] for d in (fresh.dataset, done.dataset))
    np.testing.assert_allclose(a.mean + a.std, b.mean + b.std, rtol=1e-9)


def test_append_refuses_what_does_not_fit(source, shared_data, tmp_path):
    with pytest.raises(DataError, match=r"no dataset at .* to append to"):
        run(source, tmp_path / "ds", append=True)
    run(source, tmp_path / "ds")
    with pytest.raises(DataError, match=r"has masks, the dataset at .* has class labels"):
        run(shared_data("pv4band"), tmp_path / "ds", "masks", append=True)


def test_too_many_bad_images_stop_the_ingest_and_commit_nothing(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    for i in range(3):
        write(copy, f"class0/bad{i}.png", b"\x89PNG" * i)
    with pytest.raises(DataError) as caught:
        run(copy, tmp_path / "ds")
    said = str(caught.value)
    assert "of 39 images cannot be used, at most 5% may be set aside" in said
    assert "not_an_image, such as class0/bad" in said and "1 empty, such as class0/bad0.png" in said
    assert store.versions(str(tmp_path / "ds")) == []
    done = run(copy, tmp_path / "ds", max_bad=0.1)
    assert done.quarantined == 3 and done.skipped_units > 0, "no finished work is done again"
    assert not list((tmp_path / "ds").glob("_ingest*"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda s: s.mkdir(), "is empty: expected images"),
        (lambda s: write(s, "labels.txt", b"x"), "no images in .*1 file left out"),
        (lambda s: [write(s, f"cat/{i}.png", b"") for i in range(4)], "4 of 4 images cannot be used"),
    ],
)
def test_sources_without_good_images_are_refused(tmp_path, make, said):
    make(tmp_path / "s")
    with pytest.raises(DataError, match=said):
        run(tmp_path / "s", tmp_path / "ds", max_bad=1.0)


def test_labels_that_teach_nothing_are_told(tmp_path):
    class_folders(tmp_path / "one", classes=1)
    assert any("one class only" in w for w in run(tmp_path / "one", tmp_path / "a").warnings)
    write(tmp_path / "two", "train/cat/1.png", png(1))
    write(tmp_path / "two", "train/dog/1.png", png(2))
    write(tmp_path / "two", "val/cow/2.png", png(3))
    assert any("val holds classes that train lacks: cow" in w for w in run(tmp_path / "two", tmp_path / "b").warnings)


def test_options_that_cannot_be_are_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_bytes(b"")
    for said, error, more in (
        ("not a dataset, it holds thesis.txt", DataError, {"to": str(tmp_path / "full")}),
        ("--csv x.csv goes with --layout csv", ConfigError, {"csv": "x.csv"}),
        ("--mask-values goes with masks", ConfigError, {"mask_values": (0, 1)}),
        ("--split 5: expected shares", ConfigError, {"split": "5"}),
        ("captures nothing", ConfigError, {"group": "x"}),
        ("found in no path, such as class0/", ConfigError, {"group": r"track(\d+)"}),
        ("has the label class2, --classes names class0, class1", DataError, {"classes": ("class0", "class1")}),
    ):
        with pytest.raises(error, match=said):
            run(source, more.pop("to", tmp_path / "ds"), **more)


def test_groups_are_counted_and_what_has_none_is_told(source, tmp_path):
    done = run(source, tmp_path / "ds", group=r"class0/.*(\d)\.png$")
    (said,) = [w for w in done.warnings if "groups by --group" in w]
    assert "images have none, such as class1/" in said


def test_an_empty_class_folder_is_told(source, tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copytree(source, tmp_path / "copy", dirs_exist_ok=True)
    (tmp_path / "copy" / "class9").mkdir()
    done = run(tmp_path / "copy", tmp_path / "ds")
    assert any("an empty folder), such as class9/" in w for w in done.warnings), done.warnings


def test_declared_classes_keep_their_order(source, tmp_path):
    done = run(source, tmp_path / "ds", classes=("class2", "class0", "class1"))
    assert done.classes == ("class2", "class0", "class1")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """2,400 images of 10 kB: several units of work."""
    root = tmp_path_factory.mktemp("many")
    noise = [png(i, (60, 58)) for i in range(12)]
    for i in range(2400):
        write(root, f"class{i % 3}/{i:05d}.png", noise[i % 12])
    return root


_COMMAND = """
import json, sys
from scalecv.shards.ingest import IngestOptions, ingest
if __name__ == "__main__":
    done = ingest(IngestOptions(**json.loads(sys.argv[1])), lambda p: print(p.phase, p.rows, flush=True))
    print("RESULT", done.skipped_units, done.fingerprint, flush=True)
"""


def test_killed_in_the_middle_and_started_again(many, tmp_path):
    options = {
        "source": str(many),
        "to": str(tmp_path / "ds"),
        "layout": "imagefolder",
        "shard_mb": 2,
        "concurrency": 0,
    }
    command = [sys.executable, "-c", _COMMAND, json.dumps(options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("ingesting") and int(line.split()[1]) > 600:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert store.versions(str(tmp_path / "ds")) == [], "no half dataset"
    with pytest.raises(DataError, match="is not a dataset"):
        open_dataset(str(tmp_path / "ds"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    _, skipped, fingerprint = again.stdout.splitlines()[-1].split()
    assert int(skipped) >= 3
    quiet = run(many, tmp_path / "quiet", shard_mb=2)
    assert fingerprint == quiet.fingerprint
    assert store.verify(open_dataset(str(tmp_path / "ds"))) == []
    assert not list((tmp_path / "ds").glob("_ingest*"))


def test_a_lost_shard_is_made_again(many, tmp_path):
    options = IngestOptions(source=str(many), to=str(tmp_path / "ds"), layout="imagefolder", shard_mb=2, concurrency=0)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.rows > 600 and progress.phase == "ingesting":
            raise Stop

    with pytest.raises(Stop):
        ingest(options, stop)
    shards = sorted((tmp_path / "ds").glob("split=*/*.parquet"))
    shards[0].write_bytes(b"cut")
    done = ingest(options)
    assert done.skipped_units == len(shards) - 1
    assert store.verify(open_dataset(done.dataset)) == []


def test_two_ingests_at_once_leave_one_whole_dataset(many, tmp_path):
    options = {
        "source": str(many),
        "to": str(tmp_path / "ds"),
        "layout": "imagefolder",
        "shard_mb": 4,
        "concurrency": 0,
    }
    other = options | {"split": "50/50"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(o)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for o in (options, other)
    ]
    errors = [child.communicate()[1] for child in children]
    assert sorted(child.returncode for child in children) == [0, 1]
    assert any("DataError" in e and "--append" in e for e in errors)
    dataset = open_dataset(str(tmp_path / "ds"))
    assert dataset.manifest.rows == 2400 and store.verify(dataset) == []


def test_whoever_is_overtaken_while_writing_says_so(tmp_path):
    """The other ingest clears the staging folder, and with it files that are half written."""
    staging, done = tmp_path / unit.STAGING, threading.Event()

    def clear() -> None:
        while not done.is_set():
            for name in storage.list_names(str(staging)):
                storage.delete([f"{staging}/{name}"])

    def write(number: int) -> bool:
        try:
            unit.stage(str(tmp_path), f"{staging}/{number}.json", b"{}")
        except DataError as error:
            assert "--append" in str(error)
            return True
        return False

    other = threading.Thread(target=clear)
    other.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            told = sum(pool.map(write, range(1000)))
    finally:
        done.set()
        other.join()
    assert told, "nothing was cleared while it was written: the test shows nothing"


def test_result_is_plain_data(source, tmp_path):
    result = dataclasses.asdict(run(source, tmp_path / "ds"))
    assert json.loads(json.dumps(result)) == {
        **result,
        "classes": list(result["classes"]),
        "warnings": list(result["warnings"]),
    }
    assert {"dataset", "version", "fingerprint", "rows", "quarantined", "splits"} <= set(result)
    assert time.strptime(open_dataset(result["dataset"]).manifest.created_at[:19], "%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize("layout", ["imagefolder", "masks"])
def test_names_that_cannot_be_written_down_are_left_out_and_told(tmp_path, layout):
    source = tmp_path / "source"
    for number, name in enumerate([b"a.png", b"caf\xe9.png", b"two\nlines.png", "größe 1.png".encode()]):
        for folder in ("one",) if layout == "imagefolder" else ("images", "masks"):
            place = os.path.join(os.fsencode(source), folder.encode(), name)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            data = png(number, mode="L") if folder == "masks" else png(number)
            with open(place, "wb") as file:
                file.write(data)
    done = ingest(IngestOptions(source=str(source), to=str(tmp_path / "ds"), layout=layout, concurrency=0))
    assert done.rows == 2
    (said,) = [one for one in done.warnings if "not UTF-8" in one]
    assert said.isprintable() and "2 files" in said and "rename" in said
