"""Replies to many conversations about pictures, in batches of any lengths.

    requests --sort by settings, longest first--> batches --chat template, processor, padding on the left--> generate
             <------------ the asked order ------------ replies, cut at the stop strings <------------------'

An error ends the run: no reply is ever made up, not even an empty one.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

GREEDY = {"max_new_tokens", "num_beams", "repetition_penalty"}
SAMPLING = {"temperature", "top_p", "top_k"}
HINTS = {"image_aspect_ratio"}  # for models that cut pictures up; LLaVA's processor has one way


class Conversation(NamedTuple):
    """Messages as a chat template takes them, and their pictures in order."""

    messages: list[dict[str, Any]]
    pictures: list[Image.Image]


class Request(NamedTuple):
    """A conversation, made when its turn comes, so that no more than a batch of pictures is in memory.

    `settings` are from `to_settings`, and `length` says, in any unit, how long it is.
    """

    make: Callable[[], Conversation]
    settings: dict[str, Any]
    length: int


class Reply(NamedTuple):
    text: str
    tokens: int


def to_settings(wanted: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return a benchmark's wishes as `generate` takes them, with "until", the strings to stop at.

    Args:
        wanted: max_new_tokens, until, do_sample, temperature, top_p, top_k, num_beams, repetition_penalty. Without a
            temperature above 0 the likeliest token is taken, whatever do_sample and top_p say.
        max_new_tokens: where `wanted` has none.

    Raises:
        ValueError: for another wish, which nobody would hear of if it were dropped.
    """
    known = GREEDY | SAMPLING | HINTS | {"until", "do_sample"}
    if unknown := sorted(wanted.keys() - known):
        raise ValueError(f"Expected generation settings from {sorted(known)}; got {unknown}. Remedy: drop them.")
    until = wanted.get("until") or []
    samples = bool(wanted.get("temperature")) and wanted.get("do_sample", True)
    used = GREEDY | SAMPLING if samples else GREEDY
    return {
        "max_new_tokens": max_new_tokens,
        **{name: value for name, value in wanted.items() if name in used and value is not None},
        "do_sample": samples,
        "until": (until,) if isinstance(until, str) else tuple(until),
    }


def reply_to_all(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    *,
    batch_size: int,
    show_progress: bool = True,
) -> list[Reply]:
    """Return the replies in the order of the requests, `batch_size` of which with equal settings are one batch."""
    replies: dict[int, Reply] = {}
    order = sorted(range(len(requests)), key=lambda index: (_key(requests[index]), -requests[index].length))
    with tqdm(total=len(requests), desc="replies", unit="question", disable=not show_progress) as progress:
        for _, alike in itertools.groupby(order, key=lambda index: _key(requests[index])):
            for batch in _batches(alike, batch_size):
                conversations = [requests[index].make() for index in batch]
                found = reply(model, processor, conversations, **requests[batch[0]].settings)
                replies |= zip(batch, found, strict=True)
                progress.update(len(batch))
    return [replies[index] for index in range(len(requests))]


def _key(request: Request) -> str:
    return repr(sorted(request.settings.items()))


def _batches(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    indices = iter(indices)
    while batch := list(itertools.islice(indices, size)):
        yield batch


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: list[Conversation],
    *,
    until: Sequence[str] = (),
    **settings: Any,
) -> list[Reply]:
    """Return the replies to one batch of conversations, which may have any number of pictures each.

    Raises:
        ValueError: if a text holds the model's own mark of a picture.
    """
    _check_texts(conversations, processor.image_token)
    prompts = processor.apply_chat_template([c.messages for c in conversations], add_generation_prompt=True)
    pictures = [picture for conversation in conversations for picture in conversation.pictures]
    inputs = processor(
        images=pictures or None, text=prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device, model.dtype)
    start, room = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if start > room:
        warnings.warn(f"A prompt of {start} tokens; the model knows {room} positions.", stacklevel=2)
    pad = processor.tokenizer.pad_token_id
    output = model.generate(**inputs, pad_token_id=pad, **settings)[:, start:]
    texts = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
    lengths = (output != pad).sum(dim=1).tolist()
    return [Reply(_cut(text, until).strip(), length) for text, length in zip(texts, lengths, strict=True)]


def _check_texts(conversations: list[Conversation], mark: str) -> None:
    for conversation in conversations:
        for message in conversation.messages:
            for part in message["content"]:
                if mark in part.get("text", ""):
                    raise ValueError(
                        f"Expected texts without the model's own mark {mark!r}, as the template puts one there for "
                        f"every picture; got {part['text'][:200]!r}. Remedy: take it out of the question."
                    )


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string; one at the very start, where a reply may have blank lines, is none."""
    text = text.lstrip()
    return text[: min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=len(text))]
