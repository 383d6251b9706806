"""conversations.py: pictures are trained on as they look, and only those of the data set."""

import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversation_rows import COLOURS, chat, colours, llava, parts, save, text_only
from PIL import Image

from dpvr.data.conversations import FEATURES, load_conversations

pytestmark = pytest.mark.usefixtures("own_cache")

# Pictures as they are trained on: each name with a picture that looks the same

RAMP = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (48, 1))
TURNED = Image.Exif()
TURNED[0x0112] = 6
INK = Image.fromarray(np.dstack([0 * RAMP] * 3 + [RAMP]))  # black ink, less and less transparent
GREY = Image.fromarray(RAMP)
LOOK = {
    "sixteen.png": (Image.fromarray(RAMP.astype(np.uint16) << 8), {}, GREY),
    "sixteen.tif": (Image.fromarray(RAMP.astype(np.int32) << 8), {}, GREY),
    "float.tif": (Image.fromarray((RAMP / 255).astype(np.float32)), {}, GREY),
    "float255.tif": (Image.fromarray(RAMP.astype(np.float32)), {}, GREY),
    "ink.png": (INK, {}, Image.fromarray(255 - RAMP)),
    "ink.tif": (INK, {}, Image.fromarray(255 - RAMP)),
    "grey_ink.png": (INK.convert("LA"), {}, Image.fromarray(255 - RAMP)),
    "turned.png": (GREY, {"exif": TURNED}, GREY.rotate(-90)),
    "bits.png": (GREY.point(lambda level: 255 * (level > 99)).convert("1"), {}, GREY.point([0] * 100 + [255] * 156)),
    "palette.gif": (GREY.convert("P"), {}, GREY),
}


@pytest.mark.parametrize("form", ["llava", "datasets", "stream", "unpacked"])
@pytest.mark.parametrize("name", LOOK)
def test_a_picture_is_trained_on_as_it_looks_on_every_way_in(name, form, write_rows, picture_folder, tmp_path):
    picture, options, look = LOOK[name]
    picture.save(picture_folder / name, **options)
    row = {"images": [{"bytes": (picture_folder / name).read_bytes(), "path": None}]}
    saved = [{**row, "messages": chat(parts(None, "?"), parts("x"))}]
    if form in ("llava", "stream"):
        data = write_rows([llava(name)])
        rows = load_conversations(data, image_folder=str(picture_folder), streaming=form == "stream").rows
    else:
        rows = load_conversations(save(saved * 3, tmp_path / "data"), skip_bad_rows=form == "unpacked").rows
    (seen,) = next(iter(rows))["images"]
    assert seen.mode == "RGB"
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(look.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("form", ["pipe", "long", "large", "format"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_beyond_a_limit_is_a_bad_row_that_says_so(form, streaming, write_rows, picture_folder):
    path = picture_folder / "odd.png"
    if form == "pipe":
        os.mkfifo(path)
    else:
        size = {"long": (40_000, 1), "large": (12_000, 12_000), "format": (9, 9)}[form]
        Image.new("1", size).save(path, "PPM" if form == "format" else "PNG")
    reason = {"pipe": "a pipe or", "long": "40000 x 1 pixels, one", "large": "than 50,000,000", "format": "use one of"}
    with pytest.raises(ValueError, match=f"row 1: the picture .*odd.png' cannot be read: .*{reason[form]}"):
        data = write_rows([text_only(), llava("odd.png")])
        list(load_conversations(data, image_folder=str(picture_folder), streaming=streaming).rows)


# Where the pictures of a data set lie


def parquet(path: str, picture_folder) -> str:
    """A data set whose only picture is a path."""
    picture_folder.mkdir(exist_ok=True)
    picture = pa.array([[{"bytes": None, "path": path}]], pa.list_(datasets.Image().pa_type))
    features = FEATURES.arrow_schema
    messages = pa.array([chat(parts(None, "?"), parts("x"))], features.field("messages").type)
    pq.write_table(pa.table([picture, messages], schema=features), picture_folder / "train.parquet")
    return str(picture_folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["absolute", "dots", "link", "web", "other repository", "archive", "file address"])
def test_a_picture_outside_of_its_data_set_is_a_bad_row(form, streaming, picture_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(picture_folder / "red.png")
    path = {
        "absolute": str(picture_folder / "red.png"),
        "dots": str(data / ".." / picture_folder.name / "red.png"),
        "link": str(data / "link.png"),
        "web": "http://127.0.0.1:9/red.png",
        "other repository": "hf://datasets/stranger/data@main/red.png",
        "archive": f"zip://red.png::{picture_folder}/red.zip",
        "file address": f"file://{picture_folder}/red.png",
    }[form]
    with pytest.raises(ValueError, match="row 0: the picture .* lies outside of .*--allow_remote_images"):
        list(load_conversations(parquet(path, data), streaming=streaming).rows)


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_picture_elsewhere_is_read_if_that_is_asked_for(address, picture_folder, tmp_path):
    data = parquet(address.format(picture_folder / "red.png"), tmp_path / "data")
    rows = load_conversations(data, allow_remote_images=True).rows
    assert colours(rows[0]) == [COLOURS["red.png"]]


def test_an_address_that_cannot_be_opened_is_a_bad_row(tmp_path):
    data = parquet("http://127.0.0.1:9/red.png", tmp_path / "data")
    with pytest.raises(ValueError, match="row 0: the picture 'http.*' cannot be read: The address cannot be opened"):
        load_conversations(data, allow_remote_images=True)
