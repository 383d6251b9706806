"""Find out after which layer a LLaVA no longer needs its image tokens (paper section 3.1, Figure 2; saturation.py).

rows of pictures and conversations      the first question of each and its answer, in batches
    |
OUTPUT_DIR/samples.jsonl                a line per sample; a run that was stopped goes on behind the last one
    |
OUTPUT_DIR/saturation.json, .png, .svg  medians and quartiles by layer, transitions, two recommended splits
    |
OUTPUT_DIR/plans.json, plan_0.45.yaml   with --find_plan 0.45: the layers that must read the image, within that share
plan_frontier.png, .svg                 of vanilla's prefill FLOPs (plan_search.py)

A DPVR model is measured as the vanilla LLaVA that it is made of, and then its own graph beside it.

python -m dpvr.analysis.probe                                           # dpvr-mini on MiniBench
python -m dpvr.analysis.probe --find_plan 0.45 0.35                     # and which layers must read
python -m dpvr.analysis.probe --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --image_folder images
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from dpvr.analysis.costs import PromptCosts
from dpvr.analysis.curves import PAPERS_MARGIN, draw, summarise, summarise_routed
from dpvr.analysis.plan_report import draw_frontier, find_plans, share, table, write_plans
from dpvr.analysis.plan_search import Plan
from dpvr.analysis.saturation import measure, measure_routed
from dpvr.analysis.tuned_lens import TunedLens
from dpvr.data.conversations import Row, load_conversations
from dpvr.data.prompts import IGNORED_LABEL, AnsweredPrompts, Batch, in_batches
from dpvr.record import publish, run_record, without_folders
from loading_dpvr import load_processor
from minibench.data import to_hf_dataset

MINIBENCH = "minibench"


def load_rows(args: argparse.Namespace, split: str = "validation") -> Iterable[Row]:
    if args.data == MINIBENCH:
        count = args.num_samples if split == "validation" else args.tuned_lens
        return to_hf_dataset(split, count, questions_per_row=1, seed=args.seed)
    options = {"split": args.data_split, "image_folder": args.image_folder, "skip_bad_rows": args.skip_bad_rows}
    return load_conversations(args.data, streaming=True, **options).rows


def load_model(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    dtype = getattr(torch, args.dtype)
    options = {"trust_remote_code": True, "dtype": dtype, "attn_implementation": "sdpa"}
    return AutoModelForImageTextToText.from_pretrained(args.model, **options).eval().to(args.device)


def load_lens(
    args: argparse.Namespace,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Iterable[Row],
    settings: dict[str, str],
) -> TunedLens | None:
    """The tuned lens in `output_dir`, or one trained on prompts that are not measured; None if it is not asked for.

    Raises:
        ValueError: if there are fewer prompts than it is to be trained on.
    """
    if not args.tuned_lens:
        return None
    path = args.output_dir / "tuned_lens.safetensors"
    if (lens := TunedLens.load(path, settings, args.device)) is not None:
        return lens
    rows = load_rows(args, "train") if args.data == MINIBENCH else rows
    prompts = in_batches(AnsweredPrompts(processor, rows, args.tuned_lens), args.batch_size, args.device)
    lens = TunedLens.fit(model, prompts, math.ceil(args.tuned_lens / args.batch_size))
    lens.save(path, settings)
    return lens


def is_routed(model: LlavaForConditionalGeneration) -> bool:
    """Whether this is a DPVR model whose routing splits the graph."""
    return model.config.model_type == "dpvr_llava" and not model.config.layer_plan().is_vanilla


def measure_batch(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], labels: torch.Tensor, lens: TunedLens | None
) -> Iterator[dict[str, Any]]:
    """What is kept of each sample."""
    image = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    pictures = iter(inputs["pixel_values"])
    per_picture = int(image.sum()) // len(inputs["pixel_values"])
    for row, sample in enumerate(measure(model, inputs, labels, lens=lens)):
        whole = inputs["attention_mask"][row].bool()
        own = torch.stack(list(islice(pictures, int(image[row]) // per_picture)))
        answer = int((labels[row] != IGNORED_LABEL).sum())
        tokens = {"image_tokens": int(image[row]), "text_tokens": int(whole.sum() - image[row]) - answer}  # to prefill
        found = {**tokens, **asdict(sample)}
        if is_routed(model):
            ids = inputs["input_ids"][row, whole][None]
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": own}
            found["routed"] = asdict(measure_routed(model, prompt))
        yield found


def settings_of(args: argparse.Namespace, model: LlavaForConditionalGeneration) -> dict[str, str]:
    """What samples depend on: a run with others does not go on with them."""
    names = ("model", "data", "data_split", "image_folder", "skip_bad_rows", "seed", "dtype", "tuned_lens")
    weights = sum(weight.double().abs().sum().item() for weight in model.parameters())
    plan = str(model.config.layer_plan()) if model.config.model_type == "dpvr_llava" else "vanilla"
    return {**{name: str(vars(args)[name]) for name in names}, "plan": plan, "weights": f"{weights:.9g}"}


def collect(
    args: argparse.Namespace,
    model: LlavaForConditionalGeneration,
    lens: TunedLens | None,
    prompts: AnsweredPrompts,
    settings: dict[str, str],
) -> list[dict[str, Any]]:
    """Measure what is not yet in samples.jsonl; all samples."""
    path = args.output_dir / "samples.jsonl"
    samples = read_samples(path, settings)
    with path.open("a", encoding="utf-8") as file, tqdm(total=args.num_samples, initial=len(samples)) as progress:
        if not samples:
            file.truncate(0)
            file.write(json.dumps(settings) + "\n")
        rest = islice(prompts, len(samples), None)
        for inputs, labels in in_batches(rest, args.batch_size, args.device):
            found = list(measure_batch(model, inputs, labels, lens))
            file.writelines(json.dumps(sample) + "\n" for sample in found)
            file.flush()
            samples += found
            progress.update(len(found))
    if not samples:
        raise ValueError(f"Expected rows with pictures in {args.data!r}; got none. Remedy: other --data.")
    return samples[: args.num_samples]


def read_samples(path: Path, settings: dict[str, str]) -> list[dict[str, Any]]:
    """What an earlier run of the same settings has measured; a last line that was cut off is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if len(lines) < 2:
        return []
    whole = lines[:-1]
    if (found := json.loads(whole[0])) != settings:
        raise ValueError(
            f"Expected samples of {settings} in {path}; got those of {found}. Remedy: another --output_dir."
        )
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")  # without a line that was cut off
    return [json.loads(line) for line in whole[1:]]


