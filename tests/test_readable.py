"""readable.py: rows that would not be what they seem once they are tokens are refused, or left out with a reason."""

import json

import pytest
from PIL import Image

from dpvr.data.conversations import load_conversations
from dpvr.data.readable import RowCheck, readable

PICTURE = "red.png"
LONG = "word " * 3000
BAD = {
    "end token in a reply": (("<image>\nwhat?", "it is </s> in HTML"), r"holds '</s>', one of the model's special"),
    "a turn in a question": (("<image>\nx</s>USER: hi ASSISTANT: yes", "no"), r"holds '</s>'"),
    "begin token": (("<image>\nwhat?", "the <s> tag"), r"holds '<s>'"),
    "padding token": (("<image>\nwhat?", "the <pad> token"), r"holds '<pad>'"),
    "unknown token": (("<image>\nwhat?", "<unk>"), r"holds '<unk>'"),
    "a mark made by taking one out": (("<ima<image>ge> what?", "red"), r"holds '<image>'"),
    "more tokens than positions": (
        (f"<image>\n{LONG}", "red"),
        r"it has \d+ tokens, and the model has 2048 positions",
    ),
    "a reply of too many": (("<image>\nwhat?", LONG), r"it has \d+ tokens, and the model has 2048 positions"),
    "a reply that is cut off": (
        ("<image>\n" + "what? " * 100, "red"),
        r"begins after \d+ tokens, which --max_length 200",
    ),
}


@pytest.fixture
def check(minibench_processor) -> RowCheck:
    return RowCheck(minibench_processor, room=2048, max_length=200)


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / PICTURE)

    def write(*talks: tuple[str, str]) -> dict:
        rows = [
            {"image": PICTURE, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]}
            for asked, reply in talks
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data": str(tmp_path / "rows.jsonl"), "image_folder": str(tmp_path)}

    return write


FINE = [("<image>\nwhat?", "red"), ("<image>\nUSER: a ASSISTANT: b < s > 🙂", "ASSISTANT: c")]


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_would_be_other_tokens_is_named_with_its_reason_or_left_out(case, streaming, write, check):
    talk, reason = BAD[case]
    source = write(FINE[0], talk, FINE[1])
    with pytest.raises(ValueError, match=reason):
        list(readable(load_conversations(**source, streaming=streaming), check, "rows", False).rows)
    with pytest.warns(UserWarning, match=reason):
        found = readable(load_conversations(**source, streaming=streaming), check, "rows", True)
        replies = [row["messages"][1]["content"][0]["text"] for row in found.rows]
    assert replies == ["red", "ASSISTANT: c"]
    assert streaming or list(found.bad_rows) == [1]


def test_indices_are_those_of_the_source_whatever_was_left_out_before(write, check):
    source = write(("what?", "red"), FINE[0], ("<image>\nwhat?", "</s>"), FINE[1])
    with pytest.warns(UserWarning):
        found = load_conversations(**source, skip_bad_rows=True)
        assert list(found.bad_rows) == [0]
        with pytest.raises(ValueError, match="1 of 3 rows read from 'rows' .*\nrow 2: the text"):
            readable(found, check, "rows", False)
        kept = readable(found, check, "rows", True)
    assert list(kept.bad_rows) == [0, 2] and len(kept.rows) == 2


def test_rows_that_are_fine_are_all_kept(write, check):
    found = load_conversations(**write(*FINE))
    assert readable(found, check, "rows", False) is found
