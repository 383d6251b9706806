"""The rows of `python -m dpvr.costs`: each plan on a model without weights."""

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from configuration_dpvr import DpvrLlavaConfig, make_plan
from costs_dpvr import Branch, DecoderCosts, kv_numbers, prefill_flops
from decoders_dpvr import check_decoder, decoder_of, recurrent_layers
from latent_dpvr import Latent
from side_branch_dpvr import make_side_branch

EARLY = 8  # an early split comes after this part of the depth
VANILLA, TEXT_ONLY = "vanilla", "text_only"


class Model(NamedTuple):
    """A model without weights, and the costs of its decoder."""

    config: PretrainedConfig
    decoder: nn.Module
    num_parameters: int
    costs: DecoderCosts


def load_config(name: str, revision: str = "main") -> PretrainedConfig:
    """The config of a vision-language model, by a class that is installed here.

    Args:
        name: a name on the Hub, a folder, or the path of a config.json.

    Raises:
        ValueError: if transformers has no such model, or it has no images.
        OSError: if there is no config.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise OSError(f"No config of {name!r}: {error}") from error
    kind = values.get("model_type")
    if kind == DpvrLlavaConfig.model_type:  # its base is a LLaVA
        kind = "llava"
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{name!r} holds a model of type {kind!r}, which this release of transformers does not have, and code in "
            "a repository is not run: name a vision-language model of transformers, or install a newer release."
        )
    config = CONFIG_MAPPING[kind].from_dict({name: value for name, value in values.items() if name != "auto_map"})
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{name!r} holds a model of type {kind!r}, which answers no questions about images: name a "
            "vision-language model, such as llava-hf/llava-1.5-7b-hf."
        )
    return config


def make_model(config: PretrainedConfig) -> Model:
    """A model without weights.

    Raises:
        ValueError: if no layer plan can run on its decoder.
    """
    depth = config.get_text_config().num_hidden_layers
    check_decoder(config, depth - 1)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    _, decoder = decoder_of(model.model)
    return Model(config, decoder, model.num_parameters(), DecoderCosts.of(config.get_text_config()))


def plans(depth: int, split_layer: int, latent_rank: int | None) -> dict[str, dict[str, Any]]:
    """Fields of `make_plan` by the plans' names."""
    found = {
        VANILLA: {"routing": "none"},
        f"late_fusion at {split_layer}": {"routing": "late_fusion", "split_layer": split_layer},
        f"kv_substitution at {split_layer}": {"routing": "kv_substitution", "split_layer": split_layer},
    }
    if latent_rank is not None:
        latent = {"routing": "latent", "split_layer": split_layer, "latent_rank": latent_rank}
        found[f"latent of rank {latent_rank} at {split_layer}"] = latent
    found[f"{TEXT_ONLY} at {split_layer}"] = {"routing": TEXT_ONLY, "split_layer": split_layer, "num_side_layers": 0}
    early = max(1, round(depth / EARLY))  # the same entry as above if the split is there
    found[f"kv_substitution at {early}"] = {"routing": "kv_substitution", "split_layer": early}
    return found


def row(model: Model, fields: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """What a plan costs.

    Raises:
        ValueError: if the decoder cannot run it.
    """
    text = model.config.get_text_config()
    plan = make_plan(text.num_hidden_layers, **fields, recurrent=recurrent_layers(text))
    side_branch, branch = nn.ModuleList(), Branch(0)
    if not plan.is_vanilla:
        check_decoder(model.config, plan.split_layer)
    with torch.device("meta"):
        if plan.latent_stride:
            branch = Branch(0, fields["latent_rank"])
            side_branch = Latent(model.decoder, plan, branch.latent_rank, 0)
        elif plan.reads_side_branch:
            branch = Branch(1)
            side_branch = make_side_branch(model.decoder, plan.split_layer, 1)
    size = args.image_tokens, args.text_tokens
    numbers = kv_numbers(model.costs, plan, *size, branch=branch)
    return {
        "plan": str(plan),
        "prefill_flops": prefill_flops(model.costs, plan, *size, branch=branch, short_vanilla=args.short_vanilla),
        "kv_bytes": numbers * getattr(torch, args.dtype).itemsize,
        "trained_parameters": sum(weight.numel() for weight in side_branch.parameters()),
    }


def count(args: Namespace) -> dict[str, Any]:
    """The document: a row per plan with shares of vanilla's, the plans left out, and the one for the budget.

    Raises:
        ValueError: if no plan can run on the model.
    """
    model = make_model(load_config(args.model, args.revision))
    rows, left_out = [], {}
    for name, fields in plans(
        model.config.get_text_config().num_hidden_layers, args.split_layer, args.latent_rank
    ).items():
        try:
            rows.append({"name": name, **row(model, fields, args)})
        except ValueError as error:  # its reason is shown
            left_out[name] = str(error)
    for each in rows:
        for what in ("prefill_flops", "kv_bytes"):
            each[f"{what}_ratio"] = each[what] / rows[0][what]
    document = {
        "model": args.model,
        "parameters": model.num_parameters,
        "image_tokens": args.image_tokens,
        "text_tokens": args.text_tokens,
        "rows": rows,
        "left_out": left_out,
    }
    return (
        document
        if args.budget is None
        else document | {"budget": args.budget, "cheapest": cheapest(rows, args.budget)}
    )


def cheapest(rows: list[dict[str, Any]], budget: float) -> str | None:
    """The name of the cheapest plan that reads the image after the split, or is vanilla, within a share of FLOPs."""
    fitting = [
        each for each in rows if each["prefill_flops_ratio"] <= budget and not each["name"].startswith(TEXT_ONLY)
    ]
    return min(fitting, key=lambda each: each["prefill_flops"])["name"] if fitting else None


def table(document: dict[str, Any]) -> str:
    """The document for a reader."""
    lines = [
        f"{document['model']}: {document['parameters'] / 1e6:,.0f} M parameters, "
        f"{document['image_tokens']} image and {document['text_tokens']} text tokens",
        f"{'plan':<34}{'GFLOPs':>10}{'share':>8}{'K/V MiB':>10}{'share':>8}{'trained M':>11}",
    ]
    for each in document["rows"]:
        flops = f"{each['prefill_flops'] / 1e9:>10,.0f}{each['prefill_flops_ratio']:>8.3f}"
        cache = f"{each['kv_bytes'] / 2**20:>10,.1f}{each['kv_bytes_ratio']:>8.3f}"
        lines.append(f"{each['name']:<34}{flops}{cache}{each['trained_parameters'] / 1e6:>11,.1f}")
    lines += [f"Left out, {name}: {reason}" for name, reason in document["left_out"].items()]
    if "budget" in document:
        found = document["cheapest"]
        none = "no plan that reads the image: split earlier, or give a --latent_rank"
        lines.append(f"Within {document['budget']:g} of vanilla's FLOPs: {found or none}")
    return "\n".join(lines)
