"""Whether a checked row can be trained on, seen as training sees it: rendered, in tokens, cut at --max_length.

    rows, bad_rows --chat template, tokenizer--> special tokens in texts, length, what is left to learn --> fewer rows

A special token in a text, such as "</s>", would become the token itself and end the turn.
"""

import warnings
from collections.abc import Callable

from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm import tqdm
from transformers import LlavaProcessor

from dpvr.data.conversations import Conversations, Row, report_bad_rows
from dpvr.data.templates import Messages, reply_spans
from dpvr.data.texts import fault_of_text, special_tokens


class RowCheck:
    """Says why a conversation cannot be trained on, or None.

    Args:
        room: how many positions the model has.
        max_length: tokens at which a row is cut; None: never.
    """

    def __init__(self, processor: LlavaProcessor, room: int, max_length: int | None = None) -> None:
        self.processor, self.room, self.max_length = processor, room, max_length
        self.special = special_tokens(processor)
        one = processor(images=Image.new("RGB", (32, 32)), text=processor.image_token)
        self.tokens_per_image = one["input_ids"][0].count(processor.image_token_id)

    def __call__(self, messages: Messages) -> str | None:
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        for text in texts:
            if (fault := fault_of_text(text, self.special, self.room)) is not None:
                return fault
        whole, spans = reply_spans(self.processor, messages)
        first, length = (self._length(text) for text in (whole[: spans[0][0]], whole))
        if length > self.room:
            return f"it has {length} tokens, and the model has {self.room} positions"
        if self.max_length is not None and first >= self.max_length:
            return f"its first reply begins after {first} tokens, which --max_length {self.max_length} cuts off"
        return None

    def _length(self, text: str) -> int:
        begins = bool(bos := self.processor.tokenizer.bos_token) and text.startswith(bos)
        tokens = len(self.processor.tokenizer(text, add_special_tokens=not begins)["input_ids"])
        return tokens + text.count(self.processor.image_token) * (self.tokens_per_image - 1)


def readable(
    found: Conversations, check: Callable[[Messages], str | None], name: str, skip_bad_rows: bool
) -> Conversations:
    """The rows that pass a check; those of a stream when they are read.

    Raises:
        ValueError: if there are others, unless they are skipped, or if none is left.
    """
    if isinstance(found.rows, IterableDataset):
        return Conversations(_stream(found.rows, check, name, skip_bad_rows), found.bad_rows)
    total = len(found.rows) + len(found.bad_rows)
    indices = [index for index in range(total) if index not in found.bad_rows]
    messages = tqdm(found.rows.select_columns("messages"), desc="Checking tokens", unit="row")
    reasons = {index: why for index, row in zip(indices, messages, strict=True) if (why := check(row["messages"]))}
    if not reasons:
        return found
    report_bad_rows(name, reasons, len(indices), skip_bad_rows)
    kept = [place for place, index in enumerate(indices) if index not in reasons]
    bad_rows = dict(sorted((found.bad_rows | reasons).items()))
    rows: Dataset = found.rows.select(kept)
    return Conversations(rows, bad_rows)


def _stream(
    rows: IterableDataset, check: Callable[[Messages], str | None], name: str, skip_bad_rows: bool
) -> IterableDataset:
    def passes(row: Row, place: int) -> bool:
        if (why := check(row["messages"])) is None:
            return True
        if not skip_bad_rows:
            raise ValueError(
                f"Row {place} of the readable rows of {name!r} cannot be trained on: {why}. Mend it, or use "
                "--skip_bad_rows."
            )
        warnings.warn(f"Left out row {place} of the readable rows of {name!r}: {why}", stacklevel=2)
        return False

    kept = rows.filter(passes, with_indices=True)
    kept.info.description = rows.info.description
    return kept
