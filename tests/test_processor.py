"""dpvr/pretraining/processor.py: the tokenizer, the chat template, and files for both lines of transformers."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from dpvr.pretraining.processor import save_processor
from dpvr.pretraining.rows import PretrainingRows
from minibench.data import MiniBench, make_items, to_messages
from minibench.questions import CHINESE_WORDS
from minibench.scenes import SIDE
from minibench.tasks import TASKS

IMAGE_TOKENS = 64
CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


@pytest.fixture
def processor(minibench_processor):
    return minibench_processor


# Tokenizer


def test_words_of_answers_and_other_chinese_characters_in_use_are_one_token_each(processor):
    tokenizer = processor.tokenizer
    tokens = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    parts = [token for token in tokens if len(CHINESE.findall(token)) > 1]
    assert all(any(part in word for word in CHINESE_WORDS.values()) for part in parts)
    texts = "".join(text for item in make_items("test", 100, tasks=["choice_cn"]) for text, _ in item.questions)
    characters = set(CHINESE.findall(re.sub("|".join(CHINESE_WORDS.values()), "", texts)))
    assert len(characters) > 15
    for word in characters | set(CHINESE_WORDS.values()):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_every_sentence_of_a_task_survives_the_tokenizer(processor, task):
    for item in make_items("test", 100, tasks=[task]):
        for sentence in (sentence for question in item.questions for sentence in question):
            ids = processor.tokenizer(sentence)["input_ids"]
            assert processor.tokenizer.decode(ids, skip_special_tokens=True) == sentence
            assert processor.tokenizer.unk_token_id not in ids


def test_any_text_survives_the_tokenizer(processor):
    text = "Is there a red star? 左上角是什么颜色？ ünusual \n  spaces"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(processor.tokenizer) <= 768


def test_the_tokens_of_a_prompt_begin_the_tokens_of_prompt_and_answer(processor):
    for row in PretrainingRows("train", 50, 4, caption_share=0.3):
        whole = processor.tokenizer(processor.apply_chat_template(row["messages"]))["input_ids"]
        for end in range(1, len(row["messages"]), 2):
            text = processor.apply_chat_template(row["messages"][:end], add_generation_prompt=True)
            prompt = processor.tokenizer(text)["input_ids"]
            assert whole[: len(prompt)] == prompt


def test_a_picture_becomes_one_token_per_patch(processor):
    pictures = next(row["images"] for row in MiniBench("train", 50) if len(row["images"]) == 2)
    for num in (1, 2):
        inputs = processor(text="USER: " + "<image>\n" * num, images=pictures[:num], return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == num * IMAGE_TOKENS
        assert inputs["pixel_values"].shape == (num, 3, SIDE, SIDE)


def test_three_quarters_to_four_fifths_of_a_prompts_tokens_are_the_images(processor):
    """The mean over the tasks of the mean over their prompts."""
    shares = []
    for task in TASKS:
        asked = [(item, text) for item in make_items("test", 60, tasks=[task]) for text, _ in item.questions]
        lengths, images = [], []
        for item, text in asked:
            messages = to_messages([(text, None)], len(item.scenes))
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            images.append(IMAGE_TOKENS * len(item.scenes))
            lengths.append(len(processor.tokenizer(prompt)["input_ids"]) - len(item.scenes) + images[-1])
        shares.append(np.mean(np.array(images) / np.array(lengths)))
    assert 0.75 < np.mean(shares) < 0.80


# Chat template


def test_the_template_writes_a_conversation_of_several_turns(processor):
    messages = to_messages([("Is there a red star?", "yes"), ("Where?", None)])
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nIs there a red star? ASSISTANT: yes</s>USER: Where? ASSISTANT:"


def test_the_template_takes_plain_strings_a_system_message_and_several_pictures(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": "no"},
    ]
    text = processor.apply_chat_template(messages)
    assert text == "Be brief. USER: <image>\n<image>\nSame? ASSISTANT: no</s>"


def test_the_template_refuses_an_unknown_role(processor):
    with pytest.raises(Exception, match="Unknown role 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_generation_mask_covers_the_replies_and_their_end_tokens_exactly(processor):
    tokenizer = processor.tokenizer
    row = MiniBench("train", 3, 3)[1]
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
    assert tokenizer.decode(kept) == "".join(f" {answer}</s>" for answer in answers)


# Files


def test_the_saved_processor_loads_through_the_auto_classes(processor, tmp_path):
    save_processor(processor, tmp_path)
    row = MiniBench("train", 1)[0]
    text = processor.apply_chat_template(row["messages"])
    again = AutoProcessor.from_pretrained(tmp_path)
    expected, got = (p(text=text, images=row["images"], return_tensors="pt") for p in (processor, again))
    assert torch.equal(expected["input_ids"], got["input_ids"])
    assert torch.equal(expected["pixel_values"], got["pixel_values"])
    assert again.apply_chat_template(row["messages"]) == text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<pad>" and tokenizer.image_token == "<image>"


def test_the_saved_processor_names_only_classes_that_both_transformers_lines_know(processor, tmp_path):
    save_processor(processor, tmp_path)
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*_config.json")}
    assert files["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert files["preprocessor_config.json"]["image_processor_type"] == "CLIPImageProcessor"
    assert "image_processor" not in files["processor_config.json"]
