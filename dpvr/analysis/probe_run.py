"""A probe run: samples, curves, advice on where to split, and with --find_plan a search for layer plans.

probe_samples.collect --> curves.summarise --> saturation.json, figure, table, advice
                                                   |
                          plan_report.find_plans --> plans.json, figure, plan files
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from decoders_dpvr import check_decoder, lowest_split, owner_of
from dpvr.analysis.costs import PromptCosts
from dpvr.analysis.curves import PAPERS_MARGIN, draw, layer_table, summarise, summarise_routed
from dpvr.analysis.plan_report import draw_frontier, find_plans, share, table, write_plans
from dpvr.analysis.plan_search import TOLERANCE, Plan, readers, splits
from dpvr.analysis.probe_samples import (
    MINIBENCH,
    collect,
    is_routed,
    load_lens,
    load_rows,
    read_samples,
    settings_of,
)
from dpvr.data.prompts import AnsweredPrompts, Batch, in_batches
from dpvr.data.templates import check_template
from dpvr.models import load_model
from dpvr.record import publish, run_record, without_folders
from processors_dpvr import load_processor


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and print everything; the document of saturation.json."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    options = {"dtype": getattr(torch, args.dtype), "attn_implementation": "sdpa"}
    model = load_model(args.model, trust_remote_code=args.trust_remote_code, **options).eval().to(args.device)
    owner_of(model)
    check_decoder(model.config, lowest_split(model.config))
    processor, rows = load_processor(args.model), load_rows(args)
    check_template(processor)
    settings = settings_of(args, model)
    read_samples(args.output_dir / "samples.jsonl", settings)  # refuses another run's samples before any work
    prompts = AnsweredPrompts(processor, rows, args.num_samples, skip=0 if args.data == MINIBENCH else args.tuned_lens)
    samples = collect(args, model, load_lens(args, model, processor, rows, settings), prompts, settings)
    found = {"num_samples": len(samples), "rows_without_pictures": prompts.without_picture}
    found |= summarise(samples, TOLERANCE, splits(model.config))
    costs = PromptCosts(model.config.get_text_config(), round(found["image_tokens"]), round(found["text_tokens"]))
    advised = advice(costs, found, readers(model.config, 1)[-1])
    if is_routed(model):
        fields = {"routing": model.config.routing, "split_layer": model.config.split_layer}
        found["routed"] = {**fields, **summarise_routed([sample["routed"] for sample in samples])}
        advised += advice_routed(found["routed"])
    said = {"model": without_folders(args.model), "data": without_folders(args.data)}
    said |= {name: vars(args)[name] for name in ("batch_size", "seed", "dtype", "tuned_lens")}
    document = {**run_record("-m dpvr.analysis.probe"), **said, "advice": advised, **found}
    draw(found, args.output_dir)
    publish(document, args.output_dir / "saturation.json")
    print("\n".join([layer_table(found), *advised]))
    if args.find_plan:
        search_plans(args, model, prompts, costs)
    publish(document, None, args.json)
    return document


def advice(costs: PromptCosts, found: dict[str, Any], last: int) -> list[str]:
    """Where to split, by which rule, and at what cost if only layer `last` reads the image."""

    def flops(split: int) -> str:
        return f"{share(costs, Plan(split, (last,))):.3f} of vanilla's prefill FLOPs"

    lines = [
        f"Image tokens reach the prediction space after layer {found['transition']['image']}, text tokens after layer "
        f"{found['transition']['text']} (logit lens: the KL falls below half of its maximum).",
        f"The paper's rule, {PAPERS_MARGIN} layers earlier: --split_layer {found['papers_split']}, "
        f"{flops(found['papers_split'])}.",
    ]
    if found["recommended_split"] is None:
        lines.append(
            f"The causal rule: at every split, image removal changes over {found['tolerance']:.0%} of the answers; "
            "more samples or a trained side branch may give another result."
        )
    else:
        split = found["recommended_split"]
        changed = found["withdrawal"]["text_only"]["changed"][split - 1]
        lines.append(
            f"The causal rule, image removal changes at most {found['tolerance']:.0%} of the answers: --split_layer "
            f"{split}, which changes {changed:.1%}; {flops(split)}."
        )
    return lines


def advice_routed(found: dict[str, Any]) -> list[str]:
    """Whether the shared layers compute what the base's do, and how much the last layer attends to the image."""
    smallest = {kind: min(cosine) for kind, cosine in found["shared_cosine"].items()}
    sameness = "bit-identical to" if found["identical"] else "not bit-identical to"
    ratio = found["last_layer_ratio"]
    return [
        f"Shared layers: {sameness} vanilla's; smallest cosine {smallest['image']:.6f} of an image token, "
        f"{smallest['text']:.6f} of a text token.",
        f"Text-to-image attention in the last layer: {found['attention_mass']['median'][-1]:.3f} under "
        f"{found['routing']}, {found['vanilla_mass']['median'][-1]:.3f} in vanilla; ratio {ratio['median']:.2f} "
        f"({ratio['q25']:.2f} to {ratio['q75']:.2f}).",
    ]


def search_plans(
    args: argparse.Namespace, model: PreTrainedModel, prompts: AnsweredPrompts, costs: PromptCosts
) -> None:
    """Search for the plans of --find_plan on every other prompt, measure them on the others, and write them."""

    def batches(first: int) -> Iterator[Batch]:
        return in_batches(islice(prompts, first, args.plan_samples, 2), args.batch_size, args.device)

    found = find_plans(model, partial(batches, 0), partial(batches, 1), args.find_plan, costs)
    plan_samples = {"plan_samples": min(args.plan_samples, args.num_samples)}
    document = {**run_record("-m dpvr.analysis.probe"), **plan_samples, **found}
    publish(document, args.output_dir / "plans.json")
    draw_frontier(document, args.output_dir)
    print(f"{table(found)}\n\nTo train a plan:")
    for path in write_plans(document, args.output_dir):
        print(f"python train_sft.py --plan {path}")
