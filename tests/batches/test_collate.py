"""A batch is what Pillow and torchvision would make of its rows, whatever road its bytes took."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from scalecv.batches import collate, memory, samples
from scalecv.batches.collate import Row
from scalecv.batches.pixels import Pixels
from scalecv.batches.transforms import crop_box, draws
from scalecv.config import Augment
from scalecv.errors import DataError, IntegrityError
from scalecv.schema import IGNORE
from scalecv.shards.decode import decode_image
from tests.jpeg.test_turbo import picture
from tests.shards.images import encoded


def pixels(size_px=24, **augment):
    return Pixels(
        bands=None, color="rgb", channels=3, dtype="uint8", source_dtype="uint8", size_px=size_px, resize="stretch",
        mean=(0.0,) * 3, std=(1.0,) * 3, classes=("a", "b"), augment=Augment(**augment),
    )  # fmt: skip


def rows(kinds=("JPEG", "PNG"), sizes=((60, 44), (32, 90), (40, 40))):
    made = []
    for seed in range(12):
        data = encoded(picture(*sizes[seed % len(sizes)], seed=seed), kinds[seed % len(kinds)])
        made.append(Row(str(seed), f"{seed}.x", "here", data, None, None, "ab"[seed % 2]))
    return made


def batch(how, some, seeds=(3, 1)):
    with ThreadPoolExecutor(2) as pool:
        return collate.fill(some, how, seeds, pool, 4).wait()


def test_crops_and_flips_are_those_of_torchvision():
    how, some = pixels(resized_crop=(0.1, 1.0), hflip=0.5), rows()
    made, took = batch(how, some)
    assert made["image"].is_contiguous(memory_format=torch.channels_last) and took > 0
    assert made["label"].tolist() == [0, 1] * 6
    for row, image in zip(some, made["image"], strict=True):
        whole = torch.from_numpy(np.array(decode_image(row.image).pixels)).permute(2, 0, 1)
        u = draws(3, 1, row.id)
        expected = F.resized_crop(whole, *crop_box(*whole.shape[1:], (0.1, 1.0), u), [24, 24], antialias=True)
        assert torch.equal(image, expected.flip(-1) if u[4] < 0.5 else expected)


def test_without_augmentation_the_whole_picture_is_resized():
    some = rows()
    made, _ = batch(pixels(), some, None)
    for row, image in zip(some, made["image"], strict=True):
        whole = torch.from_numpy(np.array(decode_image(row.image).pixels)).permute(2, 0, 1)
        assert torch.equal(image, F.resize(whole, [24, 24], antialias=True))


def test_pictures_of_their_own_size_are_taken_as_they_are_and_must_agree():
    some = rows(sizes=((30, 20),))
    made, _ = batch(pixels(size_px=None), some)
    assert made["image"].shape == (12, 3, 30, 20)
    assert np.array_equal(made["image"][0].permute(1, 2, 0).numpy(), decode_image(some[0].image).pixels)
    with pytest.raises(DataError, match=r"set data\.size_px"):
        batch(pixels(size_px=None), rows())


def test_gray_and_rgb_pictures_make_one_batch():
    gray = encoded(PIL.Image.new("L", (50, 30), 77), "JPEG")
    made, _ = batch(pixels(resized_crop=(0.5, 1.0)), [Row("g", "g", "here", gray, None, None, "a"), *rows()[:3]])
    assert made["image"].shape == (4, 3, 24, 24) and made["image"][0].float().std() == 0


def test_memory_comes_back_when_nobody_holds_it():
    blocks = memory.Blocks(2)
    one = blocks.tensor((4, 8), np.dtype("int16"))
    place, view = one.data_ptr(), one[2:].permute(1, 0)
    del one
    other = blocks.tensor((4, 8), np.dtype("int16"))
    assert other.data_ptr() != place and view.data_ptr() == place + 2 * 8 * 2
    held = view.numpy()
    del view
    assert blocks.tensor((4, 8), np.dtype("int16")).data_ptr() != place
    assert held.shape == (8, 2)
    del held
    assert place in {blocks.tensor((4, 8), np.dtype("int16")).data_ptr() for _ in range(1)}
    several = [blocks.tensor((5,), np.dtype("uint8")) for _ in range(6)]
    several.clear()
    assert len(blocks._free) == 2


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64"])
def test_masks_become_numbers_of_classes_whatever_holds_them(dtype):
    values = np.array([[7, 0, 255], [255, 9, 7]], dtype)
    how = dataclasses.replace(pixels(), mask_values=(0, 7, 9), mask_ignore=255)
    assert samples._classes(values, how).tolist() == [[1, 0, IGNORE], [IGNORE, 2, 1]]
    declared = dataclasses.replace(how, mask_values=(0, 7, 9, 255))
    assert samples._classes(values, declared).tolist() == [[1, 0, 3], [3, 2, 1]], (
        "a class, though it is the ignored one"
    )
    with pytest.raises(IntegrityError, match=r"holds the value 9, .* \[0, 7\]"):
        samples._classes(values, dataclasses.replace(how, mask_values=(0, 7)))
    if dtype == "int64":
        assert samples._classes(np.array([[-3]]), dataclasses.replace(how, mask_values=(-3,))).tolist() == [[0]]
