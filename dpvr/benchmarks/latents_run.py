"""A run of `python -m dpvr.benchmarks.latents`: the models, their replies, and differences on the same questions."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.benchmarks.cells import Fields
from dpvr.benchmarks.frontier_cells import ShortCosts
from dpvr.benchmarks.pruning import prune
from dpvr.data.prompts import AnsweredPrompts, in_batches
from dpvr.inference.evaluation import Reply, ask, median_prompt
from dpvr.record import run_record, without_folders
from dpvr.training.latent_fit import fit_latent
from minibench.data import MiniBench, make_items
from minibench.scoring import Units, paired_difference, unit_score
from minibench.tasks import Item
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

Model = DpvrLlavaForConditionalGeneration
BATCH = 16
RIVALS = {"FastV": "attention", "random pruning": "random"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The document: a row per model, each latent's followed by what costs as much.

    Raises:
        ValueError: if the repository has no latent.
    """
    wanted = [fit_fields(text) for text in args.fit]
    model, processor = Model.from_pretrained(args.model), load_processor(args.model)
    if not model.side_branch.has_latent:
        raise ValueError(f"{args.model!r} has no latent: name a repository with one, such as dpvr-mini's.")
    items = make_items(args.split, args.limit, args.seed)
    costs = ShortCosts(model.config.text_config, *median_prompt(processor, items))

    def replies(name: str, asked: PreTrainedModel) -> list[list[Reply]]:
        return ask(asked, processor, items, description=name)

    model.set_routing("none")
    vanilla = replies("vanilla", model)
    rows = [row_of("vanilla", 1.0, None, {}, items, vanilla, vanilla)]
    for name, fields in latents(model, processor, wanted, args):
        budget = costs.of(model)
        own = replies(name, model)
        rows.append(row_of(name, budget, None, fields, items, own, vanilla))
        for rival, what, cost, make in rivals(model, costs, budget, args.plans):
            row = row_of(rival, cost, name, what, items, replies(f"{rival} for {name}", make()), vanilla)
            rows.append(row | {"latent_minus_this": list(paired_difference(units(items, own), row.pop("units")))})
    for row in rows:
        row.pop("units", None)
    return {
        **run_record("-m dpvr.benchmarks.latents"),
        "model": without_folders(args.model),
        **{name: vars(args)[name] for name in ("split", "limit", "seed", "fit_rows")},
        "prompt": {"image_tokens": costs.tokens[0], "text_tokens": costs.tokens[1]},
        "rows": rows,
    }


def fit_fields(text: str) -> Fields:
    """Fields of a latent from "split:rank", "split:rank:stride" or "split:rank:stride:score".

    Raises:
        ValueError: for another text.
    """
    *numbers, score = text.split(":") if text.count(":") == 3 else [*text.split(":"), None]
    if len(numbers) not in (2, 3) or not all(part.isdecimal() for part in numbers):
        raise ValueError(f"--fit takes split:rank, with :stride and :score behind, such as 0:24:4:norm, not {text!r}.")
    split, rank, stride = (*map(int, numbers), 1)[:3]
    fields = {"latent_split_layer": split, "latent_rank": rank, "latent_stride": stride, "latent_score": score}
    return {**fields, "latent_layers": None, "latent_side_layers": 0}


def latents(
    model: Model, processor: ProcessorMixin, wanted: list[Fields], args: argparse.Namespace
) -> Iterator[tuple[str, Fields]]:
    """Give the model each latent in turn, its own first; yields the name and the fields."""
    names = ("latent_split_layer", "latent_rank", "latent_side_layers", "latent_stride", "latent_score")
    for number, fields in enumerate([None, *wanted]):
        if fields is None:
            model.set_routing("latent")
        else:
            fit_new(model, processor, fields, args.fit_rows, args.seed)
        found = {name: getattr(model.config, name) for name in names}
        how = "fitted" if number else "as it is in the repository"
        yield f"latent {number + 1}", {**found, "plan": str(model.model.plan), "how": how}


