"""The one way in for pictures: opened within limits, upright, in RGB, or refused with a reason.

    file, bytes  ->  header: known format, size in limits  ->  decoded whole  --+
                                                                                +-->  upright, on white, 8 bits, RGB
    a picture in memory, of a data set or a benchmark  ->  size in limits  -----+

    read_picture   training rows, the probe          to_rgb         batched replies, evaluation, lmms-eval
    open_picture   the app: `read_picture`, and made smaller

Only formats that Pillow decodes by itself are tried, so no file reaches an outside program.
"""

import os
import stat
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20
MAX_SIDE = 1536  # larger ones are made smaller: no LLaVA looks at more of one picture
LEVELS = (255, 65_535)  # the whitest value of pictures of 8 and of 16 bits
AMBIGUOUS_HEIGHTS, ENLARGED = (1, 3), 8  # a processor takes rows as many as channels for channels
# What Pillow's decoders raise for torn files.
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
)


def open_picture(path: str | Path) -> Image.Image:
    """Return `read_picture` of a file, made smaller where it is over `MAX_SIDE` pixels wide or high."""
    picture = read_picture(path)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def read_picture(source: str | Path | bytes) -> Image.Image:
    """Return the picture of a regular file or of a file's bytes as `to_rgb` does; of an animation the first.

    Raises:
        ValueError: if it is no picture, torn, over `MAX_PIXELS` or longer than `MAX_ASPECT` times its other side. The
            message is for the person who sent the file.
    """
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise _Refused("The picture is a folder, a pipe or a device: give a regular file.")
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
            _check_size(*picture.size)
            picture.load()
            return to_rgb(picture)
    except _Refused:
        raise
    except DecompressionBombError as error:
        raise ValueError(f"The picture has more than {MAX_PIXELS:,} pixels: make it smaller.") from error
    except FileNotFoundError as error:
        raise ValueError("The picture's file is no longer here: upload it again, or check its name.") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"The file is not a picture that can be read here: use one of {', '.join(FORMATS)}."
        ) from error
    except BROKEN as error:
        raise ValueError("The picture is damaged or cut off: save or upload it again.") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture upright and in RGB; one that is so already is given back as it is.

    Transparent parts become white. 16 bits and floating point, from 0 to 1, 255 or 65535, are scaled to 8 bits.

    Raises:
        ValueError: if it is over the limits of `read_picture`, or its values have no such range.
    """
    _check_size(*picture.size)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):  # Pillow's own conversion would cut them off at 255
        picture = _to_grey(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    if picture.mode != "RGB":
        picture = _convert(picture)
    if picture.height in AMBIGUOUS_HEIGHTS:
        picture = picture.resize((ENLARGED * picture.width, ENLARGED * picture.height), Image.Resampling.BICUBIC)
    return picture


class _Refused(ValueError):
    """A picture that Pillow could open and we do not want."""


def _check_size(width: int, height: int) -> None:
    if width * height == 0:
        raise _Refused(f"The picture has {width} x {height} pixels, so there is nothing to see: give another one.")
    if width * height > MAX_PIXELS:
        raise _Refused(f"The picture has {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(
            f"The picture has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut out the "
            "part that you ask about."
        )


def _to_grey(picture: Image.Image) -> Image.Image:
    """Return a picture of one channel of 16 or 32 bits in 8, by the smallest usual range that holds its values."""
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= LEVELS[-1]):  # which NaN is not either
        raise _Refused(
            f"The picture has values from {low:g} to {high:g}, and 0 to 1, 255 or 65535 can be read: scale them, or "
            "save it as a PNG."
        )
    if picture.mode.startswith("I;16") or high > LEVELS[0]:
        values = values // (LEVELS[0] + 1)
    elif picture.mode == "F" and high <= 1:
        values = (LEVELS[0] * values).round()
    return Image.fromarray(values.astype(np.uint8))


def _convert(picture: Image.Image) -> Image.Image:
    try:
        return picture.convert("RGB")
    except ValueError as error:  # such as LAB, which Pillow has no way to
        raise _Refused(f"The picture's colours are {picture.mode}, which cannot be read: save it in RGB.") from error