def advice(costs: PromptCosts, found: dict[str, Any]) -> list[str]:
    """What to split at, by which rule, and what it costs."""
    depth = len(found["attention_mass"]["median"])

    def flops(split: int) -> str:
        return f"{share(costs, Plan(split, (depth - 1,))):.3f} of vanilla's prefill FLOPs"

    lines = [
        f"Image tokens reach the prediction space after layer {found['transition']['image']}, text tokens after layer "
        f"{found['transition']['text']} (logit lens, half of the farthest KL).",
        f"The paper's rule, {PAPERS_MARGIN} layers before: --split_layer {found['papers_split']}, "
        f"{flops(found['papers_split'])}.",
    ]
    if found["recommended_split"] is None:
        lines.append(
            f"The causal rule: no split changes at most {found['tolerance']:.0%} of the answers when the image is "
            "withdrawn; a trained side branch, or more samples, may tell otherwise."
        )
    else:
        split = found["recommended_split"]
        changed = found["withdrawal"]["text_only"]["changed"][split - 1]
        lines.append(
            f"The causal rule, at most {found['tolerance']:.0%} of the answers changed: --split_layer {split}, which "
            f"changes {changed:.1%}; {flops(split)}."
        )
    return lines


def advice_routed(found: dict[str, Any]) -> list[str]:
    """Whether the shared layers are the base's, and how much the last layer reads."""
    smallest = {kind: min(cosine) for kind, cosine in found["shared_cosine"].items()}
    sameness = "to the bit" if found["identical"] else "not to the bit"
    ratio = found["last_layer_ratio"]
    return [
        f"Shared layers against vanilla: the same {sameness}; smallest cosine {smallest['image']:.6f} of an image "
        f"token, {smallest['text']:.6f} of a text token.",
        f"Text-to-image attention in the last layer: {found['attention_mass']['median'][-1]:.3f} under "
        f"{found['routing']}, {found['vanilla_mass']['median'][-1]:.3f} in vanilla, {ratio['median']:.2f} times "
        f"({ratio['q25']:.2f} to {ratio['q75']:.2f}).",
    ]


