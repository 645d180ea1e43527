import pytest

from scalecv.errors import ConfigError
from scalecv.sources.found import grouping, is_image, share, split_named


def test_group_is_what_the_brackets_capture():
    group = grouping(r"/(\d+)/(\d+)_\d+\.png$")
    assert group("/train/00003/00012_00006.png") == "00003/00012"
    assert group("/test/00003/00403.png") is None
    assert grouping(None)("/x") is None


@pytest.mark.parametrize("pattern", ["(", "no brackets"])
def test_patterns_that_cannot_group_are_refused(pattern):
    with pytest.raises(ConfigError, match="--group"):
        grouping(pattern)


def test_share_is_stable_and_even():
    assert share("00003/00012") == share("00003/00012")
    shares = [share(str(i)) for i in range(4000)]
    assert all(0 <= s < 1 for s in shares)
    assert abs(sum(s < 0.1 for s in shares) / 4000 - 0.1) < 0.02  # 4 standard deviations


def test_names_of_splits_and_images():
    assert [split_named(n) for n in ("Train", "valid", "validation", "test", "tracks")] == [
        "train",
        "val",
        "val",
        "test",
        None,
    ]
    assert is_image("a/B.JPG") and is_image("x.tiff") and not is_image("labels.csv") and not is_image("png")
