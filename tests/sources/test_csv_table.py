import pytest

from scalecv.errors import ConfigError, DataError
from scalecv.sources.csv_table import csv_table
from scalecv.sources.found import Found, LeftOut
from tests.sources.test_imagefolder import touch


def rows(uri: str, **options) -> list[Found]:
    return [f for f in csv_table(uri, **options) if isinstance(f, Found)]


def test_columns_become_label_split_group_and_metadata(tmp_path):
    uri = touch(tmp_path, "a/1.png", "a/2.png")
    text = '\ufeffimage,class,split,site,note\na/1.png,cat,train,S1,"x, y"\n./a/2.png,dog,valid,S2,\na/3.png,cat,,S1,\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    first, second, third = rows(uri, group="site,note")
    assert (first.path, first.label, first.split, first.group) == ("a/1.png", "cat", "train", "S1,x, y")
    assert dict(first.meta) == {"site": "S1", "note": "x, y"}
    assert (second.path, second.split, second.problem) == ("a/2.png", "val", None)
    assert (third.split, third.problem) == (None, "missing")


def test_paths_may_begin_with_the_name_of_the_folder(shared_data):
    found = rows(str(shared_data("gtsrb")), csv_name="labels.csv", group="class_id,track")
    assert len(found) == 2069 and all(f.problem is None for f in found)
    assert found[0].path == "val/00000/00004_00006.png" and found[0].group == "0,00004"


def test_tabs_and_a_mask_column(tmp_path):
    uri = touch(tmp_path, "i/1.png", "m/1.png", "i/2.png")
    (tmp_path / "t.tsv").write_text("file\tmask\ni/1.png\tm/1.png\ni/2.png\tm/2.png\n")
    assert [(f.mask, f.problem) for f in rows(f"{uri}/t.tsv")] == [("m/1.png", None), (None, "no_mask")]


def test_unknown_splits_and_unlisted_images_are_left_out(tmp_path):
    uri = touch(tmp_path, "1.png", "2.png", "3.png", "4.png")
    (tmp_path / "t.csv").write_text("path,split\n1.png,train\n2.png,extra\n")
    left = [f for f in csv_table(uri) if isinstance(f, LeftOut)]
    assert "split 'extra'" in left[0].why and "about 2 images" in left[1].why


def test_tables_that_cannot_be_read_are_told(tmp_path):
    uri = touch(tmp_path, "1.png")
    with pytest.raises(DataError, match="--csv NAME"):
        rows(uri)
    (tmp_path / "labels.csv").write_text("name,label\n1.png,cat\n")
    with pytest.raises(DataError, match=r"columns name, label: one must be named file"):
        rows(uri)
    with pytest.raises(DataError, match=r"did you mean 'labels.csv'"):
        rows(uri, csv_name="label.csv")
    (tmp_path / "labels.csv").write_text("file,label\n1.png,cat\n")
    with pytest.raises(ConfigError, match="no such column; did you mean 'label'"):
        rows(uri, group="labels")
    with pytest.raises(DataError, match="no table at"):
        rows(f"{uri}/other.csv")
