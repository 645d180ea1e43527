"""Hostile and odd images, made by code."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def chunk(kind, data, crc=None):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(width, height, raw, depth=8, color=2, extra=b"", packed=None):
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = zlib.compress(raw, 9) if packed is None else packed
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def encoded(kind, size=(4, 4), mode="RGB", **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


def tiff(entries, body=b"", order="<", after=0):
    """A classic TIFF of one directory: entries of (tag, type, count, value or offset)."""
    head = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(order + "I", 8)
    out = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        out += struct.pack(order + "HHII", tag, kind, count, value)
    return head + out + struct.pack(order + "I", after) + body


def tiff_of(width, height, bands=1, bits=8, compression=1, offset=200, size=16, after=0, extra=(), body=bytes(400)):
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, offset),
        (277, 3, 1, bands),
        (278, 4, 1, height),
        (279, 4, 1, size),
        *extra,
    ]
    return tiff(sorted(entries), body, after=after)


VRT = (
    b'<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    b"<SourceFilename>/vsicurl/LISTENER/x.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
)
PYTHON_VRT = VRT.replace(
    b"<SimpleSource>",
    b"<PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionType>os.system</PixelFunctionType><SimpleSource>",
)
WMS = b'<GDAL_WMS><Service name="TMS"><ServerUrl>LISTENER/${z}</ServerUrl></Service></GDAL_WMS>'


def small_cases():
    """Files that are refused; LISTENER stands for the URL of somebody who must not be called."""
    good, jpeg = png(4, 4, bytes(13 * 4)), encoded("JPEG")
    huge = struct.pack(">IIBBBBB", 1 << 31, 1 << 31, 8, 2, 0, 0, 0)
    return {
        "nothing": b"",
        "a VRT": VRT,
        "a VRT behind white space": b"\n\n   " + VRT,
        "a VRT with Python": PYTHON_VRT,
        "a VRT as TIFF": b"II*\x00" + VRT,
        "a WMS description": WMS,
        "a GDAL service name": b"WMS:LISTENER?SERVICE=WMS",
        "a GDAL subdataset": b"GTIFF_DIR:1:/vsicurl/LISTENER/x.tif",
        "a path of GDAL": b"/vsicurl/LISTENER/x.tif",
        "a driver's DERIVED name": b"DERIVED_SUBDATASET:AMPLITUDE:/vsicurl/LISTENER/x.tif",
        "an ERDAS header": b"EHFA_HEADER_TAG\x00" + bytes(100),
        "a HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(200),
        "a FITS file": b"SIMPLE  =                    T" + b" " * 2850,
        "a PDF": b"%PDF-1.7\n1 0 obj << /Type /Catalog /OpenAction << /S /URI /URI (LISTENER) >> >>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(touch PWNED) system\n",
        "an SVG with a link": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="LISTENER/x.png"/></svg>',
        "XML with an entity": b'<!DOCTYPE x [<!ENTITY e SYSTEM "LISTENER/x">]><x>&e;</x>',
        "an ImageMagick script": b"push graphic-context\nfill 'url(LISTENER/x|touch PWNED)'\npop graphic-context\n",
        "a zip": b"PK\x03\x04" + bytes(60),
        "a pickle": b"cos\nsystem\n(Vtouch PWNED\ntR.",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "an icon of PNGs": encoded("ICO", (16, 16)),
        "a Photoshop file": b"8BPS\x00\x01" + bytes(60),
        "JPEG 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(60),
        "PNG without data": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        "PNG of 2^31 squared": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IEND", b""),
        "PNG of no pixels": png(0, 4, b""),
        "PNG whose data is cut": png(4, 4, b"", packed=zlib.compress(bytes(52))[:-6]),
        "PNG with a chunk of 2 GB": good[:33] + struct.pack(">I", 0x7FFFFFFF) + b"tEXt" + b"x" * 50,
        "PNG with a wrong checksum": good[:29] + b"\x00\x00\x00\x00" + good[33:],
        "PNG whose data are no zlib stream": png(4, 4, b"", packed=b"\xff" * 40),
        "PNG with a bomb of text": png(
            4, 4, bytes(52), extra=chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(80 << 20), 9))
        ),
        "JPEG cut": jpeg[: len(jpeg) // 3],
        "JPEG of 65535 squared": jpeg.replace(b"\x08\x00\x04\x00\x04", b"\x08\xff\xff\xff\xff"),
        "GIF of 65535 squared": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,"
        b"\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02L\x01\x00;",
        "BMP of 2^30 squared": encoded("BMP")[:18] + struct.pack("<ii", 1 << 30, 1 << 30) + encoded("BMP")[26:],
        "BMP with a negative width": encoded("BMP")[:18] + struct.pack("<ii", -4, 4) + encoded("BMP")[26:],
        "WebP with a length of 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(40),
        "TIFF without a directory": b"II*\x00\x00\x00\x00\x00",
        "TIFF whose directory is far away": b"II*\x00\xff\xff\xff\x7f" + bytes(40),
        "TIFF whose directory holds 65535 entries": b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(60),
        "TIFF of 2^31 squared": tiff_of(1 << 31, 1 << 31),
        "TIFF of 65535 bands": tiff_of(4000, 4000, bands=65535),
        "TIFF whose data are far away": tiff_of(4, 4, offset=1 << 30),
        "TIFF of an unknown compression": tiff_of(4, 4, compression=60000),
        "TIFF whose strips overlap the end": tiff_of(1000, 1000, offset=300, size=1 << 20),
        "TIFF of no pixels": tiff_of(0, 4),
        "BigTIFF with a far directory": b"II+\x00\x08\x00\x00\x00" + b"\xff" * 8,
    }


def _gif(frames):
    out = io.BytesIO()
    pages = [Image.new("L", (4, 4), n % 200) for n in range(frames)]
    pages[0].save(out, "GIF", save_all=True, append_images=pages[1:])
    return out.getvalue()


def _looped():
    """A TIFF whose next directory is its first."""
    return tiff_of(4, 4, after=8)


def _geotiff(url, **profile):
    from rasterio.io import MemoryFile

    with MemoryFile() as file:
        with file.open(driver="GTiff", width=4, height=4, count=1, dtype="uint8", **profile) as out:
            out.write(np.zeros((1, 4, 4), np.uint8))
            out.update_tags(SOURCE=f"/vsicurl/{url}/x.tif", AREA_OR_POINT=url)
        return file.read()


ODD = {
    "a TIFF": lambda url: tiff_of(4, 4),
    "a TIFF whose directories go in a circle": lambda url: _looped(),
    "a GeoTIFF that names a URL": _geotiff,
    "a GeoTIFF whose projection names a grid of the net": lambda url: _geotiff(
        url, crs=f"+proj=longlat +ellps=bessel +nadgrids={url}/grid.gsb +no_defs"
    ),
    "a GIF of 500 frames": lambda url: _gif(500),
    "a PNG with a pickle behind it": lambda url: png(4, 4, bytes(52)) + b"cos\nsystem\n(Vtouch PWNED\ntR.",
    "a PNG with a zip behind it": lambda url: png(4, 4, bytes(52)) + b"PK\x05\x06" + bytes(18),
    "a PNG with XMP that links": lambda url: png(
        4, 4, bytes(52), extra=chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + f"<x href='{url}'/>".encode())
    ),
    "a JPEG whose orientation is 65535": lambda url: encoded(
        "JPEG",
        exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\xff\xff\x00\x00" + bytes(4),
    ),
    "a JPEG whose EXIF goes in a circle": lambda url: encoded(
        "JPEG",
        exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x69\x87\x04\x00\x01\x00\x00\x00\x08\x00\x00\x00" + bytes(4),
    ),
}


def _rows(width, height, bytes_per_pixel):
    """The rows of a blank PNG, packed as small as they get, without holding all of them."""
    packer, row = zlib.compressobj(9), bytes(1 + width * bytes_per_pixel)
    return b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])


def _blank(width, height, color=2, depth=8):
    bytes_per_pixel = {0: 1, 2: 3, 6: 4}[color] * (depth // 8)
    return png(width, height, b"", depth=depth, color=color, packed=_rows(width, height, bytes_per_pixel))


BOMBS = {
    "PNG, 11000 squared RGB": lambda: _blank(11000, 11000),
    "PNG, 9000 squared RGBA": lambda: _blank(9000, 9000, color=6),
    "PNG, 20000 squared gray": lambda: png(20000, 20000, bytes(100), color=0),
    "PNG, 10^6 by 1000": lambda: png(10**6, 1000, bytes(100)),
    "PNG, 4 by 2^31": lambda: png(4, (1 << 31) - 1, bytes(100), color=0),
    "GIF, 60000 squared": lambda: (
        b"GIF89a"
        + struct.pack("<HH", 60000, 60000)
        + b"\x00\x00\x00,"
        + struct.pack("<HHHH", 0, 0, 60000, 60000)
        + b"\x00\x02\x02L\x01\x00;"
    ),
    "BMP, 20000 squared": lambda: encoded("BMP")[:18] + struct.pack("<ii", 20000, 20000) + encoded("BMP")[26:],
    "JPEG, 60000 squared": lambda: encoded("JPEG").replace(b"\x08\x00\x04\x00\x04", b"\x08\xea\x60\xea\x60"),
    "TIFF, 100000 squared": lambda: tiff_of(100_000, 100_000),
    "TIFF, 11000 squared of 3 bands, packed": lambda: tiff_of(11000, 11000, bands=3, compression=8),
    "TIFF, 64 squared of 65535 bands of 8 bytes": lambda: tiff_of(64, 64, bands=65535, bits=64),
}
