"""Training does not begin on splits that share ground, unless the experiment says so; flat bands are told."""

import pytest

from scalecv.errors import DataError
from scalecv.shards.ingest import IngestOptions, ingest
from scalecv.shards.manifest import Copies
from scalecv.shards.store import open_dataset
from scalecv.train.checks import check


@pytest.fixture(scope="module")
def panels(shared_data, tmp_path_factory):
    """A function that gives the manifest of pv4band, split at random or by place."""
    to = tmp_path_factory.mktemp("panels")

    def manifest(name: str, **more):
        options = {"source": str(shared_data("pv4band")), "layout": "masks", "mask_values": (0, 1), "concurrency": 0}
        return open_dataset(ingest(IngestOptions(**options, to=str(to / name), **more)).dataset).manifest

    return manifest


def test_a_split_of_overlapping_tiles_is_refused_with_count_and_example(panels, fields):
    manifest = panels("random")
    with pytest.raises(DataError) as caught:
        check(fields(), manifest)
    said = str(caught.value)
    (overlap,) = manifest.overlaps
    assert f"{overlap.pairs} pair" in said and overlap.example[0] in said and "data.allow_leak=[overlap]" in said
    notes = check(fields(data__allow_leak=["overlap"]), manifest)
    assert notes[0].startswith("allowed by data.allow_leak=[overlap]: ") and overlap.example[1] in notes[0]


def test_a_split_by_place_is_fine_and_a_flat_band_is_told_where_it_is_used(panels, fields):
    manifest = panels("places", split_folders={"other_place": "val"})
    flat = "band 4 is 255 everywhere: leave it out with data.bands=[1,2,3]"
    assert flat in check(fields(), manifest) and flat in manifest.warnings
    assert not [note for note in check(fields(data__bands=[1, 2, 3]), manifest) if "everywhere" in note]


def test_copies_are_refused_until_they_are_allowed_by_name(panels, fields):
    found = Copies(splits=("train", "test"), images=3, example=("a.png", "b.png"))
    manifest = panels("places", split_folders={"other_place": "val"}).model_copy(update={"copies": (found,)})
    line = "in test 3 images are copies of what train holds, such as b.png (test) of a.png (train)"
    with pytest.raises(DataError) as caught:
        check(fields(), manifest)
    assert line in str(caught.value) and str(caught.value).endswith("or say data.allow_leak=[copies]")
    assert check(fields(data__allow_leak=["copies"]), manifest)[0] == f"allowed by data.allow_leak=[copies]: {line}"
    both = manifest.model_copy(update={"overlaps": panels("random").overlaps})
    with pytest.raises(DataError, match=r"data.allow_leak=\[overlap, copies\]"):
        check(fields(data__allow_leak=["overlap"]), both)