def search_plans(
    args: argparse.Namespace, model: LlavaForConditionalGeneration, prompts: AnsweredPrompts, costs: PromptCosts
) -> None:
    """Write what --find_plan asks for: every other prompt is searched, the rest tell what the plans are worth."""

    def batches(first: int) -> Iterator[Batch]:
        return in_batches(islice(prompts, first, args.plan_samples, 2), args.batch_size, args.device)

    found = find_plans(model, partial(batches, 0), partial(batches, 1), args.find_plan, costs)
    print(table(found))
    document = {
        **run_record("-m dpvr.analysis.probe"),
        "plan_samples": min(args.plan_samples, args.num_samples),
        **found,
    }
    write(document, args.output_dir / "plans.json")
    draw_frontier(document, args.output_dir)
    for path in write_plans(document, args.output_dir):
        print(f"python train_sft.py --plan {path}")


def write(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find where image tokens saturate in a LLaVA, and where to split it.")
    parser.add_argument("--model", default=".", help="any LLaVA or DPVR repository (id or path)")
    parser.add_argument("--data", default=MINIBENCH, help="minibench, or what train_sft.py --data reads")
    parser.add_argument("--data_split", default="train", help="of a data set from the Hub or a folder")
    parser.add_argument("--image_folder", help="what the names in LLaVA's JSON stand in")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and report them")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share of answers that may change")
    parser.add_argument("--tuned_lens", type=int, default=0, help="other prompts to train a tuned lens on; 0: none")
    parser.add_argument(
        "--find_plan", type=float, nargs="+", metavar="BUDGET", help="shares of vanilla's prefill FLOPs"
    )
    parser.add_argument("--plan_samples", type=int, default=128, help="prompts for --find_plan, half of them searched")
    parser.add_argument("--output_dir", type=Path, default=Path("results/saturation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, processor, rows = load_model(args), load_processor(args.model), load_rows(args)
    settings = settings_of(args, model)
    read_samples(args.output_dir / "samples.jsonl", settings)  # refuses those of another run before any work
    prompts = AnsweredPrompts(processor, rows, args.num_samples, skip=0 if args.data == MINIBENCH else args.tuned_lens)
    samples = collect(args, model, load_lens(args, model, processor, rows, settings), prompts, settings)
    found = {"num_samples": len(samples), "rows_without_pictures": prompts.without_picture}
    found |= summarise(samples, args.tolerance)
    costs = PromptCosts(model.config.text_config, round(found["image_tokens"]), round(found["text_tokens"]))
    advised = advice(costs, found)
    if is_routed(model):
        fields = {"routing": model.config.routing, "split_layer": model.config.split_layer}
        found["routed"] = {**fields, **summarise_routed([sample["routed"] for sample in samples])}
        advised += advice_routed(found["routed"])
    print("\n".join(advised))
    said = {"model": without_folders(args.model), "data": without_folders(args.data)}
    said |= {name: vars(args)[name] for name in ("batch_size", "seed", "dtype", "tuned_lens")}
    document = {**run_record("-m dpvr.analysis.probe"), **said, "advice": advised, **found}
    write(document, args.output_dir / "saturation.json")
    draw(found, args.output_dir)
    if args.find_plan:
        search_plans(args, model, prompts, costs)
    publish(document, None)
    return document


if __name__ == "__main__":
    main(parse_args())
