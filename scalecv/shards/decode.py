"""Encoded bytes to pixels, or a reason why not.

Content decides, never the name. Limits are read from the header before a pixel is decoded, formats
come from a short list, and the image is always decoded to its end.
"""

import io
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scalecv import raster
from scalecv.jpeg import turbo
from scalecv.raster import Profile

Reason = Literal[
    "empty",
    "missing",
    "unreadable",
    "not_an_image",
    "unsupported",
    "truncated",
    "damaged",
    "too_large",
    "decoder_died",
    "timeout",
    "no_label",
    "no_mask",
    "mask_damaged",
    "mask_size",
    "mask_value",
]
REASONS: Final[tuple[str, ...]] = get_args(Reason)
"""Every reason for which a row is set aside."""

MAX_PIXELS = 128 * 1024 * 1024
MAX_DECODED_BYTES = 1 << 30
PLAIN_DECODED_BYTES = 256 << 20
MAX_RATIO = 500
"""Decoded by encoded bytes of an image that decodes to more than PLAIN_DECODED_BYTES; a larger share is a bomb."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may open; TIFF goes through rasterio."""

_ORIENTATION = 0x0112
TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_AS = {  # Pillow's mode -> mode that the pixels are given in; others are refused
    **{"L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "LA", "I": "I", "F": "F"},
    **{"P": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "1": "L", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB"},
}


class BadImage(ValueError):
    """Bytes that cannot become a sample, with the reason they are set aside for."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Image:
    """One decoded image."""

    pixels: NDArray[Any]
    """[H, W, C] in the dtype of the file; orientation applied, palettes and CMYK as RGB, 1 bit as 0 and 255."""
    format: str
    """PNG, JPEG, WEBP, GIF, BMP or TIFF, by content."""
    nodata: float | None
    """Value of pixels without data, as a raster says."""
    place: Profile | None = None
    """The header of a raster, with its georeference."""


def decode_image(data: bytes) -> Image:
    """The pixels of one image, decoded to the end; a raster's lie band by band in memory, which sums want.

    Raises: BadImage: empty, not an image, not a supported one, too large, cut or damaged.
    """
    if not data:
        raise BadImage("empty", "0 bytes")
    if data.startswith(TIFF):
        return _tiff(data)
    picture = _load(data)
    kind = "JPEG" if picture.format == "MPO" else str(picture.format)
    picture = _upright(picture)
    if not picture.mode.startswith("I;16"):
        if picture.mode not in _AS:
            raise BadImage("unsupported", f"pixels of mode {picture.mode}")
        picture.info.pop("transparency", None)  # the index of a see-through colour; it would only cause a warning
        if picture.mode != _AS[picture.mode]:
            picture = picture.convert(_AS[picture.mode])
    pixels = np.asarray(picture)
    if picture.mode == "I;16B":
        pixels = pixels.astype(np.uint16)
    return Image(pixels if pixels.ndim == 3 else pixels[:, :, None], kind, None)


def decode_pixels(data: bytes) -> NDArray[Any]:
    """[H, W, C] of bytes that are known good; the pixels that `decode_image` gives, sooner."""
    if data.startswith(TIFF):
        return _tiff(data, for_batches=True).pixels
    known = turbo.header(data)
    pixels = None if known is None else turbo.decode(data, known)
    return decode_image(data).pixels if pixels is None else pixels


def decode_mask(data: bytes) -> NDArray[Any]:
    """[H, W] of the numbers that a mask file stores: palette masks give their index numbers, 1-bit ones 0 and 1.

    Raises: BadImage: as `decode_image`; also several bands that differ, or numbers that are not whole.
    """
    if not data:
        raise BadImage("empty", "0 bytes")
    if data.startswith(TIFF):
        values = _tiff(data, for_batches=True).pixels
    else:
        picture = _upright(_load(data))
        if picture.mode in ("PA", "LA", "La"):
            picture = picture.getchannel(0)
        values = np.asarray(picture)
        if values.dtype == bool:
            values = values.astype(np.uint8)
    return class_numbers(values)


def class_numbers(values: NDArray[Any]) -> NDArray[Any]:
    """[H, W] of the numbers of a mask that was decoded as [H, W] or [H, W, C].

    Raises: BadImage: several bands that differ, or numbers that are not whole.
    """
    if values.ndim == 3:
        if any(not np.array_equal(values[..., 0], values[..., i]) for i in range(1, values.shape[-1])):
            raise BadImage("mask_damaged", f"{values.shape[-1]} bands that differ; a mask holds one band of numbers")
        values = values[..., 0]
    if values.dtype.kind == "f":
        if not np.all(np.isfinite(values)) or np.any(values != np.rint(values)):
            raise BadImage(
                "mask_damaged", f"{values.dtype} with numbers that are not whole; a mask holds class numbers"
            )
        values = values.astype(np.int64)
    return np.ascontiguousarray(values)


def _load(data: bytes) -> Any:
    """A Pillow image with its pixels in memory."""
    import PIL
    import PIL.Image

    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        deep = 4 if picture.mode in ("I", "F") else 2 if picture.mode.startswith("I;16") else 1
        _check_size(picture.width, picture.height, len(picture.getbands()) * deep, len(data))
    except PIL.Image.DecompressionBombError:
        raise BadImage("too_large", f"the header says over {2 * MAX_PIXELS} px, {MAX_PIXELS} are decoded") from None
    except PIL.UnidentifiedImageError:
        raise _not_opened(data) from None
    except BadImage:
        raise
    except turbo.BROKEN as error:
        raise BadImage("damaged", _said(error)) from None
    try:
        picture.load()
    except turbo.BROKEN as error:
        said = _said(error)
        raise BadImage("truncated" if "truncat" in said else "damaged", said) from None
    except MemoryError:
        raise BadImage("too_large", f"{picture.width}x{picture.height} px do not fit into memory") from None
    return picture


def _upright(picture: Any) -> Any:
    """The picture as its EXIF orientation wants it shown; orientation that cannot be read is none."""
    from PIL import ImageOps

    try:
        turned = picture.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except turbo.BROKEN:
        return picture


def _tiff(data: bytes, *, for_batches: bool = False) -> Image:
    """A raster; for batches without where it lies, which takes longer than its pixels, and bands interleaved."""
    try:
        with raster.open_bytes(data, is_placed=not for_batches) as scene:
            header = scene.profile
            kind = np.dtype(header.dtype)
            _check_size(header.width, header.height, header.bands * kind.itemsize, len(data))
            if kind.kind not in "uif":
                raise BadImage("unsupported", f"pixels of dtype {header.dtype}")
            pixels = scene.read_interleaved() if for_batches else scene.read()
    except raster.RasterError as error:
        said = _said(error)
        raise BadImage("unsupported" if "different dtypes" in said else "damaged", said) from None
    except TypeError as error:
        raise BadImage("unsupported", _said(error)) from None
    return Image(pixels, "TIFF", header.nodata, header)


def _check_size(width: int, height: int, bytes_per_pixel: int, encoded_bytes: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage("too_large", f"{width}x{height} px, at most {MAX_PIXELS} pixels are decoded")
    if width * height * bytes_per_pixel > MAX_DECODED_BYTES:
        size_mb = width * height * bytes_per_pixel >> 20
        raise BadImage("too_large", f"{size_mb} MiB of pixels, at most {MAX_DECODED_BYTES >> 20} MiB are decoded")
    decoded = width * height * bytes_per_pixel
    if decoded > PLAIN_DECODED_BYTES and decoded > MAX_RATIO * encoded_bytes:
        raise BadImage("too_large", f"{decoded >> 20} MiB of pixels out of {encoded_bytes} bytes, a decompression bomb")


def _not_opened(data: bytes) -> BadImage:
    """Why Pillow did not know the bytes: what they are instead, or a known format that is cut or damaged."""
    head = data[:512].lstrip()
    if data.startswith(b"version https://git-lfs"):
        return BadImage("not_an_image", "a Git LFS pointer: fetch the file with git lfs pull")
    if head[:1] == b"<":
        return BadImage("not_an_image", "SVG, HTML or XML text")
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM")) or data[8:12] == b"WEBP":
        return BadImage("truncated" if len(data) < 64 else "damaged", f"{len(data)} bytes whose header is broken")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return BadImage("not_an_image", "plain text")
    return BadImage("not_an_image", f"none of {', '.join(FORMATS)}, TIFF; begins with {data[:4].hex()}")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
