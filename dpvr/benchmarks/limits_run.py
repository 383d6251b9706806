"""A run of `python -m dpvr.benchmarks.limits`: the models one after the other, each asked every question."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.benchmarks.frontier_cells import ShortCosts
from dpvr.benchmarks.latents_run import fit_fields, fit_new, points
from dpvr.benchmarks.limit_sets import SPLIT, Asked, Sets, facts_right, make_sets
from dpvr.benchmarks.pruning import prune
from dpvr.data.prompts import answered_prompt
from dpvr.inference.batches import Request, reply_to_all, to_settings
from dpvr.inference.evaluation import median_prompt
from dpvr.record import run_record, without_folders
from generation_dpvr import IGNORED_LABEL
from minibench.data import make_items
from minibench.scoring import paired_difference
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

BATCH = 64
LONG = "long answers"
MEDIAN_OF = 10  # questions of each task, whose median prompt costs are counted for
Replies = dict[tuple[str, str], list[str]]  # {(situation, level): texts}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document: models with their costs, and for each level and model a row.

    Raises:
        ValueError: if the repository has no latent, or `--fit` is of another form.
    """
    wanted = [fit_fields(text) for text in args.fit]
    model, processor = DpvrLlavaForConditionalGeneration.from_pretrained(args.model), load_processor(args.model)
    if not model.side_branch.has_latent:
        raise ValueError(f"{args.model!r} has no latent: name a repository with one, such as dpvr-mini's.")
    costs = ShortCosts(model.config.text_config, *median_prompt(processor, make_items(SPLIT, MEDIAN_OF, args.seed)))
    sets = make_sets(args.limit, args.seed)
    models, rows, places, vanilla = [], [], {}, None
    for name, cost, asked in plans(model.eval(), processor, costs, wanted, args):
        own = ask(asked, processor, sets, name)
        vanilla = own if vanilla is None else vanilla
        models.append({"name": name, "prefill_flops": cost})
        rows += [row | {"model": name} for row in compare(sets, own, vanilla)]
        places[name] = agreement(asked, processor, sets, vanilla)
    return {
        **run_record("-m dpvr.benchmarks.limits"),
        "model": without_folders(args.model),
        **{name: vars(args)[name] for name in ("limit", "seed", "fit_rows")},
        "prompt": {"image_tokens": costs.tokens[0], "text_tokens": costs.tokens[1]},
        "models": models,
        "rows": rows,
        "next_token_equal": places,
    }


def plans(
    model: DpvrLlavaForConditionalGeneration,
    processor: ProcessorMixin,
    costs: ShortCosts,
    wanted: list[dict[str, Any]],
    args: argparse.Namespace,
) -> Iterator[tuple[str, float, PreTrainedModel]]:
    """Name, prefill FLOPs as a share of vanilla's, and model, vanilla first; each is to be used before the next."""
    for name, routing in (("vanilla", "none"), ("late fusion", "late_fusion"), ("latent", "latent")):
        model.set_routing(routing)
        yield name, costs.of(model), model
    (pruning,) = costs.most_kept("random", costs.of(model))[:1]
    model.set_routing("none")
    yield "random pruning", costs.pruned_ratio(pruning), prune(model, **pruning)
    for text, fields in zip(args.fit, wanted, strict=True):
        fit_new(model, processor, fields, args.fit_rows, args.seed)
        yield f"latent {text}", costs.of(model), model


def ask(model: PreTrainedModel, processor: ProcessorMixin, sets: Sets, name: str) -> Replies:
    """The replies of a model to every question."""
    requests = {
        (situation, level): [Request(asked.make, to_settings({}, asked.max_new_tokens), 0) for asked in questions]
        for situation, levels in sets.items()
        for level, questions in levels.items()
    }
    every = [request for several in requests.values() for request in several]
    replies = iter(reply_to_all(model, processor, every, batch_size=BATCH, description=name))
    return {key: [next(replies).text for _ in several] for key, several in requests.items()}


def compare(sets: Sets, own: Replies, vanilla: Replies) -> Iterator[dict[str, Any]]:
    """A row per level: the score and how it differs from vanilla's on the same questions."""
    for situation, level in own:
        asked, key = sets[situation][level], (situation, level)
        first, second = (
            {level: [facts_right(text, one.answer) for text, one in zip(replies[key], asked, strict=True)]}
            for replies in (own, vanilla)
        )
        same = sum(map(str.__eq__, own[key], vanilla[key]))
        yield {
            "situation": situation,
            "level": level,
            "score": sum(first[level]) / len(asked),
            "minus_vanilla": list(paired_difference(first, second, [level])),
            "equal": same / len(asked),
            "questions": len(asked),
        }


@torch.inference_mode()
def agreement(model: PreTrainedModel, processor: ProcessorMixin, sets: Sets, vanilla: Replies) -> list[list[int]]:
    """[[equal tokens, tokens] at each place of vanilla's long replies, whose earlier tokens are given]."""
    places: list[list[int]] = []
    for level, questions in sets[LONG].items():
        for asked, text in zip(questions, vanilla[LONG, level], strict=True):
            for place, right in enumerate(next_tokens_equal(model, processor, asked, text)):
                places += [[0, 0]] * (place == len(places))
                places[place] = [places[place][0] + right, places[place][1] + 1]
    return places


def next_tokens_equal(model: PreTrainedModel, processor: ProcessorMixin, asked: Asked, reply: str) -> list[bool]:
    """Of each token of a reply, with those before it given, whether it is the one that the model would write."""
    conversation = asked.make()
    answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    inputs, labels = answered_prompt(
        processor, {"messages": [*conversation.messages, answer], "images": conversation.pictures}
    )
    said = model(**inputs).logits[:, :-1].argmax(dim=-1)
    return (said == labels[:, 1:])[labels[:, 1:] != IGNORED_LABEL].tolist()


def table(document: dict[str, Any]) -> list[str]:
    """A line per level and model."""
    lines = [f"{'':<18}{'':<22}{'':<18}{'score':>8}{'minus vanilla (95%)':>26}{'equal':>8}"]
    for row in document["rows"]:
        difference = "" if row["model"] == "vanilla" else points(row["minus_vanilla"])
        lines.append(
            f"{row['situation']:<18}{row['level']:<22}{row['model']:<18}{row['score']:>8.1%}{difference:>26}"
            f"{row['equal']:>8.1%}"
        )
    return lines
