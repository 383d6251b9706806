"""replies.py: a batch's replies are those of its conversations one by one, and nothing is made up."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.inference import batches as replies
from dpvr.inference.batches import Conversation, Request, reply, reply_to_all, to_settings
from dpvr.inference.loading import load
from minibench.data import to_messages
from minibench.scenes import make_scene

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, ProcessorMixin]:
    """dpvr-mini: trained weights say something else to every question."""
    return load(ROOT, dtype="float64", device="cpu")


def talk(text: str, num_pictures: int) -> Conversation:
    pictures: list[Image.Image] = [make_scene("test", 0, index).draw() for index in range(num_pictures)]
    return Conversation(to_messages([(text, None)], num_pictures), pictures)


TALKS = [
    talk("Describe the picture.", 1),
    talk("There are 3 red stars and a blue ring. How many red stars are there? " * 2, 0),
    talk("Options: the first A the second B\nWhich picture has a digit?", 2),
    talk("图里有几个图形？", 1),
]


def naively(model: PreTrainedModel, processor: ProcessorMixin, asked: Conversation, steps: int) -> str:
    """The likeliest tokens of one conversation, each from the whole text so far: no batch, padding or cache."""
    prompt = processor.apply_chat_template(asked.messages, add_generation_prompt=True)
    inputs = processor(images=asked.pictures or None, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    start = inputs["input_ids"].shape[1]
    for _ in range(steps):
        with torch.no_grad():
            token = model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if token.item() == processor.tokenizer.eos_token_id:
            break
    return processor.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("routing", ["none", "late_fusion"])
def test_replies_come_in_the_asked_order_and_equal_naive_ones_one_by_one(loaded, routing):
    model, processor = loaded
    model.set_routing(routing)
    steps = [5, 3, 5, 5]  # the second is a batch of its own
    asked = [
        Request(partial(tuple.__new__, Conversation, talk), to_settings({"max_new_tokens": count}, 99), length)
        for talk, count, length in zip(TALKS, steps, (1, 9, 3, 4), strict=True)
    ]
    found = reply_to_all(model, processor, asked, batch_size=2, show_progress=False)
    expected = [naively(model, processor, talk, count) for talk, count in zip(TALKS, steps, strict=True)]
    assert [each.text for each in found] == expected and len(set(expected)) == 4
    assert all(0 < each.tokens <= count for each, count in zip(found, steps, strict=True))


def test_batches_hold_equal_settings_only_and_long_ones_come_first(monkeypatch):
    seen = []

    def look(model, processor, conversations, **settings):
        seen.append((conversations, settings["max_new_tokens"]))
        return [replies.Reply(name, 1, True) for name in conversations]

    monkeypatch.setattr(replies, "reply", look)
    short, long = to_settings({}, 5), to_settings({}, 6)
    asked = [
        Request(partial(str, name), settings, length)
        for name, settings, length in (("a", long, 1), ("b", short, 2), ("c", long, 3), ("d", long, 9))
    ]
    found = reply_to_all(None, None, asked, batch_size=2, show_progress=False)
    assert sorted(seen, key=str) == [(["a"], 6), (["b"], 5), (["d", "c"], 6)]
    assert [each.text for each in found] == ["a", "b", "c", "d"]


def test_an_error_in_a_later_batch_ends_the_run(loaded, monkeypatch):
    model, processor = loaded
    calls, whole = [], model.generate

    def fail(**given):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return whole(**given)

    monkeypatch.setattr(model, "generate", fail)
    asked = [Request(lambda: TALKS[0], to_settings({}, 1), 1)] * 3
    with pytest.raises(RuntimeError, match="out of memory"):
        reply_to_all(model, processor, asked, batch_size=1, show_progress=False)
    assert len(calls) == 2


def test_a_mark_in_a_text_is_refused_and_a_long_prompt_is_told(loaded, monkeypatch):
    model, processor = loaded
    with pytest.raises(ValueError, match="the text 'In <image> 1.* holds '<image>'"):
        reply(model, processor, [TALKS[0], talk("In <image> 1, what is it?", 1)], max_new_tokens=1)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 20)
    with pytest.raises(ValueError, match="tokens, and the model has 20 positions: shorten it"):
        reply(model, processor, [TALKS[0]], max_new_tokens=1)


GREEDY = {"max_new_tokens": 16, "do_sample": False, "until": ()}


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ({}, {**GREEDY, "max_new_tokens": 128}),
        # as in lmms-eval's files for POPE, SEED-Bench, ScienceQA
        (
            {
                "max_new_tokens": 16,
                "temperature": 0.0,
                "top_p": 1.0,
                "num_beams": 1,
                "do_sample": False,
                "until": "\n",
            },
            {**GREEDY, "num_beams": 1, "until": ("\n",)},
        ),
        ({"until": ["ASSISTANT:"], "image_aspect_ratio": "original"}, {**GREEDY, "max_new_tokens": 128}),
        ({"max_new_tokens": 16, "temperature": None, "top_p": 0.9, "until": None}, GREEDY),
        ({"max_new_tokens": 16, "temperature": 0.5, "do_sample": False}, GREEDY),
        (
            {"max_new_tokens": 16, "temperature": 0.5, "top_p": 0.9, "top_k": None},
            {**GREEDY, "do_sample": True, "temperature": 0.5, "top_p": 0.9},
        ),
    ],
)
def test_a_benchmarks_wishes_become_settings(wanted, settings):
    until = {"until": ("ASSISTANT:",)} if wanted.get("until") == ["ASSISTANT:"] else {}
    assert to_settings(wanted, 128) == {**settings, **until}


def test_an_unknown_wish_is_refused():
    with pytest.raises(ValueError, match="setting 'max_newtokens' is not known here: take it out"):
        to_settings({"max_newtokens": 3}, 128)


@pytest.mark.parametrize(
    ("text", "until", "cut"),
    [
        ("yes\n\nUSER", ("\n\n",), "yes"),
        ("\n\n yes", ("\n\n",), "yes"),
        ("a. b c", (" ", "."), "a"),
        ("a", ("",), "a"),
    ],
)
def test_a_reply_ends_before_the_first_stop_string(text, until, cut):
    assert replies._cut(text, until).strip() == cut
