"""train_sft.py on rows of one's own: their labels, bad rows, streams, templates, and batches without pictures."""

import json
from pathlib import Path

import pytest
import torch
from lines import NEEDS_TRAINING
from PIL import Image
from safetensors.torch import load_file
from test_loading import SIDE_BRANCH_KEYS
from test_train_sft import losses, make_trainer, run
from transformers import LlavaProcessor

import adapter_dpvr  # noqa: F401  makes the method known to PEFT
from dpvr.data.templates import ends_replies, with_ended_replies
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor


@pytest.fixture
def llava_json(tmp_path) -> list[str]:
    """Arguments for LLaVA's JSON of four rows: one picture, two, none, and one row whose picture is missing."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (96, 96), colour).save(tmp_path / "images" / name)
    rows = [
        {"image": "a.png", "conversations": talk("<image>\nWhat colour is the star?", "red", "Sure?", "yes")},
        {"image": ["a.png", "b.png"], "conversations": talk("Same or different: the colour?<image><image>", "no")},
        {"conversations": talk("How many are there?", "2")},
        {"image": "missing.png", "conversations": talk("<image>\nWhere is it?", "left")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return ["--data", str(tmp_path / "rows.json"), "--image_folder", str(tmp_path / "images")]


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


@NEEDS_TRAINING
def test_labels_of_llavas_json_are_as_written_by_hand_token_by_token(random_mini, tmp_path, llava_json):
    paths = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path / "out"), *llava_json]
    with pytest.warns(UserWarning, match="row 3"):
        trainer = make_trainer(*paths, "--skip_bad_rows", "--per_device_train_batch_size", "3")
    (batch,) = trainer.get_train_dataloader()
    image, encode = [trainer.processing_class.image_token_id] * 64, trainer.processing_class.tokenizer.encode
    by_hand = [
        [("<s>USER: ", 0), (image, 0), ("\nWhat colour is the star? ASSISTANT:", 0), (" red</s>", 1),
         ("USER: Sure? ASSISTANT:", 0), (" yes</s>", 1)],
        [("<s>USER: ", 0), (image, 0), ("\n", 0), (image, 0),
         ("\nSame or different: the colour? ASSISTANT:", 0), (" no</s>", 1)],
        [("<s>USER: How many are there? ASSISTANT:", 0), (" 2</s>", 1)],
    ]  # fmt: skip
    expected = set()
    for row in by_hand:
        pieces = [
            (encode(part, add_special_tokens=False) if isinstance(part, str) else part, kept) for part, kept in row
        ]
        expected.add(tuple(token if kept else -100 for tokens, kept in pieces for token in tokens))
    lengths = batch["attention_mask"].sum(1)
    got = {
        tuple(row[mask.bool()].tolist()) for row, mask in zip(batch["labels"], batch["attention_mask"], strict=True)
    }
    assert got == expected and len(set(lengths.tolist())) == 3
    assert len(batch["pixel_values"]) == 3


@NEEDS_TRAINING
def test_bad_rows_stop_a_run_before_training_or_are_counted_in_its_record(random_mini, tmp_path, llava_json):
    with pytest.raises(ValueError, match="row 3.*missing.png"):
        run(random_mini, tmp_path / "out", *llava_json)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="row 3"):
        record = run(random_mini, tmp_path / "out", *llava_json, "--skip_bad_rows")
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert list(written["data"]["bad_rows"]) == ["3"] and len(written["data"]["fingerprint"]) == 16
    assert record["accuracy"] == [] and record["samples_per_second"] > 0
    assert written["recipe"]["learning_rate"] == 1e-3 and written["recipe"]["processes"] == 1
    assert written["method"] == "dpvr" and written["versions"]["peft"]
    assert written["base"]["name"] == f".../{Path(random_mini).name}"


@NEEDS_TRAINING
def test_a_stream_trains_without_being_read_whole(random_mini, tmp_path, llava_json):
    rows = json.loads(Path(llava_json[1]).read_text())[:3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    data = ["--data", str(tmp_path / "rows.jsonl"), *llava_json[2:], "--streaming", "--max_steps", "2"]
    assert len(losses(run(random_mini, tmp_path / "out", *data))) == 2


# LLaVA-1.5's as published, in essence: the replies are marked, their end is not
WITHOUT_END = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}\
{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


@NEEDS_TRAINING
@pytest.mark.parametrize(
    "template",
    [WITHOUT_END, WITHOUT_END.replace("{% generation %}", "").replace("{% endgeneration %}", "")],
    ids=["without end", "without marks"],
)
def test_llavas_own_template_is_replaced_by_one_of_the_same_form_with_the_end_token(
    random_mini, tmp_path, capsys, template
):
    processor = LlavaProcessor.from_pretrained(random_mini)
    whole = processor.chat_template
    assert ends_replies(processor)
    processor.chat_template = template
    processor.save_pretrained(tmp_path)
    loaded = with_ended_replies(load_processor(str(tmp_path)))
    assert loaded.chat_template == whole and "does not end replies" in capsys.readouterr().out


@NEEDS_TRAINING
def test_batches_without_any_picture_are_trained_past(random_mini, tmp_path):
    rows = [{"conversations": talk("How many are there?", str(number))} for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = ["--data", str(tmp_path / "rows.json"), "--per_device_train_batch_size", "2"]
    record = run(random_mini, tmp_path / "out", *data)
    assert len(losses(record)) == 4
    fresh = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    fresh.reset_side_branch()
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(trained[name], fresh.state_dict()[name]) for name in SIDE_BRANCH_KEYS)
