"""conversations.py: a data set's column of pictures that the base is shown, teacher_images."""

import datasets
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

from dpvr.data.conversations import TEACHER_IMAGES, data_fingerprint, load_conversations
from dpvr.data.prompts import TEACHER
from dpvr.training.collators import ReplyCollator

SAID = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}]


def picture(colour: str, side: int = 8) -> Pictures.Image:
    return Pictures.new("RGB", (side, side), colour)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes a data set with these columns of pictures, a row each, and returns its folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def save(name: str = "rows", **pictures: list) -> str:
        columns = {key: [Image()] for key in pictures}
        said = [{"role": Value("string"), "content": Value("string")}]
        count = len(pictures["images"])
        rows = Dataset.from_dict({**pictures, "messages": [SAID] * count}, Features({**columns, "messages": said}))
        rows.save_to_disk(str(tmp_path / name))
        return str(tmp_path / name)

    return save


def test_both_pictures_of_a_row_arrive_and_tell_data_apart(saved):
    pairs = {
        "images": [[picture("blue")], [picture("green")]],
        "teacher_images": [[picture("red")], [picture("green")]],
    }
    rows = load_conversations(saved(**pairs)).rows
    assert rows[0]["images"][0].getpixel((0, 0)) == (0, 0, 255)
    assert rows[0][TEACHER_IMAGES][0].getpixel((0, 0)) == (255, 0, 0)
    alone = load_conversations(saved("alone", images=pairs["images"])).rows
    assert TEACHER_IMAGES not in alone.column_names
    other = load_conversations(saved("other", **pairs | {TEACHER_IMAGES: pairs["images"]})).rows
    assert len({data_fingerprint(each) for each in (rows, alone, other)}) == 3


def test_a_batch_shows_the_base_the_other_picture(saved, minibench_processor):
    pairs = {"images": [[picture("blue", 32)]], "teacher_images": [[picture("red", 32)]]}
    rows = load_conversations(saved(**pairs)).rows
    batch = ReplyCollator(minibench_processor, None, True, for_teacher=True)([rows[0]])
    swapped = [{**rows[0], "images": rows[0][TEACHER_IMAGES]}]
    shown = ReplyCollator(minibench_processor, None, True)(swapped)
    assert torch.equal(batch[TEACHER + "pixel_values"], shown["pixel_values"])
    assert not torch.equal(batch["pixel_values"], shown["pixel_values"])


@pytest.mark.parametrize("teacher", [[picture("red", 9)], [], [picture("red"), picture("red")]], ids=len)
def test_other_sizes_or_numbers_of_pictures_are_bad_rows(saved, teacher):
    folder = saved(images=[[picture("blue")], [picture("blue")]], teacher_images=[teacher, [picture("red")]])
    with pytest.raises(ValueError, match="row 0: its images have the sizes .* as many pictures, of the same sizes"):
        load_conversations(folder)
    with pytest.warns(UserWarning, match="row 0"):
        assert len(load_conversations(folder, skip_bad_rows=True).rows) == 1


def test_a_column_of_another_type_is_refused(tmp_path, saved):
    folder = saved(images=[[picture("blue")]])
    rows = Dataset.load_from_disk(folder).add_column(TEACHER_IMAGES, ["red.png"])
    rows.save_to_disk(str(tmp_path / "typed"))
    with pytest.raises(ValueError, match="has teacher_images of the type Value.* cast or drop the column"):
        load_conversations(str(tmp_path / "typed"))
