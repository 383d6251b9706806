"""Prompts that have been answered, in batches for a measurement: the first question of each row, and its answer.

rows of images and messages (conversations.py)  -->  processor, twice  -->  inputs, labels at the answer's tokens
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor

from dpvr.data.conversations import Row

IGNORED_LABEL = -100
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # a processor's inputs, and labels (B, T)


class AnsweredPrompts:
    """At most `most` rows with a picture, behind the first `skip` of them, one by one.

    Each time it is iterated, the rows are encoded anew.

    Attributes:
        without_picture: how many rows were passed over in the latest iteration.
    """

    def __init__(self, processor: LlavaProcessor, rows: Iterable[Row], most: int, skip: int = 0) -> None:
        self.processor, self.rows, self.most, self.skip = processor, rows, most, skip
        self.without_picture = 0

    def __iter__(self) -> Iterator[Batch]:
        taken = self.without_picture = 0
        for row in self.rows:
            if taken == self.skip + self.most:
                return
            if (found := encode(self.processor, row)) is None:
                self.without_picture += 1
            else:
                taken += 1
                if taken > self.skip:
                    yield found


def encode(processor: LlavaProcessor, row: dict[str, Any]) -> Batch | None:
    """The processor's inputs of a row's first question with its answer, and its labels (1, T); None without pictures.

    Raises:
        ValueError: if the chat template writes a prompt anew once it is answered.
    """
    end = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    marks = sum(part["type"] == "image" for message in row["messages"][:end] for part in message["content"])
    if marks == 0:
        return None
    pictures = [picture.convert("RGB") for picture in row["images"][:marks]]
    texts = [
        processor.apply_chat_template(row["messages"][:end], add_generation_prompt=True),
        processor.apply_chat_template(row["messages"][: end + 1]),
    ]
    prompt, whole = (processor(images=pictures, text=text, return_tensors="pt") for text in texts)
    length = prompt["input_ids"].shape[1]
    if not torch.equal(whole["input_ids"][:, :length], prompt["input_ids"]):
        raise ValueError(
            f"Expected a chat template that leaves an answered prompt as it was; got {texts[1]!r} after {texts[0]!r}. "
            "Remedy: another processor, such as dpvr-mini's template."
        )
    labels = whole["input_ids"].clone()
    labels[:, :length] = IGNORED_LABEL
    return dict(whole), labels


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
    def stack(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence([tensor[0] for tensor in tensors], batch_first=True, padding_value=value).to(device)

    inputs = {
        "input_ids": stack([inputs["input_ids"] for inputs, _ in prompts], 0),  # masked out, whatever it stands for
        "attention_mask": stack([inputs["attention_mask"] for inputs, _ in prompts], 0),
        "pixel_values": torch.cat([inputs["pixel_values"] for inputs, _ in prompts]).to(device),
    }
    return inputs, stack([labels for _, labels in prompts], IGNORED_LABEL)
