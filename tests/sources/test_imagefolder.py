from pathlib import Path

import pytest

from scalecv.errors import StorageDenied
from scalecv.sources.found import Found, LeftOut
from scalecv.sources.imagefolder import imagefolder


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return str(root)


def taken(uri: str, group: str | None = None) -> dict[str, Found]:
    return {f.path: f for f in imagefolder(uri, group) if isinstance(f, Found)}


def test_split_folders_name_splits_and_other_folders_are_left_out(tmp_path):
    uri = touch(tmp_path, "train/cat/1.png", "valid/dog/deep/2.JPG", "test/cat/3.tif", "tracks/cat/4.png", "labels.csv")
    found = taken(uri)
    assert {p: (f.split, f.label) for p, f in found.items()} == {
        "train/cat/1.png": ("train", "cat"),
        "valid/dog/deep/2.JPG": ("val", "dog"),
        "test/cat/3.tif": ("test", "cat"),
    }
    left = [f for f in imagefolder(uri) if isinstance(f, LeftOut)]
    assert {f.path for f in left} == {"tracks/cat/4.png", "labels.csv"}


def test_class_folders_alone_leave_the_split_open(tmp_path):
    found = taken(touch(tmp_path, "cat/1.png", "dog/2.png"))
    assert {(f.label, f.split) for f in found.values()} == {("cat", None), ("dog", None)}


def test_images_without_folders_have_no_label(tmp_path):
    assert [f.label for f in taken(touch(tmp_path, "1.png", "2.png")).values()] == [None, None]
    found = taken(touch(tmp_path, "0/deep/3.png", "0/4.png", "2/5.png"))
    assert {path: f.label for path, f in found.items()} == {
        "0/4.png": "0",
        "0/deep/3.png": "0",
        "1.png": None,
        "2.png": None,
        "2/5.png": "2",
    }


def test_group_comes_from_the_path(tmp_path):
    found = taken(touch(tmp_path, "train/7/00003_01.png"), r"/(\d+/\d+)_\d+\.png$")
    assert found["train/7/00003_01.png"].group == "7/00003"


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(StorageDenied, match="no folder"):
        list(imagefolder(str(tmp_path / "nothing")))


def test_gtsrb_as_it_is(shared_data):
    found = taken(str(shared_data("gtsrb")))
    assert len(found) == 1464 + 261 + 344
    assert len({f.label for f in found.values()}) == 43
