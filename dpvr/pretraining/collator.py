"""Rows of MiniBench as training batches: LLaVA's inputs, and labels at the tokens that carry loss.

    <s> USER: <image> ... Is there a red star? ASSISTANT: yes </s> USER: ...
                                                          ^^^^^^^^               labels; IGNORED_LABEL everywhere else

Of an auxiliary task's reply only the words in its `loss_mask` carry loss, and the end token.

Axes: B batch, T tokens.
"""

import torch
from transformers import LlavaProcessor

from generation_dpvr import IGNORED_LABEL
from minibench.data import Row

# Rows are padded to multiples of LENGTH_STEP, so that compiled layers meet few lengths, and cut at MAX_LENGTH: a
# quarter of the rows lose their last turns, the batches a fifth of their padding.
LENGTH_STEP = 136
MAX_LENGTH = 2 * LENGTH_STEP


class RowCollator:
    """Turns rows of MiniBench into LLaVA's inputs with labels, padded and cut on the right.

    Args:
        processor: the model's.
        max_length: of the batch, in tokens; what exceeds it is cut off.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int = MAX_LENGTH) -> None:
        self.processor = processor
        self.max_length = max_length
        tokenizer = processor.tokenizer
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode(" ASSISTANT:", add_special_tokens=False)
        self.eos = tokenizer.eos_token_id

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        texts = self.processor.apply_chat_template([row["messages"] for row in rows])
        images = [picture for row in rows for picture in row["images"]] or None
        padding = {"padding": True, "padding_side": "right", "pad_to_multiple_of": LENGTH_STEP}
        batch = self.processor(text=texts, images=images, return_tensors="pt", **padding)
        ids = batch["input_ids"][:, : self.max_length]  # a row begins with its pictures, so none is cut
        labels = ids.masked_fill(~self.replies(ids), IGNORED_LABEL)
        for row, row_labels in zip(rows, labels, strict=True):
            if "loss_mask" in row:
                in_loss = torch.tensor(self.loss_flags(row), dtype=torch.bool)
                (replies,) = (row_labels != IGNORED_LABEL).nonzero(as_tuple=True)
                row_labels[replies[~in_loss[: len(replies)]]] = IGNORED_LABEL
        # Under a causal mask no token attends to padding on its right; without a mask attention keeps its fast kernel.
        return {"input_ids": ids, "labels": labels, **({"pixel_values": batch["pixel_values"]} if images else {})}

    def loss_flags(self, row: Row) -> list[bool]:
        """Return for every token of an auxiliary task's replies, end tokens included, whether it carries loss."""
        replies = [message["content"][0]["text"] for message in row["messages"] if message["role"] == "assistant"]
        flags: list[bool] = []
        for reply, mask in zip(replies, row["loss_mask"], strict=True):
            for word, carries_loss in zip(reply.split(), mask, strict=True):
                flags += [carries_loss] * len(self.tokenizer.encode(f" {word}", add_special_tokens=False))
            flags.append(True)  # the end token
        return flags

    def replies(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `bool[B, T]`, true from after "ASSISTANT:" to the end token: the template's generation blocks."""
        first, second = self.opening
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 2:] = (ids[:, :-2] == first) & (ids[:, 1:-1] == second)
        ends = torch.zeros_like(starts)
        ends[:, 1:] = ids[:, :-1] == self.eos
        return starts.cumsum(1) > ends.cumsum(1)