def fit_new(model: Model, processor: ProcessorMixin, fields: Fields, num_rows: int, seed: int) -> None:
    """Give the model a latent in place of its own, fitted in closed form on pictures of MiniBench's train split."""
    model.set_routing("none")
    model.new_latent(**fields)
    model.set_routing("latent")
    rows = MiniBench("train", num_rows, questions_per_row=1, seed=seed)
    pictures = (rows[index] for index in range(num_rows))
    bar = tqdm(AnsweredPrompts(processor, pictures, num_rows), desc="Fitting", total=num_rows, disable=None)
    fit_latent(model, (inputs for inputs, _ in in_batches(bar, BATCH)))


def rivals(
    model: Model, costs: ShortCosts, budget: float, plans: Path
) -> Iterator[tuple[str, Fields, float, Callable[[], PreTrainedModel]]]:
    """What costs no more than a latent: name, what it is, its cost, and how it is made."""

    def routed(fields: Fields) -> Model:
        return Model.from_pretrained(model.config._name_or_path, latent_rank=None, new_side_branch=True, **fields)

    if (fields := best_plan(plans, costs, budget)) is not None:
        yield "untrained plan", fields, costs.ratio(fields), lambda: routed(fields)
    for name, rank in RIVALS.items():
        for pruning in costs.most_kept(rank, budget)[:1]:
            cost = costs.pruned_ratio(pruning)
            yield name, pruning, cost, lambda pruning=pruning: prune(routed({"routing": "none"}), **pruning)
    if (fields := costs.deepest_split("text_only", budget)) is not None:
        yield "text only (VTW)", fields, costs.ratio(fields), lambda fields=fields: routed(fields)


def best_plan(folder: Path, costs: ShortCosts, budget: float) -> Fields | None:
    """Of the plans that the finder tried, the one nearest to vanilla within a budget."""
    path = Path(folder) / "plans.json"
    tried = json.loads(path.read_text(encoding="utf-8"))["frontier"] if path.exists() else []
    for point in sorted(tried, key=lambda point: point["kl"]):
        fields = {"split_layer": point["split_layer"], "fusion_layers": point["fusion_layers"]}
        fields = {"routing": "late_fusion", **fields}
        if fields["fusion_layers"] and costs.ratio(fields) <= budget:
            return fields
    return None


def units(items: list[Item], replies: list[list[Reply]]) -> Units:
    scores: Units = {}
    for item, several in zip(items, replies, strict=True):
        scores.setdefault(item.task, []).append(unit_score(item, [reply.text for reply in several]))
    return scores


def row_of(
    name: str,
    cost: float,
    beside: str | None,
    what: Fields,
    items: list[Item],
    replies: list[list[Reply]],
    vanilla: list[list[Reply]],
) -> dict[str, Any]:
    """Scores of a model, and how it differs from vanilla on the same questions."""
    own, base = units(items, replies), units(items, vanilla)
    texts, wanted = ([reply.text for several in each for reply in several] for each in (replies, vanilla))
    tasks = {task: sum(scores) / len(scores) for task, scores in own.items()}
    return {
        "name": name,
        "beside": beside,
        "what": what,
        "prefill_flops": cost,
        "tasks": tasks,
        "mean": sum(tasks.values()) / len(tasks),
        "minus_vanilla": list(paired_difference(own, base)),
        "equal": sum(map(str.__eq__, texts, wanted)) / len(texts),
        "units": own,
    }


def table(document: dict[str, Any]) -> list[str]:
    head = f"{'':<18}{'prefill FLOPs':>14}{'mean':>8}{'minus vanilla (95%)':>26}{'equal':>8}"
    lines = [f"{head}{'latent minus it (95%)':>26}"]
    for row in document["rows"]:
        rest = points(row["latent_minus_this"]) if "latent_minus_this" in row else ""
        difference = points(row["minus_vanilla"]) if row["name"] != "vanilla" else ""
        lines.append(
            f"{row['name']:<18}{row['prefill_flops']:>14.3f}{row['mean']:>8.1%}{difference:>26}{row['equal']:>8.1%}"
            f"{rest:>26}"
        )
    asked = f"{document['limit']} {document['split']} questions of each task"
    return [*lines, f"{asked}; 'equal' is the share of replies that are vanilla's."]


def points(interval: list[float]) -> str:
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"
