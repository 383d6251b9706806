"""conversations.py: LLaVA's JSON, images and messages, where data sets lie, and how a data set is known again."""

import json
import os

import datasets
import numpy as np
import pytest
from conversation_rows import COLOURS, SIDE, chat, colours, contents, encode, llava, parts, save, text_only
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from dpvr.data import conversations
from dpvr.data.conversations import FEATURES, data_fingerprint, load_conversations
from minibench import export
from minibench.data import MiniBench

pytestmark = pytest.mark.usefixtures("own_cache")

# LLaVA's JSON


def test_marks_are_taken_out_and_the_pictures_go_in_front_wherever_the_marks_were(write_rows, picture_folder):
    values = [("<image>\nColour?", "red", "Sure?", "yes"), ("Colour?\n<image>", "red"), ("What <image> is it?", "red")]
    data = write_rows([llava("red.png", *value) for value in values])
    rows = load_conversations(data, image_folder=str(picture_folder)).rows
    assert list(map(contents, rows)) == [
        [[None, "Colour?"], ["red"], ["Sure?"], ["yes"]],
        [[None, "Colour?"], ["red"]],
        [[None, "What  is it?"], ["red"]],
    ]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2


def test_several_pictures_keep_their_order(write_rows, picture_folder):
    names = ["deep/blue.png", "red.png", "green.png"]
    row = llava(names, "<image> <image>\nWhich <image> is red?", "the second")
    row = load_conversations(write_rows([row]), image_folder=str(picture_folder)).rows[0]
    assert colours(row) == [COLOURS[name] for name in names]
    assert contents(row) == [[None, None, None, "Which  is red?"], ["the second"]]


def test_rows_without_a_picture_stand_among_others_and_need_no_image_folder(write_rows, picture_folder):
    other = {**text_only("  Keep my spaces ", " and mine\n"), "image": None}
    rows = load_conversations(write_rows([text_only(), llava(), other]), image_folder=str(picture_folder)).rows
    assert [len(row["images"]) for row in rows] == [0, 1, 0]
    assert contents(rows[2]) == [["  Keep my spaces "], [" and mine\n"]]
    assert contents(load_conversations(write_rows([text_only()])).rows[0]) == [["Two?"], ["2"]]


