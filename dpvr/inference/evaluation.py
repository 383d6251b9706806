"""MiniBench's score of a model, by greedy generation in batches.

    make_items(split, n, seed) --> prompts and pictures --> reply_to_all --> replies --> minibench/scoring.py

`evaluate` takes any LLaVA-like model: the stock class and DPVR alike. Blind, every picture is replaced by an even grey
one: what is left is what the questions give away by themselves. `python -m dpvr.benchmarks.accuracy` is the command.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.data.prompts import Conversation
from dpvr.inference.batches import Reply, Request, reply_to_all, to_settings
from minibench.data import make_items, to_messages
from minibench.scenes import SIDE, Split
from minibench.scoring import summarise
from minibench.tasks import TASKS, Item

GREY = (127, 127, 127)
MAX_NEW_TOKENS = 10


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    split: Split = "test",
    num_questions: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    blind: bool = False,
    tasks: Sequence[str] = TASKS,
    description: str = "MiniBench",
) -> dict[str, Any]:
    """Ask `num_questions` of each task and return their `score`."""
    items = make_items(split, num_questions, seed, tasks)
    replies = ask(model, processor, items, batch_size=batch_size, blind=blind, description=description)
    return score(items, replies)


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Item],
    *,
    batch_size: int = 64,
    blind: bool = False,
    description: str = "MiniBench",
) -> list[list[Reply]]:
    """Return, for every item, the replies to its questions."""
    settings = to_settings({}, MAX_NEW_TOKENS)
    requests = [
        Request(partial(conversation, item, text, blind), settings, length=0)  # all alike: they keep their order
        for item in items
        for text, _ in item.questions
    ]
    was_training = model.training
    model.eval()
    replies = iter(reply_to_all(model, processor, requests, batch_size=batch_size, description=description))
    model.train(was_training)
    return [[next(replies) for _ in item.questions] for item in items]


def conversation(item: Item, text: str, blind: bool = False) -> Conversation:
    """A question about an item's pictures, or grey ones in their places."""
    pictures = [Image.new("RGB", (SIDE, SIDE), GREY) if blind else scene.draw() for scene in item.scenes]
    return Conversation(to_messages([(text, None)], len(pictures)), pictures)


def score(items: list[Item], replies: list[list[Reply]]) -> dict[str, Any]:
    """Return `scoring.summarise` of the replies, with "ended": the share that stopped within `MAX_NEW_TOKENS`."""
    ended = [reply.ended for several in replies for reply in several]
    scores = summarise(items, [[reply.text for reply in several] for several in replies])
    return {**scores, "ended": sum(ended) / len(ended)}
