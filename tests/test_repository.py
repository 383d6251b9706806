"""The repository itself: its root is dpvr-mini, which loads from anywhere and answers questions about new pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoProcessor

from minibench.data import to_messages
from minibench.evaluate import evaluate, make_items
from modeling_dpvr import DpvrLlavaForConditionalGeneration

ROOT = Path(__file__).parent.parent
AUTO_CLASS = "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForImageTextToText"

FLOORS = {"existence": 0.8, "choice_en": 0.4, "science": 0.5}  # by guessing 0.5, 0.25 and 0.27 at most

LOAD_AND_ANSWER = f"""
import sys
from transformers import AutoModel, AutoProcessor, AutoTokenizer, {AUTO_CLASS}
from PIL import Image
root, picture, question = sys.argv[1:]
model = {AUTO_CLASS}.from_pretrained(root, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
assert len(AutoTokenizer.from_pretrained(root, trust_remote_code=True)) == len(processor.tokenizer)
assert type(AutoModel.from_pretrained(root, trust_remote_code=True)).__name__ == type(model).__name__
assert model.config.routing == "late_fusion" and model.dtype.is_floating_point
content = [{{"type": "image"}}, {{"type": "text", "text": question}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
reply = model.generate(**inputs, max_new_tokens=20, do_sample=False)
assert reply[0, -1] == processor.tokenizer.eos_token_id  # it stops by itself
print(processor.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""


@pytest.fixture(scope="module")
def model() -> DpvrLlavaForConditionalGeneration:
    return DpvrLlavaForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def test_it_loads_by_the_auto_classes_from_another_folder_and_answers(tmp_path):
    item = make_items("test", 2, tasks=["existence"])[0]
    ((question, answer),) = item.questions
    item.scenes[0].draw().save(tmp_path / "picture.png")
    command = [sys.executable, "-c", LOAD_AND_ANSWER, str(ROOT), str(tmp_path / "picture.png"), question]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == answer


def test_its_weights_fit_the_repository():
    files = [path for path in ROOT.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert [path.suffix for path in files] == [".safetensors"]
    assert sum(path.stat().st_size for path in files) < 40e6


def test_it_has_twelve_layers_or_more_and_no_tower_of_its_own_to_load(model):
    assert model.config.text_config.num_hidden_layers >= 12
    assert model.config.routing == "late_fusion" and model.config.base_model_name_or_path is None


@pytest.mark.parametrize("routing", ["none", "late_fusion"])
def test_it_answers_about_pictures_it_has_not_seen_and_stops_by_itself(model, processor, routing):
    model.set_routing(routing)
    scores = evaluate(model, processor, num_questions=60, seed=7, tasks=list(FLOORS))
    model.set_routing("late_fusion")
    assert all(scores["tasks"][task] > floor for task, floor in FLOORS.items()), scores["tasks"]
    assert scores["ended"] == 1.0


def test_it_is_at_chance_when_the_picture_is_blanked(model, processor):
    scores = evaluate(model, processor, num_questions=200, seed=7, blind=True, tasks=["existence"])
    assert abs(scores["tasks"]["existence"] - 0.5) < 0.1


@torch.no_grad()
def test_a_batch_of_real_prompts_gets_the_answers_of_one_by_one_with_and_without_cache(model, processor):
    asked = [(item.scenes, item.questions[0][0]) for item in make_items("test", 2, seed=5)]
    prompts = [
        processor.apply_chat_template(to_messages([(text, None)], len(scenes)), add_generation_prompt=True)
        for scenes, text in asked
    ]
    images = [[scene.draw() for scene in scenes] for scenes, _ in asked]
    options = {"max_new_tokens": 6, "do_sample": False}
    single = []
    for pictures, prompt in zip(images, prompts, strict=True):
        inputs = processor(images=pictures, text=prompt, return_tensors="pt")
        reply = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        single.append(processor.decode(reply, skip_special_tokens=True))
    assert {len(pictures) for pictures in images} == {1, 2}
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    for use_cache in (True, False):
        replies = model.generate(**inputs, **options, use_cache=use_cache)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(replies, skip_special_tokens=True) == single
