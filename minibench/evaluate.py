"""Exact-match accuracy on MiniBench by greedy generation, with its interval, its chance level and a blindfold.

    python -m minibench.evaluate --model DIR --num_questions 500 [--blind] [--routings none late_fusion]

`evaluate` takes any LLaVA-like model: the stock class and DPVR alike. Blind, the picture is replaced by an even grey
one: what is left is what the questions give away by themselves.
"""

import argparse
import json
from collections import Counter, defaultdict
from math import sqrt
from typing import Any, get_args

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .data import Item, evaluation_items, to_messages
from .questions import KINDS
from .record import run_record
from .scenes import COLOURS, SHAPES, SIDE, Split

GREY = (127, 127, 127)
MAX_NEW_TOKENS = 8


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    split: Split = "test",
    num_questions: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    blind: bool = False,
) -> dict[str, Any]:
    """Ask `num_questions` of each kind and return the accuracies.

    Returns:
        {"kinds": {kind: {"accuracy", "low", "high", "n", "chance"}}, "accuracy", "low", "high", "n": of all questions
        together, "mean" and "chance": means of the kinds}. low and high bound the 95 % Wilson interval, chance is the
        accuracy of always giving the most frequent answer, see `majority_rate`.
    """
    items = evaluation_items(split, num_questions, seed)
    was_training = model.training
    model.eval()
    replies = []
    for start in tqdm(range(0, len(items), batch_size), desc=f"MiniBench {split}", unit="batch"):
        replies += answer(model, processor, items[start : start + batch_size], blind=blind)
    model.train(was_training)
    return summarise(items, replies)


@torch.no_grad()
def answer(model: PreTrainedModel, processor: ProcessorMixin, items: list[Item], *, blind: bool = False) -> list[str]:
    """Return the model's greedy replies to a batch of items."""
    images = [Image.new("RGB", (SIDE, SIDE), GREY) if blind else item.image for item in items]
    conversations = [to_messages([(item.question, None)]) for item in items]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    tokenizer = processor.tokenizer
    output = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def summarise(items: list[Item], replies: list[str]) -> dict[str, Any]:
    """Count exact matches by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for item, reply in zip(items, replies, strict=True):
        right[item.kind].append(reply == item.answer)
        answers[item.kind][item.answer] += 1
    kinds = {}
    for kind in KINDS:
        n = len(right[kind])
        kinds[kind] = {**_rate(sum(right[kind]), n), "chance": majority_rate(answers[kind])}
    together = _rate(sum(map(sum, right.values())), len(items))
    return {
        "kinds": kinds,
        **together,
        "mean": sum(kind["accuracy"] for kind in kinds.values()) / len(kinds),
        "chance": sum(kind["chance"] for kind in kinds.values()) / len(kinds),
    }


def majority_rate(answers: Counter[str]) -> float:
    """Return the accuracy of the most frequent colour where a colour is asked for, shape where a shape, and so on."""
    best: dict[str, int] = defaultdict(int)
    for answer, count in answers.items():
        family = "colour" if answer in COLOURS else "shape" if answer in SHAPES else "other"
        best[family] = max(best[family], count)
    return sum(best.values()) / answers.total()


def _rate(right: int, n: int) -> dict[str, float | int]:
    low, high = wilson_interval(right, n)
    return {"accuracy": right / n, "low": low, "high": high, "n": n}


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion."""
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy of a LLaVA-like model on MiniBench.")
    parser.add_argument("--model", required=True, help="folder or Hub name of a model with its processor")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--num_questions", type=int, default=500, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--routings", nargs="+", help="of a DPVR model, one row each; default: the configured one")
    parser.add_argument(
        "--blind", action="store_true", help="add rows with every picture replaced by an even grey one"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Print one JSON document: the record of the run, and a row per routing, seeing and (if asked for) blind."""
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    options = {name: vars(args)[name] for name in ("split", "num_questions", "seed", "batch_size")}
    rows = []
    for routing in args.routings or [None]:
        if routing is not None:
            model.set_routing(routing)
        for blind in (False, True) if args.blind else (False,):
            scores = evaluate(model, processor, **options, blind=blind)
            rows.append({"routing": routing, "blind": blind, **scores})
    result = {**run_record("-m minibench.evaluate"), **options, "rows": rows}
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main(parse_args())
