"""pictures.py: what people upload becomes an upright RGB picture, or a message that says why not."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpvr.data.pictures import MAX_ASPECT, MAX_PIXELS, MAX_SIDE, open_picture, to_rgb
from dpvr.data.prompts import Conversation, answered_prompt, prompt_inputs

RED, WHITE = (255, 0, 0), (255, 255, 255)


def half_red(mode: str, other: tuple) -> Image.Image:
    """A picture of 8 x 6 whose left half is red."""
    picture = Image.new("RGBA", (8, 6), other)
    picture.paste((*RED, 255), (0, 0, 4, 6))
    return picture.convert(mode)


def save(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def colours(picture: Image.Image) -> tuple:
    return picture.getpixel((1, 2)), picture.getpixel((6, 2))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGB"), ("a.bmp", "RGB"), ("a.tiff", "RGB"), ("a.png", "P"), ("a.gif", "P")]
)
def test_opaque_pictures_keep_their_colours(name, mode, tmp_path):
    picture = open_picture(save(tmp_path / name, half_red(mode, (0, 0, 255, 255))))
    assert (picture.mode, picture.size, colours(picture)) == ("RGB", (8, 6), (RED, (0, 0, 255)))


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.webp", "RGBA"), ("a.tiff", "RGBA")])
def test_what_is_transparent_becomes_white(name, mode, tmp_path):
    options = {"lossless": True} if name.endswith("webp") else {}
    picture = open_picture(save(tmp_path / name, half_red(mode, (0, 0, 0, 0)), **options))
    assert colours(picture) == (RED, WHITE)


def test_a_palette_with_a_transparent_colour_becomes_white_there(tmp_path):
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([*RED, 0, 0, 255])
    palette.paste(0, (0, 0, 4, 6))
    assert colours(open_picture(save(tmp_path / "a.png", palette, transparency=1))) == (RED, WHITE)


def test_grey_with_alpha_becomes_white_where_it_is_transparent(tmp_path):
    picture = Image.new("LA", (8, 6), (0, 0))
    picture.paste((90, 255), (0, 0, 4, 6))
    assert colours(open_picture(save(tmp_path / "a.png", picture))) == ((90, 90, 90), WHITE)


def test_cmyk_is_read_as_the_colours_it_prints(tmp_path):
    picture = open_picture(save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert picture.mode == "RGB" and np.abs(np.array(picture)[4, 4].astype(int) - RED).max() < 8


def test_sixteen_bits_become_eight_and_are_not_cut_off(tmp_path):
    levels = np.array(2 * [[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    picture = open_picture(save(tmp_path / "a.png", Image.fromarray(levels)))
    assert [picture.getpixel((column, 0))[0] for column in range(5)] == [0, 0, 1, 128, 255]


def test_a_picture_of_two_colours_stays_black_and_white(tmp_path):
    picture = Image.new("1", (4, 4), 1)
    picture.putpixel((0, 0), 0)
    opened = open_picture(save(tmp_path / "a.png", picture))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 1))) == ((0, 0, 0), WHITE)


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert open_picture(path).getpixel((0, 0)) == RED


@pytest.mark.parametrize(("orientation", "size", "corner"), [(1, (8, 6), RED), (3, (8, 6), WHITE), (6, (6, 8), RED)])
def test_rotated_photographs_are_turned_upright(orientation, size, corner, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", half_red("RGB", (255, 255, 255, 255)), exif=exif)
    picture = open_picture(path)
    assert picture.size == size
    assert picture.getpixel((1, 1)) == corner


def test_large_pictures_are_made_smaller_in_proportion(tmp_path):
    picture = open_picture(save(tmp_path / "a.png", Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE))))
    assert picture.size == (MAX_SIDE, MAX_SIDE // 2)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: a decompression bomb."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (MAX_PIXELS, 2)])
def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(width, height, tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS:,}.*: make it smaller"):
        open_picture(tmp_path / "a.png")


def test_a_thread_of_a_picture_is_refused(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (2 * MAX_ASPECT + 1, 2)))
    with pytest.raises(ValueError, match=f"41 x 2 pixels, one side more than {MAX_ASPECT} times the other: cut out"):
        open_picture(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_files_that_are_cut_off_are_refused(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or cut off|not a picture"):
        open_picture(path)


def test_damage_anywhere_in_a_file_is_seen_or_harmless(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    rng, refused = np.random.default_rng(1), 0
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tiff"):
        whole = save(tmp_path / name, noise, exif=exif).read_bytes()
        for _ in range(60):
            torn = bytearray(whole)
            for place in rng.integers(0, min(len(torn), 400), 3):
                torn[place] = rng.integers(0, 256)
            (tmp_path / name).write_bytes(torn)
            try:
                assert open_picture(tmp_path / name).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("The ") and str(tmp_path) not in str(error)
                refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4\n"],
    ids=["empty", "text", "svg", "eps", "pdf"],
)
def test_files_that_are_no_pictures_are_refused(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="not a picture that can be read here: use one of PNG"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("values", [(0, np.nan), (0, np.inf), (-1, 1), (0, 70_000)])
def test_floating_point_pictures_without_a_usual_range_are_refused_rather_than_guessed_at(values, tmp_path):
    path = save(tmp_path / "a.tiff", Image.fromarray(np.array([values] * 2, dtype=np.float32)))
    with pytest.raises(ValueError, match="0 to 1, 255 or 65535 can be read: scale them"):
        open_picture(path)


@pytest.mark.parametrize("white", [1, 255, 65_535])
def test_floating_point_pictures_of_a_usual_range_are_scaled(white, tmp_path):
    path = save(tmp_path / "a.tiff", Image.fromarray(np.array([[0, white / 2, white]] * 2, dtype=np.float32)))
    levels = np.asarray(open_picture(path))[0, :, 0].astype(int)
    assert np.abs(levels - [0, 127, 255]).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (48, 3), (3, 48)])
def test_a_processor_sees_the_colour_of_very_low_pictures(size, minibench_processor):
    seen = minibench_processor.image_processor(to_rgb(Image.new("RGB", size, (250, 20, 20))), return_tensors="np")
    red, green, blue = seen["pixel_values"][0].mean(axis=(1, 2))
    assert red > green + 1 and abs(green - blue) < 0.5


def test_what_is_upright_rgb_is_given_back_as_it_is():
    picture = half_red("RGB", (0, 0, 255, 255))
    assert to_rgb(picture) is picture or to_rgb(picture).tobytes() == picture.tobytes()


def test_a_pipe_a_device_and_a_folder_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="a folder, a pipe or a device: give a regular file"):
            open_picture(path)


def test_a_file_that_is_gone_is_said_to_be_gone_without_its_path(tmp_path):
    with pytest.raises(ValueError, match="^The picture's file is no longer here: upload it again"):
        open_picture(tmp_path / "a.png")


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 32_768, dtype=np.uint16))


def shade(inputs: dict, processor) -> float:
    """The mean of what the vision tower sees, from 0, black, to 1, white."""
    mean, std = (np.array(value)[:, None, None] for value in map(vars(processor.image_processor).get, STATISTICS))
    return float((np.asarray(inputs["pixel_values"][0]) * std + mean).mean())


STATISTICS = ("image_mean", "image_std")


def test_a_prompt_has_pictures_of_sixteen_bits_in_their_shade(minibench_processor):
    parts = [{"type": "image"}, {"type": "text", "text": "Colour?"}]
    conversation = Conversation([{"role": "user", "content": parts}], [sixteen_bits()])
    assert abs(shade(prompt_inputs(minibench_processor, [conversation]), minibench_processor) - 0.5) < 0.02


def test_an_answered_prompt_has_pictures_of_sixteen_bits_in_their_shade(minibench_processor):
    question = [{"type": "image"}, {"type": "text", "text": "Colour?"}]
    answer = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    inputs, _ = answered_prompt(minibench_processor, {"images": [sixteen_bits()], "messages": messages})
    assert abs(shade(inputs, minibench_processor) - 0.5) < 0.02


def test_a_prompt_with_a_picture_beyond_a_limit_is_refused(minibench_processor):
    conversation = Conversation([{"role": "user", "content": [{"type": "image"}]}], [Image.new("L", (41, 2))])
    with pytest.raises(ValueError, match="41 x 2 pixels"):
        prompt_inputs(minibench_processor, [conversation])
