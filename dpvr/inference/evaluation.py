"""MiniBench's score of a model, by greedy generation in batches.

    make_item(task, split, seed, index)  ->  prompts and pictures  ->  generate  ->  replies  ->  scoring.py

`evaluate` takes any LLaVA-like model: the stock class and DPVR alike. Blind, every picture is replaced by an even grey
one: what is left is what the questions give away by themselves. `benchmark_accuracy.py` is the command.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from minibench.data import make_items, to_messages
from minibench.scenes import SIDE, Split
from minibench.scoring import summarise
from minibench.tasks import TASKS, Item

GREY = (127, 127, 127)
MAX_NEW_TOKENS = 10


class Reply(NamedTuple):
    """What the model said, and whether it ended by itself with the end token."""

    text: str
    ended: bool


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
    asked = [(item, text) for item in items for text, _ in item.questions]
    was_training = model.training
    model.eval()
    replies: list[Reply] = []
    with tqdm(total=len(asked), desc=description, unit="question") as progress:
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            replies += answer(model, processor, batch, blind=blind)
            progress.update(len(batch))
    model.train(was_training)
    in_order = iter(replies)
    return [[next(in_order) for _ in item.questions] for item in items]


def score(items: list[Item], replies: list[list[Reply]]) -> dict[str, Any]:
    """Return `scoring.summarise` of the replies, with "ended": the share that stopped within `MAX_NEW_TOKENS`."""
    ended = [reply.ended for several in replies for reply in several]
    scores = summarise(items, [[reply.text for reply in several] for several in replies])
    return {**scores, "ended": sum(ended) / len(ended)}


@torch.no_grad()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, asked: list[tuple[Item, str]], *, blind: bool = False
) -> list[Reply]:
    """Return the model's greedy replies to a batch of questions about their items' pictures."""
    pictures = [
        [Image.new("RGB", (SIDE, SIDE), GREY) if blind else s.draw() for s in item.scenes] for item, _ in asked
    ]
    conversations = [to_messages([(text, None)], len(item.scenes)) for item, text in asked]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    tokenizer = processor.tokenizer
    output = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = output[:, inputs["input_ids"].shape[1] :]
    ended = (output == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [Reply(text.strip(), end) for text, end in zip(texts, ended, strict=True)]
