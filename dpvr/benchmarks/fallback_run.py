"""A run of `python -m dpvr.benchmarks.fallback`: replies with signals, thresholds, and what they come to."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.benchmarks.frontier_cells import ShortCosts
from dpvr.benchmarks.latents_run import fit_new
from dpvr.benchmarks.limit_sets import make_sets
from dpvr.data.prompts import Conversation, prompt_inputs
from dpvr.inference.evaluation import MAX_NEW_TOKENS, conversation, median_prompt
from dpvr.record import run_record, without_folders
from minibench.data import make_items
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

BATCH = 64
OTHERS = ("small digit", "crowded, colour", "crowded, number", "other pictures")  # of limit_sets.py
Make = Callable[[], Conversation]

# Of a reply's tokens: probability of each, and its lead over the second, as arrays. Higher is surer.
SIGNALS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "least lead": lambda probability, lead: lead.min(),
    "first lead": lambda probability, lead: lead[0],
    "least probability": lambda probability, lead: probability.min(),
    "mean log probability": lambda probability, lead: np.log(probability).mean(),
}


class Said(NamedTuple):
    """Replies, and for each signal an array of one value per reply."""

    texts: list[str]
    signals: dict[str, np.ndarray]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document: signals of the repository's latent, what they come to, and plans of later splits.

    Raises:
        ValueError: if the repository has no latent.
    """
    model, processor = DpvrLlavaForConditionalGeneration.from_pretrained(args.model), load_processor(args.model)
    if not model.side_branch.has_latent:
        raise ValueError(f"{args.model!r} has no latent: name a repository with one, such as dpvr-mini's.")
    items = {split: make_items(split, args.limit, args.seed) for split in ("validation", "test")}
    costs = ShortCosts(model.config.text_config, *median_prompt(processor, items["test"]))
    sets = {
        split: [_maker(item, text) for item in several for text, _ in item.questions]
        for split, several in items.items()
    }
    sets |= {name: makers for name, makers in _other_questions(args.limit, args.seed)}
    model.eval().set_routing("none")
    vanilla = {name: say(model, processor, makers, f"vanilla, {name}").texts for name, makers in sets.items()}
    model.set_routing("latent")
    own = {name: say(model, processor, makers, f"latent, {name}") for name, makers in sets.items()}
    cost = costs.of(model)
    differ = {name: differs(said.texts, vanilla[name]) for name, said in own.items()}
    return {
        **run_record("-m dpvr.benchmarks.fallback"),
        "model": without_folders(args.model),
        **{name: vars(args)[name] for name in ("limit", "seed", "fit_rows", "rank")},
        "prefill_flops": cost,
        "questions": {name: len(makers) for name, makers in sets.items()},
        "differ": {name: found.mean() for name, found in differ.items()},
        "auroc": {
            name: {split: auroc(own[split].signals[name], differ[split]) for split in items} for name in SIGNALS
        },
        "fallbacks": list(fallbacks(own, differ, cost, args.tolerated)),
        "plans": list(later_splits(model, processor, costs, sets["test"], vanilla["test"], args)),
    }


def _maker(item: Any, text: str) -> Make:
    return lambda: conversation(item, text)


def _other_questions(limit: int, seed: int) -> Iterator[tuple[str, list[Make]]]:
    for situation, levels in make_sets(limit, seed).items():
        if situation in OTHERS:
            for level, asked in levels.items():
                yield f"{situation}, {level}", [one.make for one in asked]


def differs(texts: list[str], vanilla: list[str]) -> np.ndarray:
    """Of every reply, whether it is another than vanilla's."""
    return np.array([text != other for text, other in zip(texts, vanilla, strict=True)])


@torch.inference_mode()
def say(model: PreTrainedModel, processor: ProcessorMixin, makers: list[Make], description: str) -> Said:
    """Greedy replies and their signals."""
    tokenizer, texts, rows = processor.tokenizer, [], []
    for start in tqdm(range(0, len(makers), BATCH), desc=description, unit="batch"):
        inputs = prompt_inputs(processor, [make() for make in makers[start : start + BATCH]])
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        replies = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True)]
        best = torch.stack(output.logits, dim=1).float().softmax(dim=-1).topk(2, dim=-1).values.double()
        for reply, two in zip(replies, best, strict=True):
            two = two[reply != tokenizer.pad_token_id].numpy()
            rows.append([signal(two[:, 0], two[:, 0] - two[:, 1]) for signal in SIGNALS.values()])
    return Said(texts, dict(zip(SIGNALS, np.array(rows).T, strict=True)))


