"""Rows to batches: the tokens that a model is asked with, and labels on replies alone.

    rows --ReplyCollator--> input_ids, attention_mask, pixel_values; labels at replies and their end tokens
                            teacher_<name>: the same with the row's teacher_images, which the base is shown
         --WithoutImageLabels--> no image token is a label      --AlwaysAPicture--> (sharded) always with a picture

TRL's own collator needs {% generation %} marks in the template and tokenizes it as it stands; this one takes any
template, and `dpvr.data.templates.tokenized` as everything else that asks.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from transformers import ProcessorMixin

from dpvr.data.conversations import TEACHER_IMAGES, Row
from dpvr.data.pictures import to_rgb
from dpvr.data.prompts import TEACHER
from dpvr.data.templates import Messages, reply_spans, tokenized
from dpvr.models import plan_of
from generation_dpvr import IGNORED_LABEL
from images_dpvr import mark_ids

Collate = Callable[[list[Row]], dict[str, torch.Tensor]]


class ReplyCollator:
    """Makes batches, padded on the right and cut after `max_length` tokens.

    Args:
        replies_only: loss on the replies and their end tokens; False: on every token.
        for_teacher: whether to make the inputs of the teacher too, for rows that have its pictures.
    """

    def __init__(
        self, processor: ProcessorMixin, max_length: int | None, replies_only: bool, *, for_teacher: bool = False
    ) -> None:
        self.processor, self.max_length, self.replies_only = processor, max_length, replies_only
        self.for_teacher = for_teacher

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = self._of(rows, "images")
        if not self.for_teacher or TEACHER_IMAGES not in rows[0]:
            return batch
        shown = self._of(rows, TEACHER_IMAGES)
        return batch | {TEACHER + name: value for name, value in shown.items() if name != "labels"}

    def _of(self, rows: list[Row], column: str) -> dict[str, torch.Tensor]:
        pictures = [[to_rgb(picture) for picture in row[column]] for row in rows]
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
                labels[row, ~self._in_replies(text, replies, offsets[row], pictures[row])] = IGNORED_LABEL
        if self.max_length is not None:
            self._refuse_to_cut_images(ids)
        cut = slice(None, self.max_length)
        of_tokens = {name: inputs[name][:, cut] for name in ("input_ids", "attention_mask")}
        return {**dict(inputs), **of_tokens, "labels": labels[:, cut]}

    def _in_replies(
        self, text: str, replies: list[tuple[int, int]], offsets: torch.Tensor, pictures: Sequence[Image.Image]
    ) -> torch.Tensor:
        """bool (T,): the tokens of the replies. Offsets count characters of a text whose image marks are expanded."""
        start, end = offsets[:, 0], offsets[:, 1]
        found = torch.zeros(len(offsets), dtype=torch.bool)
        for first, stop in replies:
            longer = self._expansion(text, first, int(end.max()), pictures)
            first, stop = first + longer, stop + longer
            if ((start < first) & (end > first)).any():
                raise ValueError(
                    f"In {text[: first - longer]!r} the reply begins inside a token, so a model would be trained on "
                    "another prompt than it is asked: use a chat template that ends a prompt where a token ends."
                )
            found |= (start >= first) & (end <= stop) & (start < end)
        return found

    def _expansion(self, text: str, place: int, length: int, pictures: Sequence[Image.Image]) -> int:
        """By how many characters the image marks before a place in a text grow, in one of `length` when expanded."""
        mark = self.processor.image_token
        before = text.count(mark, 0, place)
        if before == text.count(mark):
            return length - len(text)
        if before == 0:
            return 0
        options = {"return_offsets_mapping": True}
        inputs = tokenized(self.processor, [text[:place]], list(pictures[:before]), **options)
        return int(inputs["offset_mapping"].max()) - place

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
        self.collate, self.images, self.routed = collate, mark_ids(model.config), not plan_of(model).is_vanilla

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        ignored = torch.isin(batch["input_ids"], torch.tensor(self.images))
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
