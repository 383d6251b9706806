"""The repository itself: its root is dpvr-mini, which loads from anywhere and answers questions about new pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoProcessor

from minibench.data import evaluation_items, to_messages
from minibench.evaluate import evaluate
from modeling_dpvr import DpvrLlavaForConditionalGeneration

ROOT = Path(__file__).parent.parent
AUTO_CLASS = "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForImageTextToText"

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
    item = next(item for item in evaluation_items("test", 1) if item.kind == "attribute")
    item.image.save(tmp_path / "picture.png")
    command = [sys.executable, "-c", LOAD_AND_ANSWER, str(ROOT), str(tmp_path / "picture.png"), item.question]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == item.answer


def test_its_weights_fit_the_repository():
    files = [path for path in ROOT.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert [path.suffix for path in files] == [".safetensors"]
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize("routing", ["late_fusion", "none"])
def test_it_answers_at_least_85_percent_on_pictures_it_has_not_seen(model, processor, routing):
    model.set_routing(routing)
    scores = evaluate(model, processor, num_questions=60)
    model.set_routing("late_fusion")
    assert all(kind["accuracy"] >= 0.85 for kind in scores["kinds"].values()), scores


def test_it_is_at_chance_when_the_picture_is_blanked(model, processor):
    scores = evaluate(model, processor, num_questions=60, blind=True)
    for kind, score in scores["kinds"].items():
        assert score["accuracy"] <= score["chance"] + 0.1, (kind, score)


@torch.no_grad()
def test_a_batch_of_real_prompts_gets_the_answers_of_one_by_one_with_and_without_cache(model, processor):
    items = evaluation_items("test", 4, seed=5)
    prompts = [
        processor.apply_chat_template(to_messages([(item.question, None)]), add_generation_prompt=True)
        for item in items
    ]
    options = {"max_new_tokens": 6, "do_sample": False}
    single = []
    for item, prompt in zip(items, prompts, strict=True):
        inputs = processor(images=item.image, text=prompt, return_tensors="pt")
        reply = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        single.append(processor.decode(reply, skip_special_tokens=True))
    images = [item.image for item in items]
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    for use_cache in (True, False):
        replies = model.generate(**inputs, **options, use_cache=use_cache)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(replies, skip_special_tokens=True) == single
