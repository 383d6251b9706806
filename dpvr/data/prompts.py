"""What a model is given: conversations as inputs to answer, and answered ones, in batches, to measure on.

Conversation(messages, pictures) --> chat template, processor, padding on the left --> inputs      prompt_inputs
rows of images and messages      --> processor, twice --> inputs, labels at the answer's tokens    AnsweredPrompts
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from dpvr.data.conversations import Row
from dpvr.data.pictures import to_rgb
from dpvr.data.templates import check_template, reply_spans, tokenized
from dpvr.data.texts import fault_of_part, fault_of_text, special_tokens
from generation_dpvr import IGNORED_LABEL

Inputs = dict[str, torch.Tensor]  # a processor's
Batch = tuple[Inputs, torch.Tensor]  # and labels (B, T)

TEACHER = "teacher_"  # before the name of an input that a base sees in place of the model's own


class Conversation(NamedTuple):
    """Messages as a chat template takes them, and their pictures in order."""

    messages: list[dict[str, Any]]
    pictures: Sequence[Image.Image] = ()


def prompt_inputs(
    processor: ProcessorMixin, conversations: Sequence[Conversation], room: int | None = None
) -> BatchFeature:
    """The inputs of a batch of conversations, each of which waits for its answer.

    Args:
        room: how many positions the model has.

    Raises:
        ValueError: if there is no chat template, a text holds a special token or is far too long, a part is neither
            text nor picture, or a picture is beyond the limits.
    """
    check_template(processor)
    special = special_tokens(processor)
    for conversation in conversations:
        _check(conversation, special, room)
    prompts = processor.apply_chat_template([c.messages for c in conversations], add_generation_prompt=True)
    pictures = [[to_rgb(picture) for picture in conversation.pictures] for conversation in conversations]
    return tokenized(processor, prompts, pictures if any(pictures) else None, padding=True, padding_side="left")


def _check(conversation: Conversation, special: list[str], room: int | None) -> None:
    for message in conversation.messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            fault = fault_of_part(part)
            if fault is None and part["type"] == "text":
                fault = fault_of_text(part["text"], special, room)
            if fault is not None:
                raise ValueError(f"A message cannot be asked: {fault}. Take it out; pictures come by themselves.")


class AnsweredPrompts:
    """The first question of each row with its answer, of at most `most` rows with a picture after `skip` of them.

    Each time it is iterated, the rows are encoded anew.

    Attributes:
        without_picture: how many rows were passed over in the latest iteration.
    """

    def __init__(self, processor: ProcessorMixin, rows: Iterable[Row], most: int, skip: int = 0) -> None:
        self.processor, self.rows, self.most, self.skip = processor, rows, most, skip
        self.without_picture = 0

    def __iter__(self) -> Iterator[Batch]:
        taken = self.without_picture = 0
        for row in self.rows:
            if taken == self.skip + self.most:
                return
            if (found := answered_prompt(self.processor, row)) is None:
                self.without_picture += 1
            else:
                taken += 1
                if taken > self.skip:
                    yield found


def answered_prompt(processor: ProcessorMixin, row: Row) -> Batch | None:
    """The inputs of a row's first question with its answer, and its labels (1, T); None without pictures.

    Raises:
        ValueError: if the chat template writes a prompt anew once it is answered.
    """
    end = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    marks = sum(part["type"] == "image" for message in row["messages"][:end] for part in message["content"])
    if marks == 0:
        return None
    pictures = [to_rgb(picture) for picture in row["images"][:marks]]
    whole, [(start, _)] = reply_spans(processor, row["messages"][: end + 1])
    inputs, prompt = (tokenized(processor, [text], pictures) for text in (whole, whole[:start]))
    length = prompt["input_ids"].shape[1]
    if not torch.equal(inputs["input_ids"][:, :length], prompt["input_ids"]):
        raise ValueError(
            f"The prompt {whole[:start]!r} has other tokens once it is answered, so the answer's tokens cannot be "
            "told from the prompt's: use a chat template that ends a prompt where a token ends, such as dpvr-mini's."
        )
    labels = inputs["input_ids"].clone()
    labels[:, :length] = IGNORED_LABEL
    return dict(inputs), labels


def in_batches(prompts: Iterable[Batch], size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
    """Batches of `size` single prompts, padded on the right and moved to a device."""
    held: list[Batch] = []
    for prompt in prompts:
        held.append(prompt)
        if len(held) == size:
            yield _joined(held, device)
            held = []
    if held:
        yield _joined(held, device)


def _joined(prompts: list[Batch], device: str | torch.device) -> Batch:
    """One batch; what has an entry per token, per picture or per tile is filled up with zeros, as processors do.

    Any id will do for padding: it is masked out.
    """
    inputs = {name: _stacked([inputs[name] for inputs, _ in prompts]).to(device) for name in prompts[0][0]}
    labels = [labels[0] for _, labels in prompts]
    return inputs, pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL).to(device)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors one after the other, those that are smaller in another dimension filled up with zeros at its end."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *shape)
    for tensor, place in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        place[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
    return whole


def split_teacher(inputs: Inputs) -> tuple[Inputs, Inputs | None]:
    """The inputs of a model without labels, and those of its base where they differ.

    Raises:
        ValueError: if the two have other tokens.
    """
    own = {name: value for name, value in inputs.items() if not name.startswith(TEACHER) and name != "labels"}
    others = {name.removeprefix(TEACHER): value for name, value in inputs.items() if name.startswith(TEACHER)}
    if not others:
        return own, None
    if "input_ids" in others and not torch.equal(others["input_ids"], own["input_ids"]):
        raise ValueError(
            f"With the teacher's pictures a batch has the tokens {tuple(others['input_ids'].shape)}, and with the "
            f"model's own {tuple(own['input_ids'].shape)} or others: give pairs of pictures of the same size."
        )
    return own, {**own, **others}
