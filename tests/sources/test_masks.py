import pytest

from scalecv.errors import DataError
from scalecv.sources.found import Found, LeftOut
from scalecv.sources.masks import masks
from tests.sources.test_imagefolder import touch


def test_images_and_masks_meet_by_name_whatever_their_endings(tmp_path):
    uri = touch(
        tmp_path, "images/a.jpg", "images/a-1.tif", "images/b.png", "masks/a.png", "masks/a-1.tif", "masks/z.png"
    )
    found = {f.path: f for f in masks(uri) if isinstance(f, Found)}
    assert {p: (f.mask, f.problem, f.split) for p, f in found.items()} == {
        "images/a.jpg": ("masks/a.png", None, None),
        "images/a-1.tif": ("masks/a-1.tif", None, None),
        "images/b.png": (None, "no_mask", None),
    }


def test_split_folders_and_other_names_of_folders(tmp_path):
    uri = touch(
        tmp_path,
        "train/imgs/1.png",
        "train/annotations/1.png",
        "val/img/2.png",
        "val/labels/2.png",
        "more/images/3.png",
    )
    items = list(masks(uri))
    assert [(f.split, f.mask) for f in items if isinstance(f, Found)] == [
        ("train", "train/annotations/1.png"),
        ("val", "val/labels/2.png"),
    ]
    assert [f.path for f in items if isinstance(f, LeftOut)] == ["more"]


def test_two_masks_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two masks"):
        list(masks(touch(tmp_path, "images/a.jpg", "masks/a.png", "masks/a.tif")))


@pytest.mark.parametrize("names", [("cat/1.png",), ("images/1.png",), ("train/images/1.png",)])
def test_folders_that_are_not_there_are_named(tmp_path, names):
    with pytest.raises(DataError, match="layout masks expects"):
        list(masks(touch(tmp_path, *names)))


def test_pv4band_as_it_is(shared_data):
    found = [f for f in masks(str(shared_data("pv4band"))) if isinstance(f, Found)]
    assert len(found) == 25 and all(f.split == "train" and f.mask for f in found)
