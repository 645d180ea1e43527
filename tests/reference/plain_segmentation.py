"""Segmentation without scalecv: a plain PyTorch script, as its tutorials write it. Measured against, never imported.

    python -m tests.reference.plain_segmentation FOLDER --epochs 60 --batch 4 --seed 0 --json

FOLDER holds train/images, train/masks and test/images, test/masks: TIFF of any bands, masks of 0 and 1. Unet over
ResNet-18 with the loss, optimiser, schedule and augmentation of experiments/water_unet.yaml. The score is the IoU of
class 1 over all pixels of `test`, at probability 0.5, with the weights of the last epoch.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import rasterio
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


def read(path: Path) -> torch.Tensor:
    with rasterio.open(path) as file:
        return torch.from_numpy(file.read().astype(np.float32))


class Tiles(Dataset):
    def __init__(self, folder: Path, mean: torch.Tensor | None = None, std: torch.Tensor | None = None) -> None:
        names = sorted(path.name for path in (folder / "images").iterdir())
        images = torch.stack([read(folder / "images" / name) for name in names])
        self.masks = torch.stack([read(folder / "masks" / name)[0] for name in names])
        self.is_training = mean is None
        self.mean = images.mean((0, 2, 3)) if mean is None else mean
        self.std = images.std((0, 2, 3)).clamp_min(1e-6) if std is None else std
        self.images = (images - self.mean[:, None, None]) / self.std[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = self.images[row], self.masks[row]
        if self.is_training:
            for side in (-1, -2):
                if random.random() < 0.5:
                    image, mask = image.flip(side), mask.flip(side)
            turns = random.randrange(4)
            image, mask = image.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))
        return image, mask


def bce_and_dice(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found = logits.sigmoid()
    both, size = (found * mask).sum((1, 2)), (found + mask).sum((1, 2))
    dice = 1 - ((2 * both + 1) / (size + 1)).mean()
    return 0.5 * F.binary_cross_entropy_with_logits(logits, mask) + 0.5 * dice


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("folder", type=Path)
    for name, default in (("epochs", 60), ("batch", 4), ("threads", 2), ("seed", 0)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--json", action="store_true")
    args = ask.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    train = Tiles(args.folder / "train")
    test = Tiles(args.folder / "test", train.mean, train.std)
    batches = DataLoader(train, args.batch, shuffle=True)
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=train.images.shape[1], classes=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    steps = args.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    model.train()
    for _ in range(args.epochs):
        for image, mask in batches:
            optimizer.zero_grad()
            bce_and_dice(model(image)[:, 0], mask).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(test.images[i : i + 1])[:, 0] >= 0 for i in range(len(test))])
    truth = test.masks > 0.5
    iou = float((found & truth).sum() / (found | truth).sum())
    told = {"iou": iou, "minutes": (time.perf_counter() - began) / 60}
    print(json.dumps(told) if args.json else told)


if __name__ == "__main__":
    main()
