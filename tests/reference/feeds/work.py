"""The work that every feed does: encoded JPEGs -> shuffled uint8 batches of random crops, half of them mirrored."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 224

Epochs = Callable[[int], Iterator[tuple[Any, Any]]]
"""epoch -> (pixels uint8 [B, 224, 224, 3] or [B, 3, 224, 224], numbers of the images [B])."""


@dataclass(frozen=True)
class Store:
    """An S3 server and where the formats lie in it."""

    endpoint: str
    key: str
    secret: str
    bucket: str
    """Without s3://."""

    @property
    def environment(self) -> dict[str, str]:
        """The usual variables."""
        keys = {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true", **keys}


@dataclass(frozen=True)
class Work:
    """One row's task."""

    data: str
    """Folder with a folder for each format."""
    images: int
    batch: int
    workers: int
    """Processes or threads that decode."""
    store: Store | None = None

    def place(self, form: str) -> str:
        """Where a format lies: a path, or an s3:// URI."""
        return f"s3://{self.store.bucket}/{form}" if self.store else str(Path(self.data) / form)

    def names(self, form: str, pattern: str) -> list[str]:
        """Names of a format's files, sorted."""
        folder = Path(self.data) / form
        return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the opposite of `work_of`."""
        return asdict(self)


def work_of(values: dict[str, Any]) -> Work:
    """The record that `as_dict` took apart."""
    store = Store(**values["store"]) if values["store"] else None
    return Work(**(values | {"store": store}))


def number_of(name: str) -> int:
    """The number of an image, from its path; cheaply, for some rows ask in the thread that training would run in."""
    return int(name.rpartition("/")[2].partition(".")[0])


def draw_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width, height of a crop: a share of 0.08 to 1 of the area, a ratio of 3:4 to 4:3, cut to fit."""
    area = (0.08 + 0.92 * draws[0]) * width * height
    ratio = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    return int(draws[2] * (width - w + 1)), int(draws[3] * (height - h + 1)), w, h


def decode_crop(data: bytes, draws: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [224, 224, 3] with the fastest pair of libraries that come as wheels: simplejpeg and OpenCV."""
    import cv2
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(data, "RGB")
    left, top, width, height = draw_box(pixels.shape[1], pixels.shape[0], draws)
    part = pixels[top : top + height, left : left + width]
    out = cv2.resize(part, (SIDE, SIDE), dst=out, interpolation=cv2.INTER_LINEAR)
    return cv2.flip(out, 1, dst=out) if draws[4] < 0.5 else out


class Decode:
    """`decode_crop` with draws of its own in each process and thread."""

    def __init__(self) -> None:
        self._rng: np.random.Generator | None = None

    def __call__(self, data: bytes) -> np.ndarray:
        if self._rng is None:
            import cv2

            cv2.setNumThreads(1)
            self._rng = np.random.default_rng()
        return decode_crop(data, self._rng.random(5))

    def __getstate__(self) -> dict[str, Any]:
        return {"_rng": None}
