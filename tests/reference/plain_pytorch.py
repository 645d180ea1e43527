"""The same work without scalecv: a plain PyTorch script, as its tutorials write it. Measured against, never imported.

    python -m tests.reference.plain_pytorch FOLDER --epochs 30 --size 64 --batch 64 --threads 2 --json

FOLDER holds train/CLASS/*.png and val/CLASS/*.png. ResNet-18, AdamW, warm-up and cosine, label smoothing,
and the augmentation of experiments/gtsrb_resnet18.yaml in torchvision's own transforms.
"""

import argparse
import json
import math
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2


def loader(folder: str, size: int, batch: int, workers: int, is_training: bool) -> DataLoader:
    steps = [v2.RGB(), v2.ToImage(), v2.Resize((size, size), antialias=True)]
    if is_training:
        steps += [v2.RandomAffine(10, (0.08, 0.08), (0.85, 1.15), interpolation=v2.InterpolationMode.BILINEAR)]
        steps += [v2.ColorJitter(brightness=0.4, contrast=0.4)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.33, 0.31, 0.32], [0.27, 0.26, 0.27])]
    data = datasets.ImageFolder(folder, v2.Compose(steps))
    return DataLoader(data, batch, shuffle=is_training, num_workers=workers, persistent_workers=workers > 0)


@torch.no_grad()
def macro_accuracy(model: nn.Module, batches: DataLoader, classes: int) -> float:
    model.eval()
    hits, rows = torch.zeros(classes), torch.zeros(classes)
    for image, label in batches:
        right = (model(image).argmax(1) == label).float()
        hits.index_add_(0, label, right)
        rows.index_add_(0, label, torch.ones_like(right))
    model.train()
    return float((hits[rows > 0] / rows[rows > 0]).mean())


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("folder")
    for name, default in (("epochs", 30), ("size", 64), ("batch", 64), ("threads", 2), ("workers", 2), ("seed", 0)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--json", action="store_true")
    args = ask.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train = loader(f"{args.folder}/train", args.size, args.batch, args.workers, True)
    val = loader(f"{args.folder}/val", args.size, args.batch, args.workers, False)
    classes = len(train.dataset.classes)
    model = models.resnet18(num_classes=classes)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}], 2e-3)
    total, warmup = args.epochs * len(train), 2 * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * max(0, s - warmup) / max(1, total - warmup)))
        ),
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    best, speeds = 0.0, []
    for _ in range(args.epochs):
        began, seen = time.perf_counter(), 0
        for image, label in train:
            optimizer.zero_grad()
            loss_of(model(image), label).backward()
            optimizer.step()
            schedule.step()
            seen += len(label)
        speeds.append(seen / (time.perf_counter() - began))
        best = max(best, macro_accuracy(model, val, classes))
    speeds.sort()
    told = {"macro_accuracy": best, "images_per_s": speeds[len(speeds) // 2]}
    print(json.dumps(told) if args.json else told)


if __name__ == "__main__":
    main()
