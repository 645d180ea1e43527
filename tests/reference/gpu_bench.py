"""Training from shards against the same network fed from the device's own memory, on a GPU; and memory by precision.

    python -m tests.reference.gpu_bench --photos DATASET --tiles DATASET [--rounds 3] [--to docs/benchmarks/gpu.md]

PHOTOS is a dataset with labels, TILES one with masks and four bands (`scalecv ingest` makes both). Cases: ResNet-18 at
224 px with random crops, its JPEGs decoded by the CPU and by the GPU, and Unet with ResNet-34 at 256 px. In turns, each
for some seconds: scalecv's training from shards, and a plain loop of PyTorch (channels_last, autocast, fused AdamW,
cudnn.benchmark) on one batch that stays on the device, so that it waits for nothing. `--device cpu` with a small
`--batch` tries the script without a GPU.
"""

import argparse
import datetime
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from scalecv import config
from scalecv.models import build_model
from scalecv.shards.store import open_dataset
from scalecv.speed import trial

CASES = {
    "ResNet-18, 224 px": {
        "task": "classify", "model.arch": "resnet18", "data.size_px": 224,
        "data.augment.resized_crop": [0.08, 1.0], "data.augment.hflip": 0.5,
    },
    "ResNet-18, 224 px, the GPU decodes": {
        "task": "classify", "model.arch": "resnet18", "data.size_px": 224, "data.decode": "gpu",
        "data.augment.resized_crop": [0.08, 1.0], "data.augment.hflip": 0.5,
    },
    "Unet/ResNet-34, 256 px": {
        "task": "segment", "model.arch": "unet", "model.encoder": "resnet34", "data.size_px": 256,
        "data.augment.hflip": 0.5, "data.augment.vflip": 0.5,
    },
}  # fmt: skip


def experiment(keys: dict[str, object], data: str, batch: int, precision: str) -> config.Experiment:
    always = {
        "name": "gpu", "data.uri": data, "train.batch": batch, "train.precision": precision,
        "train.channels_last": True, "scale.workers": 0,
    }  # fmt: skip
    return config.build(config.with_overrides({}, {**always, **keys}), "gpu_bench")


def plain(one: config.Experiment, channels: int, outputs: int, device: torch.device, seconds: float) -> float:
    """Images per second of a loop that has its only batch on the device."""
    torch.backends.cudnn.benchmark = True
    size, batch = one.data.size_px, one.train.batch
    model = build_model(one.model.arch, encoder=one.model.encoder, in_channels=channels, outputs=outputs)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    image = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        target = model(image).float().argmax(1)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(one.train.precision)

    def step() -> None:
        with torch.autocast(device.type, kind) if kind else nullcontext():
            logits = model(image)
        torch.nn.functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    settle()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step()
        settle()
        steps += 5
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--photos", required=True)
    ask.add_argument("--tiles", required=True)
    ask.add_argument("--batch", type=int, default=256)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--seconds", type=float, default=20)
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--to", type=Path)
    args = ask.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    speeds, memory = [], []
    for (case, keys), data in zip(CASES.items(), (args.photos, args.photos, args.tiles), strict=True):
        dataset = open_dataset(data)
        channels = len(next(iter(dataset.manifest.stats.values())).mean)
        outputs = len(dataset.manifest.classes)
        one = experiment(keys, data, args.batch, "bf16")
        ratios, shards, waits = [], [], []
        for _ in range(args.rounds):
            limit = plain(one, channels, outputs, device, args.seconds)
            seen = trial.run(one, dataset, args.seconds)
            shards.append(seen.images_per_s)
            ratios.append(seen.images_per_s / limit)
            waits.append(seen.wait_share)
        median = statistics.median(ratios)
        speeds.append(
            f"| {case} | {statistics.median(shards):,.0f} | {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {statistics.median(waits):.1%} |"
        )
        for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trial.run(experiment(keys, data, args.batch, precision), dataset, 2.0)
            memory.append(f"| {case} | {precision} | {torch.cuda.max_memory_allocated() / 1e9:.2f} |")
    text = f"""# Training on a GPU

{datetime.date.today()}, {name}, bf16, batch {args.batch}, {args.rounds} pairs of {args.seconds:g} s.

| network | images/s from shards | by a plain loop fed from the device's memory (goal 0.95) | data wait |
|---|---|---|---|
{chr(10).join(speeds)}

| network | precision | peak memory, GB |
|---|---|---|
{chr(10).join(memory)}
"""
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
