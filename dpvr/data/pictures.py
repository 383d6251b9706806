"""Pictures from strangers: opened within limits, upright, in RGB, or refused with a reason.

    file  ->  header: known format, size in limits  ->  decoded whole  ->  upright  ->  on white, 8 bits, RGB

Only formats that Pillow decodes by itself are tried, so no file reaches an outside program.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20
MAX_SIDE = 1536  # larger ones are made smaller: no LLaVA looks at more of one picture
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
    """Return a file's picture in RGB, upright, at most `MAX_SIDE` pixels wide and high; of an animation the first.

    Transparent parts become white, 16 bits per channel become 8.

    Raises:
        ValueError: if it is no picture, torn, over `MAX_PIXELS` or longer than `MAX_ASPECT` times its other side. The
            message is for the person who sent the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(*picture.size)
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            picture = _to_rgb(picture)
    except DecompressionBombError as error:
        raise ValueError(f"The picture has more than {MAX_PIXELS:,} pixels: make it smaller.") from error
    except FileNotFoundError as error:
        raise ValueError("The picture's file is no longer here: upload it again.") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"The file is not a picture that can be read here: use one of {', '.join(FORMATS)}."
        ) from error
    except BROKEN as error:
        if isinstance(error, _Refused):
            raise
        raise ValueError("The picture is damaged or cut off: save or upload it again.") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


class _Refused(ValueError):
    """A picture that Pillow could open and we do not want."""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(f"The picture has {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(
            f"The picture has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut out the "
            "part that you ask about."
        )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise _Refused(
            "The picture is in floating point, and only 8 or 16 bits per channel can be read: save it as a PNG."
        )
    if picture.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would cut them off at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
