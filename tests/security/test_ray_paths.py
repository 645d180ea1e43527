"""What the workers of an ingest may import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards.images import class_folders


@pytest.mark.e2e
def test_an_ingest_on_ray_imports_nothing_that_lies_among_the_images(tmp_path):
    source = class_folders(tmp_path / "strangers", classes=1, each=8)
    for name in ("gzip", "sqlite3", "simplejpeg", "PIL", "numpy", "colorsys"):
        (source / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    command = [str(Path(sys.executable).with_name("scalecv")), "ingest", ".", "--layout", "imagefolder"]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "data"), "--concurrency", "1"],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
