"""What a large scene takes: time and peak memory of ingest and prediction, against the size of its pixels.

    python -m tests.reference.scene_bench --side 8000 --folder /tmp/scene-bench

A made scene of `side` x `side` pixels, 4 bands of 16 bits, is written by rows, cut into 256 px tiles, and predicted
with a ResNet-18 U-Net of random weights. Memory is the largest resident set of the process and of its children.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from scalecv import raster
from tests.shards.scenes import place, wkt

STRIP_PX = 500


def make(folder: Path, side: int) -> None:
    """images/a.tif and masks/a.tif, tiled in blocks of 512 px."""
    rng = np.random.default_rng(0)
    for kind, bands, dtype in (("images", 4, "uint16"), ("masks", 1, "uint8")):
        (folder / "scenes" / kind).mkdir(parents=True, exist_ok=True)
        path = str(folder / "scenes" / kind / "a.tif")
        with raster.create(path, (side, side), bands, dtype, None, wkt(), place(0, 0)) as write:  # type: ignore[arg-type]
            for top in range(0, side, STRIP_PX):
                shape = (bands, min(STRIP_PX, side - top), side)
                write(top, rng.integers(0, 2 if kind == "masks" else 3000, shape).astype(dtype))


def bundle(folder: Path) -> str:
    """A U-Net of random weights."""
    from scalecv.artifacts.bundle import Call, DataFacts, PixelFacts, parts
    from scalecv.models import build_model

    call = {"arch": "unet", "encoder": "resnet18", "in_channels": 4, "outputs": 1, "stem": "default", "norm": "batch"}
    pixels = {"bands": None, "color": "native", "channels": 4, "dtype": "float32", "source_dtype": "uint16"}
    more = {"size_px": None, "resize": "stretch", "mean": (1500.0,) * 4, "std": (870.0,) * 4, "mask_values": (0, 1)}
    files = parts(
        build_model(**call).state_dict(),  # type: ignore[arg-type]
        name="bench",
        task="segment",
        call=Call(**call),  # type: ignore[arg-type]
        pixels=PixelFacts(**pixels, **more),  # type: ignore[arg-type]
        classes=("a", "b"),
        data=DataFacts(uri="-", version=0, fingerprint="-"),
    )
    (folder / "bundle").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / "bundle" / name).write_bytes(data)
    return str(folder / "bundle")


TIMED = """
import json, resource, sys, time
began = time.monotonic()
from scalecv.cli.main import app
app(sys.argv[1:], standalone_mode=False)
own, child = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"seconds": round(time.monotonic() - began, 1), "peak_mb": own, "child_peak_mb": child}))
"""


def timed(*command: str) -> dict[str, float]:
    """Time and memory of one command, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TIMED, *command], stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """Make, ingest, predict, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=8000)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    make(args.folder, args.side)
    model, scenes = bundle(args.folder), str(args.folder / "scenes")
    out = {"decoded_mb": args.side**2 * 8 >> 20}
    tiles = ("--layout", "masks", "--tile", "256", "--overlap", "32", "--concurrency", "0", "-q")
    out["ingest"] = timed("ingest", scenes, "--to", str(args.folder / "data"), *tiles)  # type: ignore[assignment]
    image, to = f"{scenes}/images/a.tif", str(args.folder / "predicted")
    out["predict"] = timed("predict", model, image, "--to", to, "--concurrency", "0", "-q")  # type: ignore[assignment]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
