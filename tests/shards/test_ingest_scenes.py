"""Large rasters become tiles that know their place, and splits that do not share ground."""

import json
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from scalecv import raster
from scalecv.errors import ConfigError, DataError
from scalecv.raster import shifted
from scalecv.shards import store
from scalecv.shards.store import open_dataset
from scalecv.tiles import Window, grid
from tests.shards.images import write
from tests.shards.scenes import place, scene, two_scenes, wkt
from tests.shards.test_ingest import _COMMAND, asides, rows_of, run

TILED = {"layout": "masks", "tile": 256, "overlap": 64, "mask_values": (0, 1)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return two_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def tiled(source, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("tiled") / "ds"
    run(source, to, split="50/50", **TILED)
    return to


def test_every_window_is_a_row_with_its_pixels_and_its_place(source, tiled):
    facts = open_dataset(str(tiled)).manifest
    assert facts.rows == 2 * len(list(grid(600, 500, 256, 64))) and facts.quarantine.rows == 0
    assert (facts.tiling.size_px, facts.tiling.overlap_px, facts.crs) == (256, 64, {"EPSG:32632": facts.rows})
    assert facts.meta == ("scene", "window") and facts.sizes_px == (256, 256, 256, 256)
    whole = {p: raster.read((source / p).read_bytes())[0] for p in ("images/a.tif", "images/c.tif")}
    masks = {p: raster.read((source / p).read_bytes())[0] for p in ("masks/a.tif", "masks/c.tif")}
    found = raster.profile((source / "images/a.tif").read_bytes())
    rows = rows_of(tiled)
    for row in rows:
        w = Window.parse(row["meta_window"])
        assert row["image"]["path"] == f"{row['meta_scene']}#{w}"
        pixels, nodata = raster.read(row["image"]["bytes"])
        area = np.s_[w.row : w.row + w.height, w.col : w.col + w.width]
        np.testing.assert_array_equal(pixels, whole[row["meta_scene"]][area])
        np.testing.assert_array_equal(raster.read(row["mask"]["bytes"])[0], masks[row["mask"]["path"]][area])
        told = raster.profile(row["image"]["bytes"])
        offset = 2000 if row["meta_scene"].endswith("c.tif") else 0
        assert told.transform == shifted(place(offset, 0), w.col, w.row)
        assert (nodata, row["nodata"], told.wkt, told.names) == (0, 0, found.wkt, found.names)
    splits = {(row["meta_scene"], row["split"]) for row in rows}
    assert len(splits) == 2 and len({s for _, s in splits}) == 2 and not facts.overlaps, "a scene is one group"
    seen = sum(sum(counts.values()) for counts in facts.class_counts.values())
    assert seen < facts.rows * 256 * 256, "pixels without data are of no class"


def test_repeated_moved_and_appended(source, tiled, tmp_path):
    first = open_dataset(str(tiled)).manifest
    again = run(source, tiled, split="50/50", **TILED)
    assert (again.new_rows, again.fingerprint) == (0, first.fingerprint)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    elsewhere = run(moved, tmp_path / "ds", split="50/50", **TILED)
    assert elsewhere.fingerprint == first.fingerprint
    image, mask = scene(9, 300, 200)
    write(moved, "images/d.tif", raster.encode(image, None, wkt(), place(9000, 0)))
    write(moved, "masks/d.tif", raster.encode(mask[:, :, None], None, wkt(), place(9000, 0)))
    with pytest.raises(DataError, match="tiles of 256 px that share 64, this ingest would add tiles of 128"):
        run(moved, tmp_path / "ds", append=True, **TILED | {"tile": 128})
    more = run(moved, tmp_path / "ds", append=True, **TILED)
    assert (more.version, more.new_rows) == (1, 2), "only what is new"
    facts = open_dataset(str(tmp_path / "ds")).manifest
    assert facts.footprints.rows == facts.rows and store.verify(open_dataset(str(tmp_path / "ds"))) == []
    small = [r for r in rows_of(tmp_path / "ds") if r["meta_scene"] == "images/d.tif"]
    for row in small:
        w = Window.parse(row["meta_window"])
        assert (row["height"], row["width"], w.height, w.width) == (256, 256, 200, 256)
        pixels = raster.read(row["image"]["bytes"])[0]
        assert (pixels[200:] == row["nodata"]).all() and not (pixels[:200] == row["nodata"]).all(-1).any()


def test_overlapping_scenes_stay_together_and_blocks_never_share_a_pixel(tmp_path):
    near = two_scenes(tmp_path / "near", 400, 300, apart_px=300)
    done = run(near, tmp_path / "a", split="50/50", **TILED)
    assert len([s for s in done.splits.values() if s]) == 1, "they lie on each other: one group"
    blocks = run(near, tmp_path / "b", split="50/50", split_by="block", block="200", **TILED | {"tile": 128})
    facts = open_dataset(blocks.dataset).manifest
    assert set(facts.splits) == {"train", "val"} and not facts.overlaps
    of_map = run(near, tmp_path / "c", split="50/50", split_by="block", block="2000map", **TILED | {"tile": 128})
    assert of_map.fingerprint == blocks.fingerprint, "200 pixels of 10 m"
    seen = defaultdict(set)
    for row in rows_of(tmp_path / "b", "meta_scene", "meta_window"):
        w, offset = Window.parse(row["meta_window"]), 300 * row["meta_scene"].endswith("c.tif")
        assert w.width <= 128
        seen[row["split"]] |= {
            (x // 4 + offset // 4, y // 4)
            for x in range(w.col, w.col + w.width, 4)
            for y in range(w.row, w.row + w.height, 4)
        }
    assert not seen["train"] & seen["val"]
    assert len(seen["train"] | seen["val"]) == (700 // 4) * (300 // 4), "no ground is lost"


def test_pixels_without_georeference_are_compared_within_their_scene(tmp_path, shared_data):
    image, mask = scene(0, 500, 500, 3, "uint8")
    for i in range(2):
        write(tmp_path, f"s/images/{i}.tif", raster.encode(image))
        write(tmp_path, f"s/masks/{i}.tif", raster.encode(mask[:, :, None]))
    done = run(tmp_path / "s", tmp_path / "a", split="50/50", **TILED | {"tile": 128}, split_by="block", block="128")
    assert set(done.splits) == {"train", "val"} and not open_dataset(done.dataset).manifest.overlaps
    water = run(shared_data("water12"), tmp_path / "b", "masks", tile=64, overlap=16, mask_values=(0, 1))
    facts = open_dataset(water.dataset).manifest
    assert list(facts.stats) == ["int16x12"] and min(facts.stats["int16x12"].min) < 0
    assert not facts.crs and facts.footprints.rows == facts.rows == 26 * 9
    assert not facts.overlaps


@pytest.mark.parametrize(("origin", "pairs"), [(500_000.0, 1), (0.0, 0)])
def test_files_with_coordinates_and_no_crs_are_compared_with_each_other(tmp_path, origin, pairs):
    """Not so where all say (0, 0): that is the size of their pixels, and no place."""
    for number, split in enumerate(("train", "val", "train")):
        image, mask = scene(number, 64, 64)
        transform = (10.0, 0.0, origin and origin + 400.0 * number, 0.0, -10.0, origin)
        write(tmp_path, f"{split}/images/{number}.tif", raster.encode(image, None, None, transform))
        write(tmp_path, f"{split}/masks/{number}.tif", raster.encode(mask[:, :, None], None, None, transform))
    for more in ({}, {"tile": 64}):
        facts = open_dataset(
            run(tmp_path, tmp_path / f"ds{len(more)}", "masks", mask_values=(0, 1), **more).dataset
        ).manifest
        assert [overlap.pairs for overlap in facts.overlaps] == [2] * pairs and facts.crs == {}
    rows = rows_of(tmp_path / "ds1")
    assert {raster.profile(row["image"]["bytes"]).transform[2] for row in rows} >= {origin}


def test_damage_is_set_aside_and_empty_windows_are_counted(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "s"))
    for name, data in (("cut", (copy / "images/c.tif").read_bytes()[:3000]), ("text", b"no scene")):
        write(copy, f"images/{name}.tif", data)
        write(copy, f"masks/{name}.tif", (copy / "masks/c.tif").read_bytes())
    write(copy, "images/size.tif", (copy / "images/c.tif").read_bytes())
    write(copy, "masks/size.tif", raster.encode(np.zeros((9, 9, 1), np.uint8)))
    done = run(copy, tmp_path / "ds", max_bad=0.7, drop_empty=True, **TILED | {"tile": 128})
    reasons = asides(tmp_path / "ds")
    assert reasons["images/text.tif"] == "not_an_image" and reasons["images/size.tif"] == "mask_size"
    assert {r for path, r in reasons.items() if path.startswith("images/cut")} == {"damaged"}
    (said,) = [w for w in done.warnings if "without a valid pixel" in w]
    assert int(said.split()[0]) == 7 * 2, "columns 0 and 64 of scene a end before its data begins"
    again = run(copy, tmp_path / "ds", append=True, drop_empty=True, **TILED | {"tile": 128})
    assert again.new_rows == 0


def test_a_small_scene_of_all_values_is_set_aside(tmp_path):
    full, mask = np.arange(256, dtype=np.uint8).reshape(16, 16, 1), np.eye(16, dtype=np.uint8)[:, :, None]
    for name, pixels in (("full", full), ("free", full // 2)):
        write(tmp_path / "s", f"images/{name}.tif", raster.encode(pixels))
        write(tmp_path / "s", f"masks/{name}.tif", raster.encode(mask))
    done = run(tmp_path / "s", tmp_path / "ds", "masks", tile=20, max_bad=0.5)
    assert (done.rows, done.reasons) == (1, {"unsupported": 1})


@pytest.mark.parametrize("more", [{}, {"tile": 16}])
def test_masks_that_lie_elsewhere_get_a_note(tmp_path, more):
    cases = {
        "away": (wkt(), place(50, 0)), "coarse": (wkt(), place(0, 0, 20.0)), "zone": (wkt(32633), place(0, 0)),
        "same": (wkt(), place(0.01, 0)), "silent": (None, raster.PIXELS), "no_crs": (None, place(50, 0)),
    }  # fmt: skip
    image, mask = scene(0, 32, 32)
    for name, (crs, where) in cases.items():
        write(tmp_path / "s", f"images/{name}.tif", raster.encode(image, None, wkt(), place(0, 0)))
        write(tmp_path / "s", f"masks/{name}.tif", raster.encode(mask[:, :, None], None, crs, where))
    done = run(tmp_path / "s", tmp_path / "ds", "masks", split_by="scene", mask_values=(0, 1), **more)
    facts = open_dataset(str(tmp_path / "ds")).manifest
    assert facts.notes.reasons == {"mask_place": 3 * facts.rows // 6} and done.quarantined == 0
    assert any("mask_place (the mask's georeference is not the image's" in line for line in done.warnings)


@pytest.mark.parametrize("more", [{}, {"tile": 32}, {"split_by": "scene"}])
def test_places_that_cannot_be_compared_are_told(tmp_path, more):
    from rasterio.crs import CRS

    local = CRS.from_string('LOCAL_CS["site",UNIT["metre",1]]').to_wkt()
    far = (1.0, 0.0, 5e9, 0.0, -1.0, 5e10)
    for number, (crs, where) in enumerate(
        [(local, place(0, 0)), (wkt(), far), (wkt(), place(0, 0)), (wkt(32633), far)]
    ):
        image, mask = scene(number, 32, 32)
        write(tmp_path / "s", f"images/{number}.tif", raster.encode(image, None, crs, where))
        write(tmp_path / "s", f"masks/{number}.tif", raster.encode(mask[:, :, None], None, crs, where))
    done = run(tmp_path / "s", tmp_path / "ds", "masks", split="50/50", mask_values=(0, 1), **more)
    (said,) = [w for w in done.warnings if "other coordinate systems" in w]
    assert done.rows == 4 and said.startswith("3 images are not compared") and "such as images/0.tif" in said


def test_options_that_do_not_go_together_are_refused(source, tmp_path):
    for said, more in (
        ("--overlap goes with --tile", {"overlap": 4}),
        ("--split-by block goes with --tile", {"split_by": "block"}),
        ("expected less than --tile 64", {"tile": 64, "overlap": 64}),
        ("needs --block", {"tile": 64, "split_by": "block"}),
        ("at least one tile", {"tile": 64, "split_by": "block", "block": "10"}),
        ("so blocks have 0.5 px; expected at least .* give 640map", {"tile": 64, "split_by": "block", "block": "5map"}),
        ("expected pixels", {"tile": 64, "split_by": "block", "block": "big"}),
        ("goes with --split-by block", {"tile": 64, "block": "100"}),
    ):
        with pytest.raises(ConfigError, match=said):
            run(source, tmp_path / "ds", "masks", **more)


def test_a_random_split_of_overlapping_tiles_is_told_and_places_are_silent(shared_data, tmp_path):
    folder = shared_data("pv4band")
    random = run(folder, tmp_path / "a", "masks", mask_values=(0, 1))
    (overlap,) = open_dataset(random.dataset).manifest.overlaps
    assert overlap.splits == ("train", "val") and overlap.pairs >= 1
    (told,) = [w for w in random.warnings if "lie on each other" in w]
    assert overlap.example[0] in told and "--split-by scene" in told
    split = {r["image"]["path"]: r["split"] for r in rows_of(tmp_path / "a", "image.path")}
    assert [split[path] for path in overlap.example] == ["train", "val"]
    places = run(folder, tmp_path / "b", "masks", mask_values=(0, 1), split_folders={"other_place": "val"})
    assert not open_dataset(places.dataset).manifest.overlaps
    together = run(folder, tmp_path / "c", "masks", mask_values=(0, 1), split_by="scene")
    assert not open_dataset(together.dataset).manifest.overlaps
    assert "band 4 is 255 everywhere: leave it out with data.bands=[1,2,3]" in places.warnings
    table = pq.read_table(tmp_path / "b" / open_dataset(places.dataset).manifest.footprints.path).to_pylist()
    assert len(table) == 39 and {row["place"] for row in table} == {"EPSG:3826"}


def test_the_same_ground_in_other_years_is_told(shared_data, tmp_path):
    done = run(shared_data("naip4"), tmp_path / "ds", "masks", mask_values=(0, 1))
    overlaps = {o.splits for o in open_dataset(done.dataset).manifest.overlaps}
    assert ("train", "test") in overlaps


@pytest.mark.chaos
def test_killed_while_tiles_are_written_and_started_again(tmp_path):
    for i in range(6):
        image, mask = scene(i, 700, 600)
        write(tmp_path, f"s/images/{i}.tif", raster.encode(image, None, wkt(), place(2000 * i, 0)))
        write(tmp_path, f"s/masks/{i}.tif", raster.encode(mask[:, :, None]))
    options = {"source": str(tmp_path / "s"), "to": str(tmp_path / "ds"), "concurrency": 0, "shard_mb": 8, **TILED}
    command = [sys.executable, "-c", _COMMAND, json.dumps(options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("ingesting") and int(line.split()[1]) > 20:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    _, skipped, fingerprint = again.stdout.splitlines()[-1].split()
    assert int(skipped) >= 1
    assert fingerprint == run(tmp_path / "s", tmp_path / "quiet", shard_mb=8, **TILED).fingerprint