def auroc(signal: np.ndarray, differ: np.ndarray) -> float | None:
    """How well a signal tells replies that differ from others: 0.5 not at all, 1 always; None if there is one kind."""
    return roc_auc_score(~differ, signal) if 0 < differ.sum() < len(differ) else None


def threshold_for(signal: np.ndarray, differ: np.ndarray, tolerated: float) -> float:
    """The lowest threshold such that, with replies below it made again, (differing + 1) / (n + 1) is tolerated.

    Conformal risk control (arXiv 2208.02814, section 2) of a risk that is at most 1.

    Raises:
        ValueError: if there are too few replies to promise so small a share.
    """
    for threshold in [*np.unique(signal), np.inf]:
        if ((differ & (signal >= threshold)).sum() + 1) / (len(signal) + 1) <= tolerated:
            return float(threshold)
    raise ValueError(
        f"{len(signal)} replies cannot show that at most {tolerated:.2%} differ: ask at least {round(1 / tolerated)} "
        "questions with --limit, or tolerate more."
    )


def fallbacks(
    own: dict[str, Said], differ: dict[str, np.ndarray], cost: float, tolerated: list[float]
) -> Iterator[dict[str, Any]]:
    """For every signal and tolerated share: the threshold of the validation questions, and what it comes to."""
    for name in SIGNALS:
        for share in tolerated:
            threshold = threshold_for(own["validation"].signals[name], differ["validation"], share)
            found = {}
            for questions, said in own.items():
                again = said.signals[name] < threshold
                found[questions] = {
                    "again": again.mean(),
                    "differ": (differ[questions] & ~again).mean(),
                    "prefill_flops": cost + again.mean(),
                }
            yield {
                "signal": name,
                "tolerated": share,
                "threshold": threshold if np.isfinite(threshold) else None,
                "on": found,
            }


def later_splits(
    model: DpvrLlavaForConditionalGeneration,
    processor: ProcessorMixin,
    costs: ShortCosts,
    makers: list[Make],
    vanilla: list[str],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Latents that are read from a later split on, with no fallback."""
    for split in args.splits:
        fields = {"latent_split_layer": split, "latent_rank": args.rank, "latent_stride": 1, "latent_score": None}
        fit_new(model, processor, {**fields, "latent_layers": None, "latent_side_layers": 0}, args.fit_rows, args.seed)
        said = say(model, processor, makers, f"split {split}")
        yield {"split": split, "prefill_flops": costs.of(model), "differ": differs(said.texts, vanilla).mean()}


def table(document: dict[str, Any]) -> list[str]:
    """What was measured, for people."""
    lines = [f"latent alone: {document['prefill_flops']:.3f} of the prefill, {document['differ']['test']:.1%} differ"]
    for plan in document["plans"]:
        lines.append(f"split {plan['split']:<6} {plan['prefill_flops']:.3f}, {plan['differ']:.1%} differ")
    for name, found in document["auroc"].items():
        shares = [f"{split} {value:.3f}" for split, value in found.items() if value is not None]
        lines.append(f"{name:<22} AUROC {', '.join(shares)}")
    lines.append(f"{'signal':<22}{'tolerated':>10}{'differ':>8}{'again':>8}{'prefill':>9}   worst elsewhere")
    for row in document["fallbacks"]:
        test = row["on"]["test"]
        elsewhere = {name: found for name, found in row["on"].items() if name not in ("test", "validation")}
        worst = max(elsewhere, key=lambda name: elsewhere[name]["differ"])
        lines.append(
            f"{row['signal']:<22}{row['tolerated']:>10.1%}{test['differ']:>8.1%}{test['again']:>8.1%}"
            f"{test['prefill_flops']:>9.3f}   {elsewhere[worst]['differ']:.1%} ({worst})"
        )
    return lines
