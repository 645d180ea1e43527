"""How often `scalecv compare` calls equal models different, and how often it finds a planted gain.

    python -m tests.reference.compare_bench --pairs 400
    python -m tests.reference.compare_bench --costs

Each pair is drawn anew: images with a difficulty that all models share, models that err on further images of their
own, and seeds that are a little better or worse throughout. Masks have areas of foreground that differ a hundredfold,
so that some images carry most of an IoU. A gain is planted as a shift of all images of one side.
"""

import argparse
import json
import time

import numpy as np

from scalecv.metrics.paired import draw, effect
from scalecv.metrics.pooled import metrics_of

SEED_SPREAD = {"classify": 0.05, "segment": 0.1}
"""Standard deviation of a seed's quality, in units of the images' own noise: about 0.012 of an accuracy or IoU."""


def _quality(rng, images, runs, gain, spread):
    """How well each run does on each image, in the units of a normal distribution: [runs, images]."""
    shared, own = rng.normal(size=images), rng.normal(size=(runs, images))
    return 1.0 + shared + 0.7 * own + spread * rng.normal(size=(runs, 1)) + np.reshape(gain, (runs, 1))


def classified(rng, images, runs, gain, spread):
    """Sums of a classifier of two classes, [runs][images, 6]."""
    label = rng.integers(0, 2, images)
    right = _quality(rng, images, runs, gain, spread) > 0
    hot = np.eye(2)[label]
    return [np.hstack([hot * one[:, None], hot, np.eye(2)[np.where(one, label, 1 - label)]]) for one in right]


def segmented(rng, images, runs, gain, spread):
    """Sums of a network for two classes on tiles of 256 px, a third of them empty, [runs][images, 6]."""
    pixels = 256 * 256
    area = np.where(rng.random(images) < 1 / 3, 0, np.exp(rng.normal(7, 1.2, images)).clip(20, pixels / 2)).round()
    found = []
    for one in _quality(rng, images, runs, gain, spread):
        hit = np.round(area / (1 + np.exp(-1.2 - 0.6 * one)))
        alarm = np.round(0.12 * np.where(area > 0, area, 150) * np.exp(-0.5 * one))
        called = np.minimum(hit + alarm, pixels)
        truths, calls = [pixels - area, area], [pixels - called, called]
        found.append(np.column_stack([pixels - area - (called - hit), hit, *truths, *calls]))
    return found


MADE = {"classify": (classified, "accuracy"), "segment": (segmented, "iou")}


def resampling_both(found, seeds, rng):
    """Whether the percentile bootstrap over seeds and images, paired in both, calls two configurations different."""
    apart = found.resampled[seeds:] - found.resampled[:seeds]
    picks = rng.integers(seeds, size=(seeds, apart.shape[1]))
    low, high = np.percentile(np.take_along_axis(apart, picks, 0).mean(0), (2.5, 97.5))
    return low > 0 or high < 0


def share(task, images, seeds, gain, spread, pairs, paired=True):
    """Shares of the pairs that are called different, the effect planted, and the median of the detectable ones."""
    make, name = MADE[task]
    metric = metrics_of(task, ["a", "b"])[name]
    gains = np.repeat([0.0, gain], seeds)
    b = {seed if paired else -1 - seed: [seeds + seed] for seed in range(seeds)}
    began, found, naive = time.perf_counter(), [], []
    for pair in range(pairs):
        rng = np.random.default_rng([pair, images, seeds])
        drawn = draw(make(rng, images, 2 * seeds, gains, spread), metric, seed=pair)
        found.append(effect(drawn, {seed: [seed] for seed in range(seeds)}, b))
        naive.append(resampling_both(drawn, seeds, rng))
    told = [one.p <= 0.05 for one in found]
    assert all((one.low > 0 or one.high < 0) == is_told for one, is_told in zip(found, told, strict=True))
    return {
        "task": task,
        "images": images,
        "seeds": seeds,
        "paired": paired,
        "seed_noise": spread,
        "gain": round(float(np.mean([one.value for one in found])), 4) if gain else 0.0,
        "told_different": round(float(np.mean(told)), 3),
        "told_by_resampling_both": round(float(np.mean(naive)), 3),
        "detectable": round(float(np.median([one.detectable for one in found])), 4),
        "s_per_pair": round((time.perf_counter() - began) / pairs, 3),
    }


def costs(rows, side_px=256, batch=16):
    """CPU seconds and bytes for each tile that is kept, and CPU seconds of a verdict on as many; one thread."""
    import torch

    from scalecv.tasks import TASKS
    from scalecv.tasks.rows import RowSums

    torch.set_num_threads(1)
    task, found = TASKS["segment"], RowSums(TASKS["segment"], rows, 0.5)
    logits, mask = torch.randn(batch, 1, side_px, side_px), torch.randint(0, 2, (batch, side_px, side_px))
    on_device, scored_s, kept_s = {"mask": mask, "valid": torch.ones(batch, dtype=torch.bool)}, 0.0, 0.0
    for at in range(50):
        ids = [f"{(at * batch + row) << 32:032x}" for row in range(batch)]
        raw = {"id": ids, "path": [f"{row}.tif" for row in ids], "valid": on_device["valid"]}
        began = time.process_time()
        task.score(logits, on_device)
        scored_s, began = scored_s + time.process_time() - began, time.process_time()
        found.add(raw, on_device, logits)
        kept_s += time.process_time() - began
    held = sum(values.nbytes for part in found._parts for values in part.values())
    rng = np.random.default_rng(0)
    began = time.process_time()
    metric = metrics_of("segment", ["a", "b"])["iou"]
    effect(draw(segmented(rng, rows, 2, np.zeros(2), 0.0), metric), {0: [0]}, {0: [1]})
    return {
        "tile_px": side_px,
        "ms_to_score_a_tile": round(1000 * scored_s / 50 / batch, 3),
        "ms_to_keep_it": round(1000 * kept_s / 50 / batch, 3),
        "bytes_held_for_it": round(held / 50 / batch),
        "images": rows,
        "s_for_a_verdict": round(time.process_time() - began, 2),
    }


CASES = (
    (50, 1, True),
    (512, 1, True),
    (512, 2, True),
    (512, 3, True),
    (512, 3, False),
    (512, 5, True),
    (2000, 3, True),
)

if __name__ == "__main__":
    wanted = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted.add_argument("--pairs", type=int, default=400, help="of equal models; a quarter as many with a gain")
    wanted.add_argument("--costs", action="store_true", help="what keeping rows and a verdict cost, and nothing else")
    asked = wanted.parse_args()
    if asked.costs:
        for rows in (10_000, 200_000):
            print(json.dumps(costs(rows)), flush=True)
        raise SystemExit
    for task, spread in SEED_SPREAD.items():
        for images, seeds, paired in CASES:
            for gain in (0.0, 0.1, 0.3):  # in standard deviations of an image's noise
                pairs = asked.pairs // 4 if gain else asked.pairs
                told = share(task, images, seeds, gain, spread if seeds > 1 else 0.0, pairs, paired)
                print(json.dumps(told), flush=True)
        print(json.dumps(share(task, 512, 3, 0.0, 0.0, asked.pairs)), flush=True)
        print(json.dumps(share(task, 512, 1, 0.0, spread, asked.pairs)), flush=True)
