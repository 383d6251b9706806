"""The repository itself: its root is dpvr-mini, which loads from anywhere and answers questions about new pictures."""

import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from transformers import AutoProcessor, BatchFeature, TextIteratorStreamer, pipeline

from dpvr.inference.evaluation import evaluate, grey
from minibench.data import make_items, to_messages
from minibench.scenes import make_scene
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
assert model.config.routing == "latent" and model.dtype.is_floating_point
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
    assert model.config.routing == "latent" and model.config.base_model_name_or_path is None


@pytest.mark.parametrize("routing", ["none", "late_fusion", "latent"])
def test_it_answers_about_pictures_it_has_not_seen_and_stops_by_itself(model, processor, routing):
    model.set_routing(routing)
    scores = evaluate(model, processor, num_questions=60, seed=7, tasks=list(FLOORS))
    model.set_routing("latent")
    assert all(scores["tasks"][task] > floor for task, floor in FLOORS.items()), scores["tasks"]
    assert scores["ended"] == 1.0


def test_it_is_at_chance_when_the_picture_is_blanked(model, processor):
    scores = evaluate(model, processor, num_questions=200, seed=7, show=grey, tasks=["existence"])
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


# -- the ways people generate -----------------------------------------------------------------------------------------

QUESTION, ANSWER = "Options: red A blue B green C yellow D\nWhat colour is the ring?", " blue B"  # of scene 0


@pytest.fixture(scope="module")
def asked(processor) -> BatchFeature:
    prompt = processor.apply_chat_template(to_messages([(QUESTION, None)], 1), add_generation_prompt=True)
    return processor(images=make_scene("test", 0, 0).draw(), text=prompt, return_tensors="pt")


def reply(processor, asked: BatchFeature, sequences: torch.Tensor) -> str:
    return processor.decode(sequences[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_answers(batch_size):
    content = [{"type": "image", "image": make_scene("test", 0, 0).draw()}, {"type": "text", "text": QUESTION}]
    pipe = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)
    chats = [[{"role": "user", "content": content}]] * batch_size
    replies = pipe(text=chats, max_new_tokens=8, return_full_text=False, batch_size=batch_size)
    assert [text["generated_text"] for chat in replies for text in (chat if isinstance(chat, list) else [chat])] == [
        ANSWER
    ] * batch_size


def test_an_answer_streams_in_pieces_as_it_is_made(model, processor, asked):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {"max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**asked, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == ANSWER and len([piece for piece in pieces if piece]) > 1


def test_a_stop_string_ends_the_answer(model, processor, asked):
    options = {"max_new_tokens": 8, "do_sample": False, "tokenizer": processor.tokenizer}
    assert reply(processor, asked, model.generate(**asked, **options, stop_strings=["blue"])) == " blue"


@torch.no_grad()
def test_layers_that_do_not_fit_are_offloaded_to_the_disk(model, processor, asked, tmp_path):
    auto_class = getattr(transformers, AUTO_CLASS)
    room = {"device_map": "auto", "max_memory": {"cpu": "16MB"}, "offload_folder": str(tmp_path)}
    offloaded = auto_class.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32, **room)
    devices = offloaded.hf_device_map
    assert set(devices.values()) == {"cpu", "disk"} and devices["model.side_branch"] == "cpu", devices
    assert reply(processor, asked, offloaded.generate(**asked, max_new_tokens=8, do_sample=False)) == ANSWER
    assert torch.equal(offloaded(**asked).logits, model(**asked).logits)
