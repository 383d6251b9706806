"""Files that are no pictures, or such as no camera makes: what is seen, or one sentence, by kind and for every way in.

NO_PICTURES, BEYOND     refused by read_picture, in a training row and from bytes
LOOKS                   seen as they look: a ramp from dark to bright, in any mode, depth and format
"""

import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpvr.data.conversations import load_conversations
from dpvr.data.pictures import open_picture, read_picture, to_rgb

SIZE = 48
RAMP = np.tile(np.linspace(0, 255, SIZE).round().astype(np.uint8), (SIZE, 1))
GREY = np.stack([RAMP] * 3, -1)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(
    width: int, height: int, content: bytes = zlib.compress(bytes(1000)), depth: int = 8, colour: int = 2
) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", content) + chunk(b"IEND", b"")


WHOLE = encoded(Image.fromarray(GREY))
PHOTO = encoded(Image.fromarray(GREY), "JPEG")
NOT_READ = "is not a picture that can be read here: use one of PNG, JPEG"
TORN = "is damaged or cut off|is not a picture that can be read here"
NO_PICTURES = {  # the content of a file called a.png
    "empty": (b"", NOT_READ),
    "text": (b"hello", NOT_READ),
    "a web page": (b"<!doctype html><title>404</title>", NOT_READ),
    "JSON": (b'{"error": "not found"}', NOT_READ),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NOT_READ),
    "PostScript, for which another program would run": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        NOT_READ,
    ),
    "PDF": (b"%PDF-1.7\n", NOT_READ),
    "a zip archive": (b"PK\x03\x04" + bytes(40), NOT_READ),
    "a pickle": (b"\x80\x04K\x01.", NOT_READ),
    "an icon, whose format is not among those read": (encoded(Image.new("RGB", (16, 16)), "ICO"), NOT_READ),
    "TGA, likewise": (encoded(Image.new("RGB", (16, 16)), "TGA"), NOT_READ),
    "PPM, likewise": (encoded(Image.new("RGB", (16, 16)), "PPM"), NOT_READ),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", NOT_READ),
    "a signature alone": (WHOLE[:8], TORN),
    "a header alone": (WHOLE[:33], TORN),
    "half": (WHOLE[: len(WHOLE) // 2], TORN),
    "half a photograph": (PHOTO[: len(PHOTO) // 2], TORN),
    "a photograph of its first bytes": (PHOTO[:20], TORN),
    "noise behind a signature": (WHOLE[:8] + bytes(range(256)), TORN),
    "a broken checksum": (WHOLE[:29] + bytes(4) + WHOLE[33:], TORN),
    "half a GIF": (encoded(Image.fromarray(RAMP), "GIF")[:100], TORN),
    "half a BMP": (encoded(Image.fromarray(GREY), "BMP")[:500], TORN),
    "half a TIFF": (encoded(Image.fromarray(GREY), "TIFF")[:50], TORN),
    "half a WebP": (encoded(Image.fromarray(GREY), "WEBP")[:60], TORN),
    "pixels that are no zlib stream": (png(64, 64, b"no stream"), TORN),
    "a TIFF whose directory points at itself": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", TORN),
}
BEYOND = {  # width, height of a file of some hundred bytes that claims so many pixels
    "a line": (1, 40_000, "1 x 40000 pixels, one side more than 20 times the other"),
    "a lying line": (40_000, 1, "40000 x 1 pixels, one side more than 20 times the other"),
    "a narrow strip": (100, 2_001, "100 x 2001 pixels, one side more than 20"),
    "a square of 144 million": (12_000, 12_000, "more than 50,000,000"),
    "just above the limit": (10_000, 5_001, "10000 x 5001 pixels, more than 50,000,000"),
    "a bomb": (100_000, 100_000, "more than 50,000,000"),
    "as large as a header can say": (2**31 - 1, 2**31 - 1, "more than 50,000,000|is damaged|is not a picture"),
    "no width": (0, 5, "is damaged|is not a picture|nothing to see"),
    "no height": (5, 0, "is damaged|is not a picture|nothing to see"),
}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = {
    "a pipe": (_fifo, "a folder, a pipe or a device"),
    "a socket": (_socket, "a folder, a pipe or a device"),
    "a folder": (Path.mkdir, "a folder, a pipe or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a folder, a pipe or a device"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "is no longer here"),
    "a link to itself": (_loop, "damaged|no longer here|not a picture"),
    "nothing": (lambda path: None, "is no longer here"),
}


def _sixteen(scale: int) -> Image.Image:
    return Image.fromarray(RAMP.astype(np.uint16) * scale)


def _animation(kind: str) -> bytes:
    frames = [Image.fromarray(GREY), Image.new("RGB", (SIZE, SIZE), "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    return encoded(Image.fromarray(GREY).transpose(turn[orientation]), "PNG", exif=exif)


def _in(mode: str) -> Image.Image:
    return Image.fromarray(GREY).convert(mode)


LOOKS: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: WHOLE,
    "JPEG": lambda: PHOTO,
    "progressive JPEG": lambda: encoded(_in("RGB"), "JPEG", progressive=True, quality=95),
    "grey JPEG": lambda: encoded(_in("L"), "JPEG", quality=95),
    "JPEG in YCbCr": lambda: encoded(_in("YCbCr"), "JPEG", quality=95),
    "JPEG in CMYK": lambda: encoded(_in("CMYK"), "JPEG", quality=95),
    "WebP": lambda: encoded(_in("RGB"), "WEBP", lossless=True),
    "BMP": lambda: encoded(_in("RGB"), "BMP"),
    "grey": lambda: encoded(_in("L")),
    "grey with alpha": lambda: encoded(_in("LA")),
    "with alpha": lambda: encoded(_in("RGBA")),
    "a palette": lambda: encoded(_in("L").quantize(256)),
    "a GIF": lambda: encoded(_in("L"), "GIF"),
    "16 bits": lambda: encoded(_sixteen(257)),
    "16 bits, TIFF": lambda: encoded(_sixteen(257), "TIFF"),
    "32 bits, up to 65535": lambda: encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
    "32 bits, up to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "floating point up to 1": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "floating point up to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "floating point up to 65535": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) * 257), "TIFF"),
    "CMYK, TIFF": lambda: encoded(_in("CMYK"), "TIFF"),
    "an animated GIF": lambda: _animation("GIF"),
    "an animated WebP": lambda: _animation("WEBP"),
    "an animated PNG": lambda: _animation("PNG"),
    "a TIFF of two pages": lambda: _animation("TIFF"),
    "upside down": lambda: _turned(3),
    "turned left": lambda: _turned(6),
    "turned right": lambda: _turned(8),
    "text behind the end": lambda: WHOLE + b"and more",
}
UNREADABLE = {
    "NaN": np.full((8, 8), np.nan, np.float32),
    "infinite": np.full((8, 8), np.inf, np.float32),
    "below zero": np.full((8, 8), -0.5, np.float32),
    "above any depth": np.full((8, 8), 1e9, np.float32),
    "below zero in 32 bits": np.full((8, 8), -1, np.int32),
    "above 16 bits": np.full((8, 8), 70_000, np.int32),
}


def train_on(path: Path) -> Image.Image:
    """The picture of a row as training has it."""
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    rows = path.parent / "rows.json"
    rows.write_text(json.dumps([{"image": path.name, "conversations": said}]))
    return to_rgb(load_conversations(str(rows), image_folder=str(path.parent)).rows[0]["images"][0])


def check_refused(path: Path, message: str) -> None:
    begin = time.monotonic()
    for read in (read_picture, open_picture, train_on):
        with pytest.raises(ValueError, match=message):
            read(path)
    assert time.monotonic() - begin < 10, "it was waited for"


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_a_file_that_is_no_picture_is_refused(kind, tmp_path):
    content, message = NO_PICTURES[kind]
    (tmp_path / "a.png").write_bytes(content)
    check_refused(tmp_path / "a.png", message)
    with pytest.raises(ValueError, match=message):
        read_picture(content)


@pytest.mark.parametrize("kind", BEYOND)
def test_a_picture_beyond_the_limits_is_refused_by_its_header(kind, tmp_path):
    width, height, message = BEYOND[kind]
    (tmp_path / "a.png").write_bytes(png(width, height))
    check_refused(tmp_path / "a.png", message)


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = PLACES[kind]
    make(tmp_path / "a.png")
    for read in (read_picture, open_picture):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 of 1 rows"):
        train_on(tmp_path / "a.png")


@pytest.mark.parametrize("kind", LOOKS)
def test_a_picture_is_seen_as_it_looks_in_every_way_in(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(LOOKS[kind]())
    seen = [read(tmp_path / "a.png") for read in (read_picture, open_picture, train_on)]
    for picture in (*seen, read_picture(LOOKS[kind]())):
        assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
        assert np.abs(np.asarray(picture).astype(int) - GREY).max() <= 6


@pytest.mark.parametrize("kind", UNREADABLE)
def test_values_without_a_usual_range_are_refused(kind, tmp_path):
    picture = Image.fromarray(UNREADABLE[kind])
    picture.save(tmp_path / "a.tif")
    check_refused(tmp_path / "a.tif", "0 to 1, 255 or 65535 can be read")
    with pytest.raises(ValueError, match="0 to 1, 255 or 65535 can be read"):
        to_rgb(picture)
