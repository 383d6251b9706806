"""Which deep layers must read the image: a search over layer plans on the model as it is, without training.

    prompts with their answers     measured as in saturation.py; every pass encodes them anew
        |
    ablation                       each split, each deep layer: it alone reads the image, and all but it do
        |
    greedy search                  each split: the layer that lowers the KL most joins, within the budget
        |
    frontier                       every step of every split, late fusion and text only, on held-out prompts

A plan's effect is that of an untrained DPVR model, whose side branch is a copy of the layer at the split: the mean KL
of the answers to vanilla's, and the share of answers that change. Paper section 3.1 asks at which depth attention to
the image fades; here the image leaves early and is read by the layers that need it, which may not be the last one. The
candidates of a pass share the computation of the layers below their splits.

Axes: B batch, T tokens, D width, L layers.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from configuration_dpvr import METHOD_FIELDS
from decoders_dpvr import lowest_split, recurrent_layers
from dpvr.analysis.saturation import ProbeBatch
from dpvr.command_line import read_fields
from dpvr.data.prompts import Batch

TOLERANCE = 0.05  # share of answers that the recommended split may change


class Plan(NamedTuple):
    """Where the image leaves the shared stack, and the deep layers that read it from the side branch."""

    split_layer: int
    fusion_layers: tuple[int, ...]


class Effect(NamedTuple):
    """Means over prompts: KL of the answer's distribution to vanilla's in nats, and whether the answer changes."""

    kl: float
    changed: float


class Ablation(NamedTuple):
    """Effects of one deep layer at a split: it alone reads the image, and all deep layers but it read the image."""

    on: Effect
    off: Effect


def splits(config: PretrainedConfig) -> range:
    """The splits that a vision-language model's decoder allows and that leave it a layer to read the image in."""
    return range(lowest_split(config), 1 + max(readers(config, 1)))


def readers(config: PretrainedConfig, split_layer: int) -> tuple[int, ...]:
    """The layers from a split on that may read the image: those of attention."""
    text = config.get_text_config()
    recurrent = recurrent_layers(text)
    return tuple(layer for layer in range(split_layer, text.num_hidden_layers) if layer not in recurrent)


@torch.no_grad()
def effects(
    model: PreTrainedModel, batches: Iterable[Batch], plans: list[Plan], description: str
) -> dict[Plan, Effect]:
    """The effect of each plan on the prompts of all batches, in one pass over them.

    Args:
        model: a vision-language model, or a DPVR model, of which the base is measured.
        batches: as `saturation.measure` takes them; at least one.
        plans: in any order, without duplicates.

    Raises:
        ValueError: if there is no batch.
    """
    totals, count = {plan: [0.0, 0] for plan in plans}, 0
    for inputs, labels in tqdm(batches, desc=description, unit="batch"):
        batch = ProbeBatch(model, inputs, labels)
        expected, hidden = batch.answers_in(batch.vanilla()), batch.embeds
        count += len(labels)
        for split in range(len(batch.decoder.layers)):
            choices = [plan.fusion_layers for plan in plans if plan.split_layer == split]
            for fusion_layers, states in batch.remove_image(hidden, split, choices, with_side_layer=True):
                distance, changed = batch.compare(expected, batch.answers_in(states))
                totals[Plan(split, fusion_layers)][0] += sum(distance)
                totals[Plan(split, fusion_layers)][1] += sum(changed)
            hidden = batch.joint(split, hidden)
    if count == 0:
        raise ValueError("No prompt has a picture, so no plan can be measured: give rows with pictures.")
    return {plan: Effect(kl / count, changed / count) for plan, (kl, changed) in totals.items()}


def ablate(
    model: PreTrainedModel, batches: Callable[[], Iterable[Batch]], splits: Iterable[int]
) -> dict[int, dict[int, Ablation]]:
    """For each split and each deep layer, the effects of this layer alone reading the image, and of all but it."""
    deep = {split: readers(model.config, split) for split in splits}
    on = {(split, layer): Plan(split, (layer,)) for split in deep for layer in deep[split]}
    off = {(split, layer): Plan(split, tuple(x for x in deep[split] if x != layer)) for split, layer in on}
    found = effects(model, batches(), list(dict.fromkeys([*on.values(), *off.values()])), "Ablation of single layers")
    return {
        split: {layer: Ablation(found[on[split, layer]], found[off[split, layer]]) for layer in deep[split]}
        for split in deep
    }


def greedy_search(
    model: PreTrainedModel,
    batches: Callable[[], Iterable[Batch]],
    most: dict[int, int],
    ablations: dict[int, dict[int, Ablation]],
) -> dict[Plan, Effect]:
    """Add to each split, one by one, the fusion layer that lowers the KL most; all plans on the way.

    Args:
        batches: called once for every pass.
        most: per split, how many layers may read the image.
        ablations: what `ablate` found for these splits; the first step needs no pass.
    """
    path: dict[Plan, Effect] = {}
    newest = {split: Plan(split, ()) for split in most}
    for turn in range(max(most.values())):
        candidates = {
            split: _extended(plan, readers(model.config, split))
            for split, plan in newest.items()
            if turn < most[split]
        }
        plans = [plan for several in candidates.values() for plan in several]
        if turn == 0:
            found = {plan: ablations[plan.split_layer][plan.fusion_layers[0]].on for plan in plans}
        else:
            found = effects(model, batches(), plans, f"Plans of {turn + 1} fusion layers")
        for split, several in candidates.items():
            newest[split] = min(several, key=lambda plan: found[plan].kl)
            path[newest[split]] = found[newest[split]]
    return path


def _extended(plan: Plan, deep: tuple[int, ...]) -> list[Plan]:
    """The plans with one more fusion layer among these."""
    missing = [layer for layer in deep if layer not in plan.fusion_layers]
    return [plan._replace(fusion_layers=tuple(sorted((*plan.fusion_layers, layer)))) for layer in missing]


def causal_split(model: PreTrainedModel, batches: Iterable[Batch], tolerance: float) -> int:
    """The shallowest split at which image removal changes at most `tolerance` of the answers.

    Raises:
        ValueError: if every split changes more.
    """
    found = effects(model, batches, [Plan(split, ()) for split in splits(model.config)], "Image removal")
    for plan, effect in found.items():
        if effect.changed <= tolerance:
            return plan.split_layer
    best = min(effect.changed for effect in found.values())
    raise ValueError(
        f"At every split image removal changes more than {tolerance:.0%} of the answers, {best:.1%} at the best one: "
        "set --split_layer to a number (dpvr.analysis.probe shows the curve)."
    )


def write_plan(plan: Plan, path: Path, comment: str) -> None:
    """Write a plan file, which `train_sft.py --plan` and `read_plan` take."""
    fields = {"routing": "late_fusion", "split_layer": plan.split_layer, "fusion_layers": list(plan.fusion_layers)}
    path.write_text(f"# {comment}\n{yaml.safe_dump(fields, sort_keys=False)}", encoding="utf-8")


def read_plan(path: str | Path) -> dict[str, Any]:
    """The DPVR fields in a plan file, which a person may have written.

    Raises:
        ValueError: if there is no such file, or it holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no plan file {str(path)!r}: dpvr.analysis.probe --find_plan writes one.")
    found = read_fields(path)
    if not set(found) <= set(METHOD_FIELDS):
        raise ValueError(
            f"The plan file {str(path)!r} holds {found!r}, and a plan is YAML with the fields "
            f"{', '.join(METHOD_FIELDS)}: use a file that dpvr.analysis.probe --find_plan wrote."
        )
    return found