def test_a_system_message_may_come_first(write_rows):
    row = text_only()
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    messages = load_conversations(write_rows([row])).rows[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_lines_of_jsonl_are_read_as_the_list_is(write_rows, picture_folder):
    rows = [llava(), text_only(), llava(["red.png", "green.png"], "<image><image>Same?", "no")]
    one, other = (
        load_conversations(write_rows(rows, name), image_folder=str(picture_folder)).rows
        for name in ("a.json", "b.jsonl")
    )
    assert list(map(contents, one)) == list(map(contents, other)) and len(other) == 3
    assert list(map(colours, one)) == list(map(colours, other))


def test_columns_are_those_of_trls_vision_format(write_rows, picture_folder):
    rows = load_conversations(write_rows([llava(), text_only()]), image_folder=str(picture_folder)).rows
    assert isinstance(rows, Dataset) and rows.features == FEATURES
    assert set(rows[0]["messages"][0]["content"][0]) == {"type", "text"}


def test_a_table_holds_paths_and_opens_a_picture_only_when_its_row_is_used(write_rows, picture_folder):
    rows = load_conversations(write_rows([llava(), llava("green.png")]), image_folder=str(picture_folder)).rows
    stored = rows.with_format("arrow")[:]["images"].to_pylist()
    assert stored[0] == [{"bytes": None, "path": os.path.realpath(picture_folder / "red.png")}]
    Image.new("RGB", (SIDE, SIDE), COLOURS["deep/blue.png"]).save(picture_folder / "green.png")
    (picture_folder / "red.png").unlink()
    assert colours(rows[1]) == [COLOURS["deep/blue.png"]]
    with pytest.raises(ValueError, match="the picture .*red.png' cannot be read: .*no longer here"):
        rows[0]


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
def test_a_folder_of_pictures_with_metadata_is_read(streaming, tmp_path, picture_folder):
    for name in ("broken.png", "cut.jpg", "link.jpg", "up"):
        (picture_folder / name).unlink()
    lines = [
        {"images_file_names": ["deep/blue.png", "red.png"], "messages": chat("Same?", "no")},
        {"images_file_names": ["green.png"], "messages": chat("Colour?", "green")},
    ]
    (picture_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loaded = list(load_conversations(str(picture_folder), streaming=streaming).rows)
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
def test_embedded_bytes_are_used_and_not_a_file_that_has_their_name(streaming, tmp_path, monkeypatch, picture_folder):
    row = {"images": [{**encode("green.png"), "path": "red.png"}], "messages": chat(parts(None, "?"), parts("x"))}
    data = save([row], tmp_path / "data")
    monkeypatch.chdir(picture_folder)
    loaded = next(iter(load_conversations(data, streaming=streaming).rows))
    assert colours(loaded) == [COLOURS["green.png"]]


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
def test_rows_with_pictures_want_an_image_folder(streaming, write_rows, tmp_path):
    for skip in (False, True):
        with pytest.raises(ValueError, match="pictures such as 'red.png', and no image_folder is given: name"):
            list(load_conversations(write_rows([text_only(), llava()]), streaming=streaming, skip_bad_rows=skip).rows)
    with pytest.raises(ValueError, match="The image_folder .*gone' is not a folder: check"):
        load_conversations(write_rows([text_only()]), image_folder=str(tmp_path / "gone"), streaming=streaming)


def test_a_missing_file_and_an_image_folder_without_a_json_are_refused(picture_folder):
    with pytest.raises(ValueError, match="There is no JSON file 'gone.json': check"):
        load_conversations("gone.json", image_folder=str(picture_folder))
    with pytest.raises(ValueError, match="The image_folder .*images' goes with a .json .*: leave it out"):
        load_conversations(str(picture_folder), image_folder=str(picture_folder))


# Fingerprint


def test_the_fingerprint_is_that_of_the_texts_the_pictures_and_their_order(write_rows, picture_folder, tmp_path):
    def fingerprint(*rows: dict) -> str:
        return data_fingerprint(load_conversations(write_rows(list(rows)), image_folder=str(picture_folder)).rows)

    one, other = llava(), llava("green.png")
    prints = [fingerprint(one, other), fingerprint(other, one), fingerprint(one), fingerprint(one, text_only())]
    prints.append(fingerprint(llava("alias.png"), llava("red.png")))
    Image.new("RGB", (SIDE * 2, SIDE)).save(picture_folder / "red.png")
    prints.append(fingerprint(one, other))
    assert len(set(prints)) == 6 and {len(print) for print in prints} == {16}
    picture_folder.rename(tmp_path / "moved")
    moved = load_conversations(write_rows([one, other]), image_folder=str(tmp_path / "moved")).rows
    assert data_fingerprint(moved) == prints[-1]


def test_the_fingerprint_of_embedded_pictures_is_that_of_their_bytes(tmp_path):
    def fingerprint(name: str, picture_folder: str) -> str:
        picture = encode(name, "BMP")  # of the same length in every colour
        row = {"images": [picture], "messages": chat(parts(None, "?"), parts("x"))}
        return data_fingerprint(load_conversations(save([row], tmp_path / picture_folder)).rows)

    assert fingerprint("red.png", "a") == fingerprint("red.png", "b") != fingerprint("green.png", "c")


def test_the_fingerprint_is_the_same_in_every_process(write_rows):
    assert data_fingerprint(load_conversations(write_rows([text_only()])).rows) == "2f265695fcfad923"


def test_the_fingerprint_of_a_stream_is_that_of_its_source(write_rows, tmp_path):
    def fingerprint(data: str, **kwargs) -> str:
        return data_fingerprint(load_conversations(data, streaming=True, **kwargs).rows)

    one = fingerprint(write_rows([text_only()], "rows.jsonl"))
    assert one == fingerprint(write_rows([text_only()], "rows.jsonl"))
    assert one != fingerprint(write_rows([text_only()] * 2, "rows.jsonl"))
