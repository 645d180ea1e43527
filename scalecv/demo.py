"""`scalecv demo`: the whole way on 1,797 real scans of handwritten digits that scikit-learn carries.

Files are written, ingested, trained on, and a held-back split is scored; everything stays in one folder to
look at and to change. The scans are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak 1998, UCI, CC BY 4.0), 8x8 pixels with 17 levels of grey.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

EXPERIMENT = """\
# What `scalecv demo` ran. Change a line, then: scalecv train {folder}/experiment.yaml name=mine
name: demo
question: Does everything work here, from image files to a scored model?
task: classify
data:
  uri: {folder}/dataset
  size_px: 16
  augment: {{rotate_deg: 10, translate: 0.1, zoom: 0.1}}
model:
  arch: resnet10
  stem: small
train:
  epochs: 12
  batch: 64
  lr: 0.003
  weight_decay: 0.05
  warmup_epochs: 1
scale:
  workers: {workers}
track:
  storage: {folder}/runs
  experiment: demo
"""


@dataclass(frozen=True)
class Result:
    """What the demo did."""

    folder: str
    images: int
    dataset: str
    run_id: str | None
    bundle: str
    accuracy: float
    """On the held-back test split."""
    rows_scored: int
    metrics: dict[str, float]
    pictures: str


def demo(folder: str = "scalecv-demo", workers: int = 2, tell: Callable[[Event], None] = lambda _: None) -> Result:
    """Write, ingest, train, evaluate; the result, and everything it left in `folder`."""
    from scalecv import config
    from scalecv.serve.evaluate import evaluate
    from scalecv.shards.ingest import IngestOptions, ingest
    from scalecv.train.run import train

    def say(text: str) -> None:
        tell({"kind": "progress", "message": text})

    root = Path(folder).absolute()
    images = write_digits(root / "images")
    say(f"1/4  {images:,} scans written to {folder}/images, one folder for each digit")
    ingested = ingest(IngestOptions(source=str(root / "images"), to=str(root / "dataset"), layout="imagefolder"))
    say(f"2/4  ingested: {ingested.rows:,} rows, {ingested.quarantined} set aside, version {ingested.version}")
    file = root / "experiment.yaml"
    file.write_text(EXPERIMENT.format(folder=folder, workers=min(workers, os.cpu_count() or 1)))
    experiment = config.load(file)
    say(f"3/4  training on {experiment.scale.workers} workers")
    trained = train(experiment, new=True, tell=tell)
    scored = evaluate(trained.bundle, str(root / "dataset"), split="test", to=str(root / "report"))
    say(f"4/4  scored {scored.rows} held-back rows")
    return Result(
        folder=folder,
        images=images,
        dataset=str(root / "dataset"),
        run_id=trained.run_id,
        bundle=trained.bundle,
        accuracy=scored.metrics["test/accuracy"],
        rows_scored=scored.rows,
        metrics=trained.metrics,
        pictures=f"{folder}/report/pictures/test",
    )


def write_digits(to: Path) -> int:
    """The scans as PNG files, DIGIT/NUMBER.png; how many there are."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = to / str(digit) / f"{number:04d}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan * 15.9375).round().astype(np.uint8)).save(file)
    return len(digits.target)
