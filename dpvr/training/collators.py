"""Rows to batches: the tokens that a model is asked with, and labels on replies alone.

    rows --ReplyCollator--> input_ids, attention_mask, pixel_values; labels at replies and their end tokens
         --WithoutImageLabels--> no image token is a label      --AlwaysAPicture--> (sharded) always with a picture

TRL's own collator needs {% generation %} marks in the template and tokenizes it as it stands; this one takes any
template, and `dpvr.data.templates.tokenized` as everything else that asks.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import LlavaProcessor

from dpvr.data.conversations import Row
from dpvr.data.pictures import to_rgb
from dpvr.data.templates import Messages, reply_spans, tokenized
from generation_dpvr import IGNORED_LABEL

Collate = Callable[[list[Row]], dict[str, torch.Tensor]]


class ReplyCollator:
    """Makes batches, padded on the right and cut after `max_length` tokens.

    Args:
        replies_only: loss on the replies and their end tokens; False: on every token.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None, replies_only: bool) -> None:
        self.processor, self.max_length, self.replies_only = processor, max_length, replies_only

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        pictures = [[to_rgb(picture) for picture in row["images"]] for row in rows]
        return self.batch([row["messages"] for row in rows], pictures)

    def batch(
        self, conversations: Sequence[Messages], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, torch.Tensor]:
        """The batch of these conversations, int64 (B, T), with their pictures.

        Raises:
            ValueError: if `max_length` cuts through an image, or a reply begins inside a token.
        """
        texts, spans = zip(*(reply_spans(self.processor, messages) for messages in conversations), strict=True)
        images = [list(each) for each in pictures] if any(pictures) else None
        padding = {"padding": True, "padding_side": "right", "return_offsets_mapping": True}
        inputs = tokenized(self.processor, texts, images, **padding)
        offsets, ids = inputs.pop("offset_mapping"), inputs["input_ids"]
        labels = ids.masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
        if self.replies_only:
            for row, (text, replies) in enumerate(zip(texts, spans, strict=True)):
                labels[row, ~self._in_replies(text, replies, ids[row], offsets[row])] = IGNORED_LABEL
        if self.max_length is not None:
            self._refuse_to_cut_images(ids)
        cut = slice(None, self.max_length)
        of_tokens = {name: inputs[name][:, cut] for name in ("input_ids", "attention_mask")}
        return {**dict(inputs), **of_tokens, "labels": labels[:, cut]}

    def _in_replies(
        self, text: str, replies: list[tuple[int, int]], ids: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """bool (T,): the tokens of the replies, whose places in `text` lie behind its image marks."""
        mark, start, end = self.processor.image_token, offsets[:, 0], offsets[:, 1]
        longer = (int((ids == self.processor.image_token_id).sum()) - text.count(mark)) * len(mark)
        found = torch.zeros(len(ids), dtype=torch.bool)
        for first, stop in replies:
            first, stop = first + longer, stop + longer
            if ((start < first) & (end > first)).any():
                raise ValueError(
                    f"In {text[: first - longer]!r} the reply begins inside a token, so a model would be trained on "
                    "another prompt than it is asked: use a chat template that ends a prompt where a token ends."
                )
            found |= (start >= first) & (end <= stop) & (start < end)
        return found

    def _refuse_to_cut_images(self, ids: torch.Tensor) -> None:
        marks = ids == self.processor.image_token_id
        if marks[:, self.max_length :].any():
            raise ValueError(
                f"--max_length {self.max_length} cuts through the image of a row, whose image tokens end at token "
                f"{int(marks.any(0).nonzero().max()) + 1}: use a larger --max_length."
            )


class WithoutImageLabels:
    """A collator that leaves image tokens out of the labels, and under a layer plan the tokens right after them.

    A model is never to produce an image token, and past the split images predict nothing. The models' own losses
    leave them out as well; here they are left out of the count that the loss is divided by.
    """

    def __init__(self, collate: Collate, model: torch.nn.Module) -> None:
        self.collate, self.image, self.routed = collate, model.config.image_token_id, not model.model.plan.is_vanilla

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        ignored = batch["input_ids"] == self.image
        if self.routed:
            ignored = ignored | torch.nn.functional.pad(ignored[:, :-1], (1, 0))
        return batch | {"labels": batch["labels"].masked_fill(ignored, IGNORED_LABEL)}


class AlwaysAPicture:
    """A collator that adds to rows of text alone one with a picture and without labels: neither loss nor gradient.

    Processes that share a model's shards must all run the same layers, tower and side branch included, or they wait
    for each other's shards for ever, or take one layer's for another's.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        if any(row["images"] for row in rows):
            return self.collate(rows)
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        batch = self.collate([*rows, {"images": [Image.new("RGB", (32, 32))], "messages": [question]}])
        batch["labels"][-1] = IGNORED_LABEL
        return batch
