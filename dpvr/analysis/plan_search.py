"""Which deep layers must read the image: a search over layer plans on the model as it is, nothing trained.

    prompts with their answers          as saturation.py measures them; every pass reads them anew
        |
    alone        each split, each deep layer: reading switched on alone, and off alone
        |
    build-up     each split: the layer that lowers the KL most joins, until the budget of readings is full
        |
    frontier     every step of every split, with late fusion and the text alone, on prompts that were not searched

A plan's effect is that of an untrained DPVR model, whose side branch is a copy of the layer at the split: the mean KL
of the answers to vanilla's, and the share of answers that change. Paper section 3.1 asks where attention to the image
fades; here the image leaves early and is read where reading matters, which need not be the last layer. The candidates
of a pass share the layers below their splits.

Axes: B batch, T tokens, D width, L layers.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from adapter_dpvr import FIELDS
from dpvr.analysis.saturation import ProbeBatch
from dpvr.data.prompts import Batch


class Plan(NamedTuple):
    """Where the image leaves the shared stack, and the deep layers that read it from the side branch."""

    split_layer: int
    fusion_layers: tuple[int, ...]


class Effect(NamedTuple):
    """Means over prompts: KL of the answer's distribution to vanilla's in nats, and whether the answer changes."""

    kl: float
    changed: float


class Alone(NamedTuple):
    """What one layer's reading does at a split: it alone, and all deep layers but it."""

    on: Effect
    off: Effect


@torch.no_grad()
def effects(
    model: LlavaForConditionalGeneration, batches: Iterable[Batch], plans: list[Plan], description: str
) -> dict[Plan, Effect]:
    """The effect of each plan on the prompts of all batches, in one pass over them.

    Args:
        model: a LLaVA, or a DPVR model, whose base is taken.
        batches: what `saturation.measure` takes; at least one.
        plans: in any order; none twice.
    """
    totals, count = {plan: [0.0, 0] for plan in plans}, 0
    for inputs, labels in tqdm(batches, desc=description, unit="batch"):
        this = ProbeBatch(model, inputs, labels)
        expected, hidden = this.answers_in(this.vanilla()), this.embeds
        count += len(labels)
        for split in range(len(this.decoder.layers)):
            readings = [plan.fusion_layers for plan in plans if plan.split_layer == split]
            for reading, states in this.withdraw(hidden, split, readings, with_side_layer=True):
                distance, changed = this.compare(expected, this.answers_in(states))
                totals[Plan(split, reading)][0] += sum(distance)
                totals[Plan(split, reading)][1] += sum(changed)
            hidden = this.joint(split, hidden)
    if count == 0:
        raise ValueError("Expected prompts with a picture to measure plans on; got none. Remedy: other rows, or more.")
    return {plan: Effect(kl / count, changed / count) for plan, (kl, changed) in totals.items()}


def alone(
    model: LlavaForConditionalGeneration, batches: Callable[[], Iterable[Batch]], splits: Iterable[int]
) -> dict[int, dict[int, Alone]]:
    """For each split and each deep layer, the effect of its reading alone and of its missing among all deep layers."""
    depth = model.config.text_config.num_hidden_layers
    deep = {split: tuple(range(split, depth)) for split in splits}
    on = {(split, layer): Plan(split, (layer,)) for split in deep for layer in deep[split]}
    off = {(split, layer): Plan(split, tuple(x for x in deep[split] if x != layer)) for split, layer in on}
    found = effects(model, batches(), list(dict.fromkeys([*on.values(), *off.values()])), "Each reading alone")
    return {
        split: {layer: Alone(found[on[split, layer]], found[off[split, layer]]) for layer in deep[split]}
        for split in deep
    }


def build_up(
    model: LlavaForConditionalGeneration,
    batches: Callable[[], Iterable[Batch]],
    most: dict[int, int],
    readings: dict[int, dict[int, Alone]],
) -> dict[Plan, Effect]:
    """Greedily add to each split the layer whose reading lowers the KL most; all plans on the way.

    Args:
        batches: called once for every pass.
        most: per split, how many layers may read.
        readings: what `alone` found for these splits.
    """
    depth = model.config.text_config.num_hidden_layers
    path: dict[Plan, Effect] = {}
    newest = {split: Plan(split, ()) for split in most}
    for turn in range(max(most.values())):
        candidates = {
            split: [
                Plan(split, tuple(sorted((*plan.fusion_layers, layer))))
                for layer in range(split, depth)
                if layer not in plan.fusion_layers
            ]
            for split, plan in newest.items()
            if turn < most[split]
        }
        if turn == 0:
            found = {
                plan: readings[plan.split_layer][plan.fusion_layers[0]].on for c in candidates.values() for plan in c
            }
        else:
            found = effects(
                model, batches(), [plan for c in candidates.values() for plan in c], f"{turn + 1} readings"
            )
        for split, plans in candidates.items():
            newest[split] = min(plans, key=lambda plan: found[plan].kl)
            path[newest[split]] = found[newest[split]]
    return path


def causal_split(model: LlavaForConditionalGeneration, batches: Iterable[Batch], tolerance: float) -> int:
    """The shallowest split at which withdrawing the image changes at most `tolerance` of the answers.

    Raises:
        ValueError: if no split is as good as that.
    """
    depth = model.config.text_config.num_hidden_layers
    found = effects(model, batches, [Plan(split, ()) for split in range(1, depth)], "Withdrawing the image")
    for plan, effect in found.items():
        if effect.changed <= tolerance:
            return plan.split_layer
    best = min(effect.changed for effect in found.values())
    raise ValueError(
        f"Expected a split at which withdrawing the image changes at most {tolerance:.0%} of the answers; got "
        f"{best:.1%} at the best. Remedy: --split_layer with a number; probe_saturation.py shows the curve."
    )


def write_plan(plan: Plan, path: Path, comment: str) -> None:
    """Write a plan as `train_sft.py --plan` and `read_plan` take it."""
    fields = {"routing": "late_fusion", "split_layer": plan.split_layer, "fusion_layers": list(plan.fusion_layers)}
    path.write_text(f"# {comment}\n{yaml.safe_dump(fields, sort_keys=False)}", encoding="utf-8")


def read_plan(path: str | Path) -> dict[str, Any]:
    """The DPVR fields in a plan file, which a person may have written.

    Raises:
        ValueError: if there is no such file, or it holds anything else.
    """
    found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    if not isinstance(found, dict) or not set(found) <= set(FIELDS):
        raise ValueError(
            f"Expected a file of {FIELDS} as YAML; got {found!r} in {str(path)!r}. Remedy: one that "
            "probe_saturation.py --find_plan has written."
        )
    return found
