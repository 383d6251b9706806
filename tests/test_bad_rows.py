"""conversations.py: rows that cannot be trained on, named or left out, of a table and of a stream."""

import json
import warnings

import pytest
from conversation_rows import COLOURS, SIDE, chat, colours, content, contents, llava, parts, save, text_only, turns
from datasets import IterableDataset
from PIL import Image

from dpvr.data import conversations
from dpvr.data.conversations import FEATURES, load_conversations

pytestmark = pytest.mark.usefixtures("own_cache")

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
def test_a_bad_row_is_named_by_index_and_reason_or_left_out_with_a_warning(case, write_rows, picture_folder):
    row, reason = BAD[case]
    data = write_rows([llava(), text_only(), row, llava("green.png")])
    with pytest.raises(ValueError, match=f"1 of 4 rows read from .*:\nrow 2: .*{reason}.*\nMend them, or"):
        load_conversations(data, image_folder=str(picture_folder))
    with pytest.warns(UserWarning, match=f"Left out 1 of 4 rows of .*\nrow 2: .*{reason}") as caught:
        rows, bad_rows = load_conversations(data, image_folder=str(picture_folder), skip_bad_rows=True)
    assert list(bad_rows) == [2] and sum("Left out" in str(warning.message) for warning in caught) == 1
    assert list(map(colours, rows)) == [[COLOURS["red.png"]], [], [COLOURS["green.png"]]]
    assert [content(row["messages"][-1]) for row in rows] == [["red"], ["2"], ["red"]]


def test_a_damaged_line_of_jsonl_is_a_bad_row(write_rows, picture_folder):
    data = write_rows([llava(), text_only()], "rows.jsonl")
    with open(data, "a") as file:
        file.write('{"id": "cut", "conv')
    with pytest.raises(ValueError, match='1 of 3 rows read from .*:\nrow 2: the row is b\'{"id"'):
        load_conversations(data, image_folder=str(picture_folder))


def test_a_picture_too_large_to_be_honest_is_a_bad_row(write_rows, picture_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 3)
    with pytest.raises(ValueError, match="row 0: the picture .* cannot be read: The picture has more than"):
        load_conversations(write_rows([llava(), text_only()]), image_folder=str(picture_folder))


def test_a_link_inside_the_folder_is_followed(write_rows, picture_folder):
    rows = load_conversations(
        write_rows([llava("alias.png"), llava("deep/../red.png")]), image_folder=str(picture_folder)
    ).rows
    assert list(map(colours, rows)) == [[COLOURS["red.png"]]] * 2


def test_one_error_counts_all_bad_rows_and_lists_the_first_twenty(write_rows, picture_folder):
    rows = [llava() if index % 2 else text_only("Hi", "") for index in range(60)]
    with pytest.raises(ValueError, match="30 of 60 rows read from") as caught:
        load_conversations(write_rows(rows), image_folder=str(picture_folder))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:-2]] == [f"row {index}" for index in range(0, 40, 2)]
    assert lines[-2:] == ["and 10 more", "Mend them, or leave them out with --skip_bad_rows."]
    with pytest.warns(UserWarning, match="(?s)Left out 30 of 60 rows.*row 38: .*and 10 more$"):
        loaded, bad_rows = load_conversations(write_rows(rows), image_folder=str(picture_folder), skip_bad_rows=True)
    assert len(loaded) == 30 and list(bad_rows) == list(range(0, 60, 2))


def test_good_rows_give_no_warning_and_no_bad_rows(write_rows, picture_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for skip in (False, True):
            loaded = load_conversations(write_rows([llava()]), image_folder=str(picture_folder), skip_bad_rows=skip)
            assert loaded.bad_rows == {} and len(loaded.rows) == 1


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:Left out row")
def test_without_a_good_row_nothing_is_trained_in_either_mode(skip_bad_rows, streaming, write_rows):
    for rows, message in (
        ([text_only("Hi", "")] * 2, "row 0: the reply in message 1 is empty"),
        ([], "has no rows: name other data"),
    ):
        for name in ("rows.json", "rows.jsonl"):
            with pytest.raises(ValueError, match=f"(?s){message}"):
                list(load_conversations(write_rows(rows, name), skip_bad_rows=skip_bad_rows, streaming=streaming).rows)


def test_the_check_shows_a_progress_bar_with_its_end_where_that_is_known(write_rows, picture_folder, tmp_path, capsys):
    load_conversations(write_rows([llava()] * 3), image_folder=str(picture_folder))
    assert "Checking rows: 100%" in capsys.readouterr().err
    rows = [{"images": [], "messages": chat(parts("?"), parts("x"))}] * 3
    data = save(rows, tmp_path / "data")
    capsys.readouterr()
    load_conversations(data)
    assert "Checking rows: 100%" in capsys.readouterr().err


# Streams


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_stream_gives_the_same_rows_in_every_pass(name, write_rows, picture_folder):
    rows = [llava(), text_only(), llava(["red.png", "green.png"], "<image><image>Same?", "no")]
    data = write_rows(rows, name)
    table = load_conversations(data, image_folder=str(picture_folder)).rows
    stream = load_conversations(data, image_folder=str(picture_folder), streaming=True).rows
    assert isinstance(stream, IterableDataset) and stream.features == FEATURES
    for _ in range(2):
        assert list(map(contents, stream)) == list(map(contents, table))
        assert list(map(colours, stream)) == list(map(colours, table))


def test_a_stream_raises_at_the_first_bad_row_and_not_before(write_rows, picture_folder):
    data = write_rows([llava(), llava("gone.png"), text_only("Hi", "")], "rows.jsonl")
    stream = iter(load_conversations(data, image_folder=str(picture_folder), streaming=True).rows)
    assert contents(next(stream)) == [[None, "Colour?"], ["red"]]
    with pytest.raises(ValueError, match="1 of 2 rows read from .*:\nrow 1: .*gone.png.*\nMend .*skip_bad"):
        next(stream)


def test_a_stream_skips_counts_and_tells_of_bad_rows_and_counts_them_once_in_two_passes(write_rows, picture_folder):
    data = write_rows([llava(), llava("gone.png"), text_only("Hi", ""), text_only()], "rows.jsonl")
    rows, bad_rows = load_conversations(data, image_folder=str(picture_folder), streaming=True, skip_bad_rows=True)
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


def test_a_stream_tells_of_the_first_twenty_bad_rows_one_by_one_and_of_the_others_at_the_end(write_rows):
    data = write_rows([text_only("Hi", "")] * 25 + [text_only()], "rows.jsonl")
    rows, bad_rows = load_conversations(data, streaming=True, skip_bad_rows=True)
    with pytest.warns(UserWarning) as caught:
        assert len(list(rows)) == 1
    told = [str(warning.message) for warning in caught]
    assert len(told) == 21 and "row 19 of" in told[19] and "Left out 25 of 26 rows" in told[20]
    assert len(bad_rows) == 25


def test_a_stream_of_jsonl_reads_a_line_when_it_is_asked_for(write_rows, monkeypatch):
    read = []
    loads = json.loads
    data = write_rows([text_only()] * 50, "rows.jsonl")
    rows = load_conversations(data, streaming=True).rows
    monkeypatch.setattr(conversations.json, "loads", lambda line: read.append(line) or loads(line))
    stream = iter(rows)
    assert read == []
    next(stream)
    assert 1 <= len(read) <= 3
