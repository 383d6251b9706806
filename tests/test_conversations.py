"""conversations.py: what is read and from where, what is refused and how it is told."""

import io
import json
import os
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from dpvr.data import conversations
from dpvr.data.conversations import FEATURES, data_fingerprint, load_conversations
from minibench import export
from minibench.data import MiniBench

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "deep/blue.png": (0, 0, 255)}
SIDE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Pictures of one colour each, a broken and a cut one, and a picture beside the folder with two links to it."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "secret.jpg")
    (folder / "cut.jpg").write_bytes((tmp_path / "secret.jpg").read_bytes()[:-500])
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "alias.png").symlink_to(folder / "red.png")
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes rows of LLaVA as .json or .jsonl and returns the path."""

    def run(rows: list, name: str = "rows.json") -> str:
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(rows))
        return str(tmp_path / name)

    return run


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def llava(image="red.png", *values: str) -> dict:
    return {"id": "x", "image": image, "conversations": turns(*(values or ("<image>\nColour?", "red")))}


def text_only(question: str = "Two?", answer: str = "2") -> dict:
    return {"id": "t", "conversations": turns(question, answer)}


def content(message: dict) -> list:
    """Parts in short: a text, or None for a picture."""
    assert all((part["type"] == "image") == (part["text"] is None) for part in message["content"])
    return [part["text"] for part in message["content"]]


def contents(row: dict) -> list:
    return [content(message) for message in row["messages"]]


def colours(row: dict) -> list:
    return [picture.convert("RGB").getpixel((0, 0)) for picture in row["images"]]


def encode(name: str, form: str = "PNG") -> dict:
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), COLOURS[name]).save(data, form)
    return {"bytes": data.getvalue(), "path": None}


def chat(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": part} for number, part in enumerate(contents)]


def parts(*texts) -> list[dict]:
    return [{"type": "image" if text is None else "text", "text": text} for text in texts]


def save(rows: list[dict], path, plain: bool = False) -> str:
    """Save rows of images and messages, whose content is plain text or parts, and return the folder."""
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({**FEATURES, "messages": [message]}) if plain else FEATURES
    Dataset.from_list(rows, features=features).save_to_disk(path)
    return str(path)


# LLaVA's JSON


def test_marks_are_taken_out_and_the_pictures_go_in_front_wherever_the_marks_were(write, folder):
    values = [("<image>\nColour?", "red", "Sure?", "yes"), ("Colour?\n<image>", "red"), ("What <image> is it?", "red")]
    data = write([llava("red.png", *value) for value in values])
    rows = load_conversations(data, image_folder=str(folder)).rows
    assert list(map(contents, rows)) == [
        [[None, "Colour?"], ["red"], ["Sure?"], ["yes"]],
        [[None, "Colour?"], ["red"]],
        [[None, "What  is it?"], ["red"]],
    ]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2


def test_several_pictures_keep_their_order(write, folder):
    names = ["deep/blue.png", "red.png", "green.png"]
    row = llava(names, "<image> <image>\nWhich <image> is red?", "the second")
    row = load_conversations(write([row]), image_folder=str(folder)).rows[0]
    assert colours(row) == [COLOURS[name] for name in names]
    assert contents(row) == [[None, None, None, "Which  is red?"], ["the second"]]


def test_rows_without_a_picture_stand_among_others_and_need_no_image_folder(write, folder):
    other = {**text_only("  Keep my spaces ", " and mine\n"), "image": None}
    rows = load_conversations(write([text_only(), llava(), other]), image_folder=str(folder)).rows
    assert [len(row["images"]) for row in rows] == [0, 1, 0]
    assert contents(rows[2]) == [["  Keep my spaces "], [" and mine\n"]]
    assert contents(load_conversations(write([text_only()])).rows[0]) == [["Two?"], ["2"]]


def test_a_system_message_may_come_first(write):
    row = text_only()
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    messages = load_conversations(write([row])).rows[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_lines_of_jsonl_are_read_as_the_list_is(write, folder):
    rows = [llava(), text_only(), llava(["red.png", "green.png"], "<image><image>Same?", "no")]
    one, other = (
        load_conversations(write(rows, name), image_folder=str(folder)).rows for name in ("a.json", "b.jsonl")
    )
    assert list(map(contents, one)) == list(map(contents, other)) and len(other) == 3
    assert list(map(colours, one)) == list(map(colours, other))


def test_columns_are_those_of_trls_vision_format(write, folder):
    rows = load_conversations(write([llava(), text_only()]), image_folder=str(folder)).rows
    assert isinstance(rows, Dataset) and rows.features == FEATURES
    assert set(rows[0]["messages"][0]["content"][0]) == {"type", "text"}


def test_a_table_holds_paths_and_opens_a_picture_only_when_its_row_is_used(write, folder):
    rows = load_conversations(write([llava(), llava("green.png")]), image_folder=str(folder)).rows
    stored = rows.with_format("arrow")[:]["images"].to_pylist()
    assert stored[0] == [{"bytes": None, "path": os.path.realpath(folder / "red.png")}]
    Image.new("RGB", (SIDE, SIDE), COLOURS["deep/blue.png"]).save(folder / "green.png")
    (folder / "red.png").unlink()
    assert colours(rows[1]) == [COLOURS["deep/blue.png"]]
    with pytest.raises(ValueError, match="the picture .*red.png' cannot be read: .*no longer here"):
        rows[0]


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
def test_a_picture_is_trained_on_as_it_looks_on_every_way_in(name, form, write, folder, tmp_path):
    picture, options, look = LOOK[name]
    picture.save(folder / name, **options)
    row = {"images": [{"bytes": (folder / name).read_bytes(), "path": None}]}
    saved = [{**row, "messages": chat(parts(None, "?"), parts("x"))}]
    if form in ("llava", "stream"):
        data = write([llava(name)])
        rows = load_conversations(data, image_folder=str(folder), streaming=form == "stream").rows
    else:
        rows = load_conversations(save(saved * 3, tmp_path / "data"), skip_bad_rows=form == "unpacked").rows
    (seen,) = next(iter(rows))["images"]
    assert seen.mode == "RGB"
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(look.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("form", ["pipe", "long", "large", "format"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_beyond_a_limit_is_a_bad_row_that_says_so(form, streaming, write, folder):
    path = folder / "odd.png"
    if form == "pipe":
        os.mkfifo(path)
    else:
        size = {"long": (40_000, 1), "large": (12_000, 12_000), "format": (9, 9)}[form]
        Image.new("1", size).save(path, "PPM" if form == "format" else "PNG")
    reason = {"pipe": "a pipe or", "long": "40000 x 1 pixels, one", "large": "than 50,000,000", "format": "use one of"}
    with pytest.raises(ValueError, match=f"row 1: the picture .*odd.png' cannot be read: .*{reason[form]}"):
        data = write([text_only(), llava("odd.png")])
        list(load_conversations(data, image_folder=str(folder), streaming=streaming).rows)


# Where the pictures of a data set lie


def parquet(path: str, folder) -> str:
    """A data set whose only picture is a path."""
    folder.mkdir(exist_ok=True)
    picture = pa.array([[{"bytes": None, "path": path}]], pa.list_(datasets.Image().pa_type))
    features = FEATURES.arrow_schema
    messages = pa.array([chat(parts(None, "?"), parts("x"))], features.field("messages").type)
    pq.write_table(pa.table([picture, messages], schema=features), folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["absolute", "dots", "link", "web", "other repository", "archive", "file address"])
def test_a_picture_outside_of_its_data_set_is_a_bad_row(form, streaming, folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(folder / "red.png")
    path = {
        "absolute": str(folder / "red.png"),
        "dots": str(data / ".." / folder.name / "red.png"),
        "link": str(data / "link.png"),
        "web": "http://127.0.0.1:9/red.png",
        "other repository": "hf://datasets/stranger/data@main/red.png",
        "archive": f"zip://red.png::{folder}/red.zip",
        "file address": f"file://{folder}/red.png",
    }[form]
    with pytest.raises(ValueError, match="row 0: the picture .* lies outside of .*--allow_remote_images"):
        list(load_conversations(parquet(path, data), streaming=streaming).rows)


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_picture_elsewhere_is_read_if_that_is_asked_for(address, folder, tmp_path):
    data = parquet(address.format(folder / "red.png"), tmp_path / "data")
    rows = load_conversations(data, allow_remote_images=True).rows
    assert colours(rows[0]) == [COLOURS["red.png"]]


def test_an_address_that_cannot_be_opened_is_a_bad_row(tmp_path):
    data = parquet("http://127.0.0.1:9/red.png", tmp_path / "data")
    with pytest.raises(ValueError, match="row 0: the picture 'http.*' cannot be read: The address cannot be opened"):
        load_conversations(data, allow_remote_images=True)


# Images and messages


def test_strings_become_parts_with_the_pictures_in_front_of_the_first_user_message(tmp_path):
    images = [encode("red.png"), encode("green.png")]
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"images": images, "messages": [system, *chat("Same?", "no", "Sure?", "yes")]},
        {"images": images, "messages": chat("<image>Same?\n<image>", "no")},
        {"images": [], "messages": chat("Two?", "2")},
    ]
    loaded = load_conversations(save(rows, tmp_path / "data", plain=True)).rows
    assert list(map(contents, loaded)) == [
        [["Be brief."], [None, None, "Same?"], ["no"], ["Sure?"], ["yes"]],
        [[None, None, "Same?"], ["no"]],
        [["Two?"], ["2"]],
    ]
    assert loaded.features == FEATURES
    assert colours(loaded[0]) == [COLOURS["red.png"], COLOURS["green.png"]]


def test_parts_are_kept_but_for_their_order(tmp_path):
    rows = [
        {"images": [encode("red.png")], "messages": chat(parts("Colour?", None, "Say."), parts("It is ", "red"))},
        {"images": [encode("red.png")], "messages": chat(parts("<image>\nColour?"), parts("red"))},
    ]
    loaded = load_conversations(save(rows, tmp_path / "data")).rows
    assert contents(loaded[0]) == [[None, "Colour?", "Say."], ["It is ", "red"]]
    assert contents(loaded[1]) == [[None, "Colour?"], ["red"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_content_may_be_a_string_in_one_message_and_parts_in_another(streaming, tmp_path):
    message = {"role": Value("string"), "content": datasets.Json()}
    rows = [
        {"images": [encode("red.png")], "messages": chat("Colour?", parts("red"))},
        {"images": [encode("red.png")], "messages": chat([{"type": "image"}, *parts("Colour?")], "red")},
    ]
    for messages in ([message], [datasets.Json()]):
        data = str(tmp_path / str(messages == [message]))
        Dataset.from_list(rows, features=Features({**FEATURES, "messages": messages})).save_to_disk(data)
        loaded = load_conversations(data, streaming=streaming).rows
        assert list(map(contents, loaded)) == [[[None, "Colour?"], ["red"]]] * 2


@pytest.mark.parametrize(
    ("images", "messages", "plain", "reason"),
    [
        (1, chat("<image><image>Same?", "no"), True, r"1 image but 2 <image> marks .* and 0 elsewhere: put one"),
        (1, chat(parts("Colour?"), parts("red")), False, r"1 image but 0 <image> marks .* and 0 elsewhere"),
        (
            1,
            chat(parts("Hi"), parts("Hi"), parts(None, "?"), parts("red")),
            False,
            r"0 <image> marks .* 1 elsewhere",
        ),
        (1, chat(parts(None, "Hi"), parts("<image>")), False, r"1 <image> mark .* and 1 elsewhere"),
        (0, [{"role": "tool", "content": "x"}], True, r"from 'tool', and only system, user, assistant speak"),
        (0, chat(None, "Hi"), True, r"content is None, not a list"),
        (0, chat([{"type": "video", "text": None}], parts("x")), False, r"the type 'video', and only image and text"),
        (0, chat([{"type": "text", "text": None}], parts("x")), False, r"text of a part is None, not a string"),
        (None, chat(parts("Hi"), parts("x")), False, r"images is None, not a list"),
        (0, None, False, r"messages is None, not a list"),
        (["no picture"], chat(parts(None, "Hi"), parts("x")), False, r"cannot be read: The file is not a picture"),
        ([None], chat(parts(None, "Hi"), parts("x")), False, r"an image is None, not a dictionary"),
    ],
)
def test_bad_rows_of_a_data_set_are_named_by_index_and_reason(images, messages, plain, reason, tmp_path):
    if isinstance(images, list):
        images = [{"bytes": image.encode(), "path": None} if image else None for image in images]
    elif images is not None:
        images = [encode("red.png")] * images
    fine = chat("<image>Colour?", "red") if plain else chat(parts(None, "Colour?"), parts("red"))
    rows = [{"images": [encode("red.png")], "messages": fine}, {"images": images, "messages": messages}]
    data = save(rows, tmp_path / "data", plain)
    with pytest.raises(ValueError, match=f"1 of 2 rows read from .*:\nrow 1: .*{reason}"):
        load_conversations(data)
    with pytest.warns(UserWarning, match=f"Left out 1 of 2 rows of .*\nrow 1: .*{reason}"):
        loaded, bad_rows = load_conversations(data, skip_bad_rows=True)
    assert list(map(contents, loaded)) == [[[None, "Colour?"], ["red"]]] and set(bad_rows) == {1}
    assert colours(loaded[0]) == [COLOURS["red.png"]]


# Data sets: where they are


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_folder_of_several_splits_gives_the_one_asked_for(streaming, tmp_path):
    def rows(answer: str) -> Dataset:
        return Dataset.from_list([{"images": [], "messages": chat(parts("?"), parts(answer))}], features=FEATURES)

    DatasetDict(train=rows("one"), test=rows("two")).save_to_disk(tmp_path / "data")
    for split, answer in (("train", "one"), ("test", "two")):
        loaded = load_conversations(str(tmp_path / "data"), split=split, streaming=streaming).rows
        assert list(map(contents, loaded)) == [[["?"], [answer]]]
    with pytest.raises(ValueError, match="with the split 'dev': .*data/dev not found.* Check"):
        load_conversations(str(tmp_path / "data"), split="dev", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_pictures_with_metadata_is_read(streaming, tmp_path, folder):
    for name in ("broken.png", "cut.jpg", "link.jpg", "up"):
        (folder / name).unlink()
    lines = [
        {"images_file_names": ["deep/blue.png", "red.png"], "messages": chat("Same?", "no")},
        {"images_file_names": ["green.png"], "messages": chat("Colour?", "green")},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loaded = list(load_conversations(str(folder), streaming=streaming).rows)
    assert list(map(contents, loaded)) == [[[None, None, "Same?"], ["no"]], [[None, "Colour?"], ["green"]]]
    assert colours(loaded[0]) == [COLOURS["deep/blue.png"], COLOURS["red.png"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["datasets", "llava"])
def test_minibench_is_read_back_from_both_forms_as_the_same_rows(form, streaming, tmp_path):
    rows = MiniBench("train", 12, 2, seed=2)
    assert {len(row["images"]) for row in rows} == {1, 2}
    args = f"--output_dir {tmp_path / form} --format {form} --split train --size 12 --questions_per_row 2 --seed 2"
    export.main(export.parse_args(args.split()))
    if form == "datasets":
        loaded, bad_rows = load_conversations(str(tmp_path / form), streaming=streaming)
    else:
        data = str(tmp_path / form / "train.json")
        loaded, bad_rows = load_conversations(data, image_folder=str(tmp_path / form), streaming=streaming)
    assert not bad_rows and loaded.features == FEATURES
    for row, record in zip(rows, loaded, strict=True):
        assert [message["role"] for message in record["messages"]] == [message["role"] for message in row["messages"]]
        assert contents(record) == [[part.get("text") for part in message["content"]] for message in row["messages"]]
        for picture, other in zip(row["images"], record["images"], strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(other))


@pytest.mark.parametrize("streaming", [False, True])
def test_embedded_bytes_are_used_and_not_a_file_that_has_their_name(streaming, tmp_path, monkeypatch, folder):
    row = {"images": [{**encode("green.png"), "path": "red.png"}], "messages": chat(parts(None, "?"), parts("x"))}
    data = save([row], tmp_path / "data")
    monkeypatch.chdir(folder)
    loaded = next(iter(load_conversations(data, streaming=streaming).rows))
    assert colours(loaded) == [COLOURS["green.png"]]


# Bad rows of LLaVA's JSON

BAD = {
    "missing": (llava("gone.png"), r"the picture .*gone.png' cannot be read: .*no longer here"),
    "broken": (llava("broken.png"), r"the picture .*broken.png' cannot be read: .*not a picture"),
    "cut": (llava("cut.jpg"), r"the picture .*cut.jpg' cannot be read: .*damaged or cut off"),
    "folder": (llava("deep"), r"the picture .*deep' cannot be read: The picture is a folder, a pipe or a device"),
    "empty name": (llava(""), r"the picture .* cannot be read: The picture is a folder, a pipe or a device"),
    "dots": (llava("../secret.jpg"), r"the picture '../secret.jpg' lies outside of .*images'"),
    "absolute": (llava("/etc/passwd"), r"the picture '/etc/passwd' lies outside of"),
    "link": (llava("link.jpg"), r"the picture 'link.jpg' lies outside of"),
    "linked folder": (llava("up/secret.jpg"), r"the picture 'up/secret.jpg' lies outside of"),
    "null byte": (llava("a\0.png"), r"is not the name of a picture: .*null"),
    "number": (llava(7), r"image is 7, not a string"),
    "no mark": (
        llava("red.png", "Colour?", "red"),
        r"1 image but 0 <image> marks .* and 0 elsewhere",
    ),
    "two marks": (llava("red.png", "<image><image>?", "red"), r"1 image but 2 <image> marks .* and 0 elsewhere"),
    "no image": (text_only("<image>\nColour?"), r"0 images but 1 <image> mark .* and 0 elsewhere"),
    "late mark": (llava("red.png", "Hi", "Hi", "<image>?", "red"), r"0 <image> marks .* 1 elsewhere"),
    "mark in reply": (text_only("Hi", "<image>"), r"0 <image> marks .* 1 elsewhere"),
    "empty reply": (text_only("Hi", ""), r"the reply in message 1 is empty"),
    "blank reply": (text_only("Hi", " \n"), r"the reply in message 1 is empty"),
    "role": ({"conversations": [{"from": "tool", "value": "x"}]}, r"from 'tool', and only system, human, gpt speak"),
    "no role": ({"conversations": [{"value": "x"}]}, r"from None, and only system, human, gpt speak"),
    "odd role": ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"from \['gpt'\], and only"),
    "no reply": ({"conversations": turns("Hi")}, r"no message is from the assistant, .*: user"),
    "twice": (
        {"conversations": turns("Hi", "Hi") + turns("Hi", "Hi")[1:]},
        r"do not take turns: user, assistant, assistant",
    ),
    "reply first": (
        {"conversations": turns("Hi", "Hi", "Hi", "Hi")[1:]},
        r"take turns: assistant, user, assistant",
    ),
    "no message": ({"conversations": []}, r"it has no messages"),
    "no conversations": ({"messages": []}, r"conversations is None, not a list"),
    "text": ({"conversations": "Hi"}, r"conversations is 'Hi', not a list"),
    "turn": ({"conversations": ["Hi"]}, r"an entry of conversations is 'Hi', not a dictionary"),
    "value": ({"conversations": [{"from": "human", "value": 3}]}, r"value is 3, not a string"),
    "surrogate": (text_only("Hi", "\ud800"), r"the text '.ud800' is not valid Unicode"),
    "row": (["Hi"], r"the row is \['Hi'\], not a dictionary"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_index_and_reason_or_left_out_with_a_warning(case, write, folder):
    row, reason = BAD[case]
    data = write([llava(), text_only(), row, llava("green.png")])
    with pytest.raises(ValueError, match=f"1 of 4 rows read from .*:\nrow 2: .*{reason}.*\nMend them, or"):
        load_conversations(data, image_folder=str(folder))
    with pytest.warns(UserWarning, match=f"Left out 1 of 4 rows of .*\nrow 2: .*{reason}") as caught:
        rows, bad_rows = load_conversations(data, image_folder=str(folder), skip_bad_rows=True)
    assert list(bad_rows) == [2] and sum("Left out" in str(warning.message) for warning in caught) == 1
    assert list(map(colours, rows)) == [[COLOURS["red.png"]], [], [COLOURS["green.png"]]]
    assert [content(row["messages"][-1]) for row in rows] == [["red"], ["2"], ["red"]]


def test_a_damaged_line_of_jsonl_is_a_bad_row(write, folder):
    data = write([llava(), text_only()], "rows.jsonl")
    with open(data, "a") as file:
        file.write('{"id": "cut", "conv')
    with pytest.raises(ValueError, match='1 of 3 rows read from .*:\nrow 2: the row is b\'{"id"'):
        load_conversations(data, image_folder=str(folder))


def test_a_picture_too_large_to_be_honest_is_a_bad_row(write, folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 3)
    with pytest.raises(ValueError, match="row 0: the picture .* cannot be read: The picture has more than"):
        load_conversations(write([llava(), text_only()]), image_folder=str(folder))


def test_a_link_inside_the_folder_is_followed(write, folder):
    rows = load_conversations(write([llava("alias.png"), llava("deep/../red.png")]), image_folder=str(folder)).rows
    assert list(map(colours, rows)) == [[COLOURS["red.png"]]] * 2


def test_one_error_counts_all_bad_rows_and_lists_the_first_twenty(write, folder):
    rows = [llava() if index % 2 else text_only("Hi", "") for index in range(60)]
    with pytest.raises(ValueError, match="30 of 60 rows read from") as caught:
        load_conversations(write(rows), image_folder=str(folder))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-2]] == [f"row {index}" for index in range(0, 40, 2)]
    assert lines[-2:] == ["and 10 more", "Mend them, or leave them out with --skip_bad_rows."]
    with pytest.warns(UserWarning, match="(?s)Left out 30 of 60 rows.*row 38: .*and 10 more$"):
        loaded, bad_rows = load_conversations(write(rows), image_folder=str(folder), skip_bad_rows=True)
    assert len(loaded) == 30 and list(bad_rows) == list(range(0, 60, 2))


def test_good_rows_give_no_warning_and_no_bad_rows(write, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for skip in (False, True):
            loaded = load_conversations(write([llava()]), image_folder=str(folder), skip_bad_rows=skip)
            assert loaded.bad_rows == {} and len(loaded.rows) == 1


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:Left out row")
def test_without_a_good_row_nothing_is_trained_in_either_mode(skip_bad_rows, streaming, write):
    for rows, message in (
        ([text_only("Hi", "")] * 2, "row 0: the reply in message 1 is empty"),
        ([], "has no rows: name other data"),
    ):
        for name in ("rows.json", "rows.jsonl"):
            with pytest.raises(ValueError, match=f"(?s){message}"):
                list(load_conversations(write(rows, name), skip_bad_rows=skip_bad_rows, streaming=streaming).rows)


def test_the_check_shows_a_progress_bar_with_its_end_where_that_is_known(write, folder, tmp_path, capsys):
    load_conversations(write([llava()] * 3), image_folder=str(folder))
    assert "Checking rows: 100%" in capsys.readouterr().err
    rows = [{"images": [], "messages": chat(parts("?"), parts("x"))}] * 3
    data = save(rows, tmp_path / "data")
    capsys.readouterr()
    load_conversations(data)
    assert "Checking rows: 100%" in capsys.readouterr().err


# Streams


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_stream_gives_the_same_rows_in_every_pass(name, write, folder):
    rows = [llava(), text_only(), llava(["red.png", "green.png"], "<image><image>Same?", "no")]
    data = write(rows, name)
    table = load_conversations(data, image_folder=str(folder)).rows
    stream = load_conversations(data, image_folder=str(folder), streaming=True).rows
    assert isinstance(stream, IterableDataset) and stream.features == FEATURES
    for _ in range(2):
        assert list(map(contents, stream)) == list(map(contents, table))
        assert list(map(colours, stream)) == list(map(colours, table))


def test_a_stream_raises_at_the_first_bad_row_and_not_before(write, folder):
    data = write([llava(), llava("gone.png"), text_only("Hi", "")], "rows.jsonl")
    stream = iter(load_conversations(data, image_folder=str(folder), streaming=True).rows)
    assert contents(next(stream)) == [[None, "Colour?"], ["red"]]
    with pytest.raises(ValueError, match="1 of 2 rows read from .*:\nrow 1: .*gone.png.*\nMend .*skip_bad"):
        next(stream)


def test_a_stream_skips_counts_and_tells_of_bad_rows_and_counts_them_once_in_two_passes(write, folder):
    data = write([llava(), llava("gone.png"), text_only("Hi", ""), text_only()], "rows.jsonl")
    rows, bad_rows = load_conversations(data, image_folder=str(folder), streaming=True, skip_bad_rows=True)
    assert bad_rows == {}
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            assert [len(row["images"]) for row in rows] == [1, 0]
        told = [str(warning.message) for warning in caught]
        assert "Left out row 1 of" in told[0] and "Left out row 2 of" in told[1]
        assert (
            "Left out 2 of 4 rows" in told[2]
            and "row 2: the reply in message 1 is empty" in told[2]
            and len(told) == 3
        )
        assert list(bad_rows) == [1, 2] and "gone.png" in bad_rows[1]


def test_a_stream_tells_of_the_first_twenty_bad_rows_one_by_one_and_of_the_others_at_the_end(write):
    data = write([text_only("Hi", "")] * 25 + [text_only()], "rows.jsonl")
    rows, bad_rows = load_conversations(data, streaming=True, skip_bad_rows=True)
    with pytest.warns(UserWarning) as caught:
        assert len(list(rows)) == 1
    told = [str(warning.message) for warning in caught]
    assert len(told) == 21 and "row 19 of" in told[19] and "Left out 25 of 26 rows" in told[20]
    assert len(bad_rows) == 25


def test_a_stream_of_jsonl_reads_a_line_when_it_is_asked_for(write, monkeypatch):
    read = []
    loads = json.loads
    data = write([text_only()] * 50, "rows.jsonl")
    rows = load_conversations(data, streaming=True).rows
    monkeypatch.setattr(conversations.json, "loads", lambda line: read.append(line) or loads(line))
    stream = iter(rows)
    assert read == []
    next(stream)
    assert 1 <= len(read) <= 3


# What cannot be read


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("error", [DatasetNotFoundError("it doesn't exist"), ConnectionError("no network")])
def test_a_data_set_that_is_nowhere_is_an_error_with_its_name(error, streaming, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(conversations, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"'no/such' cannot be read as a data set .*{error}.*Check the name"):
        load_conversations("no/such", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_holds_no_data_set_is_refused(streaming, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"no parquet")
    for name in ("empty", "gone", "damaged"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as a data set .*Check the name"):
            load_conversations(str(tmp_path / name), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_are_refused_with_those_that_are_there(streaming, tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"question": ["?"]}).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match="has the columns .*question.*, and training needs images, .*: rename"):
        load_conversations(str(tmp_path / "data"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "got"), [('{"a": 1}', "a dict"), ("[1, 2", "Expecting"), ("\xff", "codec|Expecting")]
)
def test_a_json_that_is_no_list_is_refused(text, got, streaming, tmp_path):
    (tmp_path / "rows.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"is not a JSON list of rows .*({got}).*LLaVA's form"):
        list(load_conversations(str(tmp_path / "rows.json"), streaming=streaming).rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_pictures_want_an_image_folder(streaming, write, tmp_path):
    for skip in (False, True):
        with pytest.raises(ValueError, match="pictures such as 'red.png', and no image_folder is given: name"):
            list(load_conversations(write([text_only(), llava()]), streaming=streaming, skip_bad_rows=skip).rows)
    with pytest.raises(ValueError, match="The image_folder .*gone' is not a folder: check"):
        load_conversations(write([text_only()]), image_folder=str(tmp_path / "gone"), streaming=streaming)


def test_a_missing_file_and_an_image_folder_without_a_json_are_refused(folder):
    with pytest.raises(ValueError, match="There is no JSON file 'gone.json': check"):
        load_conversations("gone.json", image_folder=str(folder))
    with pytest.raises(ValueError, match="The image_folder .*images' goes with a .json .*: leave it out"):
        load_conversations(str(folder), image_folder=str(folder))


# Fingerprint


def test_the_fingerprint_is_that_of_the_texts_the_pictures_and_their_order(write, folder, tmp_path):
    def fingerprint(*rows: dict) -> str:
        return data_fingerprint(load_conversations(write(list(rows)), image_folder=str(folder)).rows)

    one, other = llava(), llava("green.png")
    prints = [fingerprint(one, other), fingerprint(other, one), fingerprint(one), fingerprint(one, text_only())]
    prints.append(fingerprint(llava("alias.png"), llava("red.png")))
    Image.new("RGB", (SIDE * 2, SIDE)).save(folder / "red.png")
    prints.append(fingerprint(one, other))
    assert len(set(prints)) == 6 and {len(print) for print in prints} == {16}
    folder.rename(tmp_path / "moved")
    moved = load_conversations(write([one, other]), image_folder=str(tmp_path / "moved")).rows
    assert data_fingerprint(moved) == prints[-1]


def test_the_fingerprint_of_embedded_pictures_is_that_of_their_bytes(tmp_path):
    def fingerprint(name: str, folder: str) -> str:
        picture = encode(name, "BMP")  # of the same length in every colour
        row = {"images": [picture], "messages": chat(parts(None, "?"), parts("x"))}
        return data_fingerprint(load_conversations(save([row], tmp_path / folder)).rows)

    assert fingerprint("red.png", "a") == fingerprint("red.png", "b") != fingerprint("green.png", "c")


def test_the_fingerprint_is_the_same_in_every_process(write):
    assert data_fingerprint(load_conversations(write([text_only()])).rows) == "2f265695fcfad923"


def test_the_fingerprint_of_a_stream_is_that_of_its_source(write, tmp_path):
    def fingerprint(data: str, **kwargs) -> str:
        return data_fingerprint(load_conversations(data, streaming=True, **kwargs).rows)

    one = fingerprint(write([text_only()], "rows.jsonl"))
    assert (
        one == fingerprint(write([text_only()], "rows.jsonl")) != fingerprint(write([text_only()] * 2, "rows.jsonl"))
    )
