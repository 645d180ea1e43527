"""Hostile images: each is set aside for one named reason, from its header where it is large."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from scalecv.shards import decode
from tests.security import pictures

SMALL = pictures.small_cases()


@pytest.mark.parametrize("name", SMALL)
def test_a_hostile_image_is_set_aside(name, watched, listener):
    data = SMALL[name].replace(b"LISTENER", listener.url.encode())
    for decoder in (decode.decode_image, decode.decode_mask):
        with pytest.raises(decode.BadImage) as bad:
            decoder(data)
        assert bad.value.reason in decode.REASONS and len(bad.value.detail) < 300


@pytest.mark.parametrize("name", pictures.ODD)
def test_an_odd_image_is_decoded_as_one_picture_and_nothing_else(name, watched, listener):
    data = pictures.ODD[name](listener.url)
    assert decode.decode_image(data).pixels.shape[:2] == (4, 4)


def test_bombs_are_refused_from_their_header(watched):
    """In a process of its own, whose memory is looked at."""
    code = (
        "import resource, time, sys; from scalecv.shards import decode; from tests.security import pictures\n"
        "decode.decode_image(pictures.png(2, 2, bytes(14))); decode.decode_image(pictures.ODD['a TIFF'](''))\n"
        "bombs = {n: make() for n, make in pictures.BOMBS.items()}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name, data in bombs.items():\n"
        "    began = time.process_time()\n"
        "    try: decode.decode_image(data); print(name, 'decoded')\n"
        "    except decode.BadImage as bad: print(name, '|', bad.reason, '|', round(time.process_time() - began, 2))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    watched.on = False  # this process is ours
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=pictures.ROOT)
    *lines, grown_kb = done.stdout.splitlines()
    assert len(lines) == len(pictures.BOMBS), done.stderr
    for line in lines:
        _, reason, took_s = (part.strip() for part in line.split("|"))
        assert reason in ("too_large", "damaged", "truncated"), line
        assert float(took_s) < 1.0, line
    assert int(grown_kb) < 64 << 10


def test_a_large_plain_image_is_no_bomb():
    flat = Image.fromarray(np.zeros((4000, 4000), np.uint8))
    out = io.BytesIO()
    flat.save(out, "PNG")
    assert 16e6 / len(out.getvalue()) > decode.MAX_RATIO
    assert decode.decode_mask(out.getvalue()).shape == (4000, 4000)
