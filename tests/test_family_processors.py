"""family_processors.py: each family's own processor makes the inputs of its tiny model, and loads again."""

import json

import pytest
import torch
from families import FAMILIES, PRESENT
from family_processors import HAS_TORCHVISION, KINDS, WITH_PROCESSOR, make_with_processor, save_family
from transformers import AutoModelForImageTextToText

from dpvr.data.prompts import Conversation, prompt_inputs
from images_dpvr import mark_ids
from minibench.scenes import make_scene
from processors_dpvr import load_processor
from versions_dpvr import LINE_4


@pytest.fixture(scope="module")
def picture():
    return make_scene("test", seed=0, index=0).draw()


def inputs_of(processor, picture, pictures: int = 1):
    if processor.chat_template is None:
        return processor(images=[picture] * pictures, text="<image>" * pictures + "answer en", return_tensors="pt")
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": "Is there a red star?"}]
    talk = Conversation([{"role": "user", "content": content}], [picture] * pictures)
    return prompt_inputs(processor, [talk])


def test_every_family_has_a_processor():
    assert KINDS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_a_picture_and_a_question_become_inputs_that_the_model_answers(name, picture):
    model, processor = make_with_processor(name)
    for count in (1, 2):
        inputs = inputs_of(processor, picture, count)
        marks = torch.isin(inputs["input_ids"], torch.tensor(mark_ids(model.config)))
        assert marks.sum() >= 4 * count
        assert inputs["input_ids"].max() < model.config.get_text_config().vocab_size
        reply = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert reply.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_a_saved_family_loads_as_from_the_hub(name, picture, tmp_path):
    save_family(name, tmp_path)
    model, processor = make_with_processor(name)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), load_processor(str(tmp_path))
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    inputs, found = inputs_of(processor, picture), inputs_of(again, picture)
    assert inputs.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in inputs.items())
    with torch.no_grad():
        assert torch.equal(loaded(**found).logits, model(**inputs).logits)
    again.save_pretrained(tmp_path / "copy")
    load_files = {path.name for path in (tmp_path / "copy").iterdir()}
    assert load_files <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(LINE_4, reason="transformers 4 saves a file of the video settings alone")
@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
def test_the_video_settings_of_an_older_repository_are_those_of_its_pictures_and_are_saved(tmp_path):
    save_family("qwen2_5_vl", tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    pictures = {**settings["image_processor"], "processor_class": settings["processor_class"]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    (tmp_path / "processor_config.json").unlink()
    processor = load_processor(str(tmp_path))
    assert type(processor).__name__ == "Qwen2_5_VLProcessor" and processor.image_processor.patch_size == 4
    processor.save_pretrained(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "processor_config.json").read_text())
    assert saved["video_processor"]["patch_size"] == saved["image_processor"]["patch_size"] == 4


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("name", [name for name in ("internvl", "qwen3_vl") if name in PRESENT])
def test_without_torchvision_a_processor_takes_pictures_and_refuses_videos(name, picture, tmp_path):
    save_family(name, tmp_path)
    processor = load_processor(str(tmp_path))
    mark = processor.video_token
    with pytest.raises(ValueError, match="Videos need torchvision, which is not installed: pip install torchvision"):
        processor(videos=[torch.zeros(2, 3, 16, 16)], text=mark, return_tensors="pt")
