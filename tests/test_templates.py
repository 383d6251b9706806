"""templates.py and collators.py: what is trained on is what is asked, for any chat template and begin token."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from dpvr.data.prompts import Conversation, prompt_inputs
from dpvr.data.templates import CHAT_TEMPLATE, ends_replies, with_ended_replies
from dpvr.pretraining.processor import save_processor
from dpvr.training.collators import ReplyCollator
from processors_dpvr import load_processor

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICTURE = Image.new("RGB", (96, 96), "red")


def with_template(template: str) -> Callable[[LlavaProcessor], None]:
    def change(processor: LlavaProcessor) -> None:
        processor.chat_template = template

    return change


def without_begin_token_added(processor: LlavaProcessor) -> None:
    """The tokenizer knows the token and does not add it."""
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(json.dumps(state))


def without_begin_token(processor: LlavaProcessor) -> None:
    without_begin_token_added(processor)
    processor.tokenizer.bos_token = None


VARIANTS = {
    "dpvr-mini's": lambda processor: None,
    "ChatML": with_template(CHATML),
    "begin token in the template": with_template("{{- bos_token -}}" + CHAT_TEMPLATE),
    "begin token not added": without_begin_token_added,
    "no begin token": without_begin_token,
}


@pytest.fixture
def processor(minibench_processor, tmp_path) -> LlavaProcessor:
    save_processor(copy.deepcopy(minibench_processor), tmp_path)
    return load_processor(str(tmp_path))


def talk(*texts: str, pictures: int = 1) -> list[dict]:
    """Questions and answers in turn; the pictures stand before the first question."""
    messages = []
    for number, text in enumerate(texts):
        marks = [{"type": "image"}] * (pictures if number == 0 else 0)
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": [*marks, {"type": "text", "text": text}]})
    return messages


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_row_begins_with_the_very_tokens_that_each_of_its_questions_is_asked_with(processor, variant, pictures):
    VARIANTS[variant](processor)
    processor = with_ended_replies(processor)
    messages = talk("what is it?", "red star", "sure?", "yes", pictures=pictures)
    row = {"messages": messages, "images": [PICTURE] * pictures}
    batch = ReplyCollator(processor, None, replies_only=True)([row])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    end, num_labels = processor.tokenizer.eos_token_id, 0
    for turn, reply in ((1, "red star"), (3, "yes")):
        asked = prompt_inputs(processor, [Conversation(messages[:turn], [PICTURE] * pictures)])["input_ids"][0]
        assert torch.equal(ids[: len(asked)], asked)
        rest = ids[len(asked) :].tolist()
        answer = rest[: rest.index(end) + 1]
        assert processor.tokenizer.decode(answer[:-1]).strip() == reply
        assert labels[len(asked) : len(asked) + len(answer)].tolist() == answer
        num_labels += len(answer)
    assert int((labels != -100).sum()) == num_labels
    begin = processor.tokenizer.bos_token_id
    assert begin is None or (ids == begin).sum() == (variant != "begin token not added")


def test_a_template_without_an_end_token_is_replaced_by_one_of_its_form_or_refused(processor, capsys):
    own = processor.chat_template
    assert ends_replies(processor) and with_ended_replies(processor).chat_template == own
    processor.chat_template = CHAT_TEMPLATE.replace("'</s>'", "''")
    assert with_ended_replies(processor).chat_template == CHAT_TEMPLATE and "is used" in capsys.readouterr().out
    processor.chat_template = CHATML.replace("</s>", "<|im_end|>")
    with pytest.raises(ValueError, match="does not end a reply with the end token '</s>'.*im_start.*template whose"):
        with_ended_replies(processor)
    assert "im_start" in processor.chat_template


def test_a_template_that_changes_a_prompt_once_it_is_answered_is_refused(processor):
    processor.chat_template = CHAT_TEMPLATE + "{{- messages | length -}}"
    with pytest.raises(ValueError, match="differently once it is answered"):
        ReplyCollator(processor, None, replies_only=True)([{"messages": talk("a", "b"), "images": [PICTURE]}])


def test_a_cut_through_an_image_is_refused_and_one_behind_the_reply_changes_nothing_before_it(processor):
    row = {"messages": talk("what is it?", "red", "and?", "star"), "images": [PICTURE]}
    whole = ReplyCollator(processor, None, replies_only=True)([row])
    cut = ReplyCollator(processor, 80, replies_only=True)([row])
    assert all(torch.equal(cut[name], whole[name][:, :80]) for name in ("input_ids", "attention_mask", "labels"))
    with pytest.raises(ValueError, match="--max_length 20 cuts through the image .* end at token 6"):
        ReplyCollator(processor, 20, replies_only=True)([row])


def test_with_the_loss_on_every_token_padding_alone_has_none(processor):
    rows = [{"messages": talk(text, "red"), "images": [PICTURE]} for text in ("a", "what is it then?")]
    batch = ReplyCollator(processor, None, replies_only=False)(rows)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
