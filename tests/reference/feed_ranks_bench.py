"""The feed of two ranks beside that of one: images per CPU-second of each rank's process, in pairs.

    python -m tests.reference.feed_ranks_bench DATA/dataset --pairs 5

DATA is the folder of `make bench-feeds`, which makes the dataset. One rank has two decoding threads; then two ranks
have one each, at the same time. A rank takes 128 images a step, the work is that of `make bench-feeds`, and the second
epoch counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.reference.feeds.work import SIDE

ROOT = Path(__file__).parents[2]
BATCH = 128


def rank(uri: str, number: int, ranks: int) -> float:
    """Images per CPU-second of one rank in the second epoch."""
    from scalecv.batches.feed import Feed
    from scalecv.batches.pixels import pixels_of
    from scalecv.config import Augment, Data
    from scalecv.shards.store import open_dataset

    dataset = open_dataset(uri)
    how = Data(uri=uri, size_px=SIDE, augment=Augment(resized_crop=(0.08, 1.0), hflip=0.5))
    pixels = pixels_of(dataset.manifest, how, uri)
    about = {"is_training": True, "threads": 2 // ranks, "rank": number, "ranks": ranks}
    feed = Feed(dataset, "train", pixels, BATCH * ranks, **about)
    rate = 0.0
    with feed.epochs(0, 0, 2) as epochs:
        for epoch in epochs:
            began = time.process_time()
            images = sum(int(batch["valid"].sum()) for _, batch in epoch)
            rate = images / (time.process_time() - began)
    return rate


def together(uri: str, ranks: int) -> list[float]:
    """What ranks that run at the same time reach."""
    command = [sys.executable, "-m", __spec__.name, uri]
    started = [
        subprocess.Popen([*command, "--rank", str(number), str(ranks)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in range(ranks)
    ]
    return [json.loads(process.communicate()[0]) for process in started]


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("uri")
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--rank", type=int, nargs=2, help="number and count: this process is one")
    args = ask.parse_args()
    if args.rank:
        print(json.dumps(rank(args.uri, *args.rank)))
        return
    ratios = []
    for _ in range(args.pairs):
        (one,), two = together(args.uri, 1), together(args.uri, 2)
        ratios.append(statistics.mean(two) / one)
        print(f"one rank {one:.0f}, two {' and '.join(f'{each:.0f}' for each in two)}: {ratios[-1]:.3f}", flush=True)
    print(f"two ranks / one: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
