"""MiniBench's score of a model, by greedy generation in batches.

    make_items(split, n, seed) --> prompts and pictures --> reply_to_all --> replies --> minibench/scoring.py

`evaluate` takes any LLaVA-like model: the stock class and DPVR alike. Blind, every picture is replaced by an even grey
one: what is left is what the questions give away by themselves. `python -m dpvr.benchmarks.accuracy` is the command.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.data.prompts import Conversation
from dpvr.inference.batches import Reply, Request, reply_to_all, to_settings
from minibench.data import make_items, to_messages
from minibench.scenes import Split
from minibench.scoring import summarise
from minibench.tasks import TASKS, Item

GREY = (127, 127, 127)
MAX_NEW_TOKENS = 10

Show = Callable[[Image.Image], Image.Image]


def as_drawn(picture: Image.Image) -> Image.Image:
    return picture


def grey(picture: Image.Image) -> Image.Image:
    """Nothing of a picture."""
    return Image.new("RGB", picture.size, GREY)


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    split: Split = "test",
    num_questions: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    show: Show = as_drawn,
    tasks: Sequence[str] = TASKS,
    description: str = "MiniBench",
) -> dict[str, Any]:
    """Ask `num_questions` of each task and return their `score`.

    Args:
        show: what is shown in place of a picture: `as_drawn`, `grey` or `minibench.data.swapped`.
    """
    items = make_items(split, num_questions, seed, tasks)
    replies = ask(model, processor, items, batch_size=batch_size, show=show, description=description)
    return score(items, replies)


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    *,
    batch_size: int = 64,
    show: Show = as_drawn,
    description: str = "MiniBench",
) -> list[list[Reply]]:
    """Return, for every item, the replies to its questions."""
    settings = to_settings({}, MAX_NEW_TOKENS)
    requests = [
        Request(partial(conversation, item, text, show), settings, length=0)  # all alike: they keep their order
        for item in items
        for text, _ in item.questions
    ]
    was_training = model.training
    model.eval()
    replies = iter(reply_to_all(model, processor, requests, batch_size=batch_size, description=description))
    model.train(was_training)
    return [[next(replies) for _ in item.questions] for item in items]


def conversation(item: Item, text: str, show: Show = as_drawn) -> Conversation:
    """A question about an item's pictures."""
    pictures = [show(scene.draw()) for scene in item.scenes]
    return Conversation(to_messages([(text, None)], len(pictures)), pictures)


def score(items: list[Item], replies: list[list[Reply]]) -> dict[str, Any]:
    """Return `scoring.summarise` of the replies, with "ended": the share that stopped within `MAX_NEW_TOKENS`."""
    ended = [reply.ended for several in replies for reply in several]
    scores = summarise(items, [[reply.text for reply in several] for several in replies])
    return {**scores, "ended": sum(ended) / len(ended)}


def median_prompt(processor: ProcessorMixin, items: Sequence[Item]) -> tuple[int, int]:
    """Image and text tokens of the median question about these items."""
    picture = processor(images=items[0].scenes[0].draw(), text=processor.image_token)
    per_picture = picture["input_ids"][0].count(processor.image_token_id)
    images, texts = [], []
    for item in items:
        for text, _ in item.questions:
            messages = to_messages([(text, None)], len(item.scenes))
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            images.append(per_picture * len(item.scenes))
            texts.append(len(processor.tokenizer(prompt)["input_ids"]) - len(item.scenes))
    return round(statistics.median(images)), round(statistics.median(texts))
