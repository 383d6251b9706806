"""Replies to many conversations about pictures, in batches of any lengths.

    requests --sort by settings, longest first--> batches --prompt_inputs, padding on the left--> generate
             <------------ the asked order ------------ replies, cut at the stop strings <---------'

An error ends the run: no reply is ever made up, not even an empty one.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.data.prompts import Conversation, prompt_inputs

GREEDY = {"max_new_tokens", "num_beams", "repetition_penalty"}
SAMPLING = {"temperature", "top_p", "top_k"}
HINTS = {"image_aspect_ratio"}  # for models that cut pictures up; LLaVA's processor has one way


class Request(NamedTuple):
    """A conversation, made when its turn comes, so that no more than a batch of pictures is in memory.

    `settings` are from `to_settings`, and `length` says, in any unit, how long it is.
    """

    make: Callable[[], Conversation]
    settings: dict[str, Any]
    length: int


class Reply(NamedTuple):
    """What the model said, in how many tokens, and whether it ended by itself with an end token."""

    text: str
    tokens: int
    ended: bool


def to_settings(wanted: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return a benchmark's wishes as `generate` takes them, with "until", the strings to stop at.

    Args:
        wanted: max_new_tokens, until, do_sample, temperature, top_p, top_k, num_beams, repetition_penalty. Without a
            temperature above 0 the likeliest token is taken, whatever do_sample and top_p say.
        max_new_tokens: where `wanted` has none.

    Raises:
        ValueError: for another wish, which would else be dropped in silence.
    """
    known = GREEDY | SAMPLING | HINTS | {"until", "do_sample"}
    if unknown := sorted(wanted.keys() - known):
        raise ValueError(
            f"The generation setting {unknown[0]!r} is not known here: take it out of the task. Known are "
            f"{', '.join(sorted(known))}."
        )
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
    description: str = "replies",
    show_progress: bool = True,
) -> list[Reply]:
    """Return the replies in the order of the requests, `batch_size` of which with equal settings are one batch."""
    replies: dict[int, Reply] = {}
    order = sorted(range(len(requests)), key=lambda index: (_key(requests[index]), -requests[index].length))
    with tqdm(total=len(requests), desc=description, unit="question", disable=not show_progress) as progress:
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
    conversations: Sequence[Conversation],
    *,
    until: Sequence[str] = (),
    **settings: Any,
) -> list[Reply]:
    """Return the replies to one batch of conversations, which may have any number of pictures each.

    Raises:
        ValueError: if a prompt is longer than the model's positions, and as `prompt_inputs`.
    """
    room = model.config.get_text_config().max_position_embeddings
    inputs = prompt_inputs(processor, conversations, room).to(model.device, model.dtype)
    start = inputs["input_ids"].shape[1]
    if start > room:
        raise ValueError(f"A prompt has {start} tokens, and the model has {room} positions: shorten it.")
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    output = model.generate(**inputs, pad_token_id=pad, **settings)[:, start:]
    texts = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
    lengths, ended = (output != pad).sum(dim=1).tolist(), (output == end).any(dim=1).tolist()
    return [Reply(_cut(text, until).strip(), *rest) for text, *rest in zip(texts, lengths, ended, strict=True)]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string; one at the very start, where a reply may have blank lines, is none."""
    text = text.lstrip()
    return text[: min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=len(text))]
