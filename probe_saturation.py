"""Find out after which layer a LLaVA no longer needs its image tokens (paper section 3.1, Figure 2; saturation.py).

rows of pictures and conversations      the first question of each and its answer, in batches
    |
OUTPUT_DIR/samples.jsonl                a line per sample; a run that was stopped goes on behind the last one
    |
OUTPUT_DIR/saturation.json, .png, .svg  medians and quartiles by layer, transitions, two recommended splits

python probe_saturation.py                                           # dpvr-mini on MiniBench
python probe_saturation.py --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --image_folder images
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from adapter_dpvr import DpvrConfig
from conversations import load_conversations
from minibench.data import to_hf_dataset
from minibench.processor import load_processor
from minibench.record import publish, run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from saturation import GRAPHS, IGNORED_LABEL, measure

MINIBENCH = "minibench"
PAPERS_MARGIN = 4  # layers from the split to the transition of image tokens: 18 and 22 of 32
TITLES = ("Cosine of a layer's input and output", "Text-to-image attention", "Logit lens", "Withdrawal of the image")


def load_rows(args: argparse.Namespace) -> Any:
    if args.data == MINIBENCH:
        return to_hf_dataset("validation", args.num_samples, questions_per_row=1, seed=args.seed)
    return load_conversations(args.data, split=args.data_split, image_folder=args.image_folder).rows


def encode(processor: LlavaProcessor, row: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """The processor's inputs of a row's first question with its answer, and its labels (1, T); None without pictures.

    Raises:
        ValueError: if the chat template writes a prompt anew once it is answered.
    """
    end = next(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    marks = sum(part["type"] == "image" for message in row["messages"][:end] for part in message["content"])
    if marks == 0:
        return None
    pictures = [picture.convert("RGB") for picture in row["images"][:marks]]
    texts = [
        processor.apply_chat_template(row["messages"][:end], add_generation_prompt=True),
        processor.apply_chat_template(row["messages"][: end + 1]),
    ]
    prompt, whole = (processor(images=pictures, text=text, return_tensors="pt") for text in texts)
    length = prompt["input_ids"].shape[1]
    if not torch.equal(whole["input_ids"][:, :length], prompt["input_ids"]):
        raise ValueError(
            f"Expected a chat template that leaves an answered prompt as it was; got {texts[1]!r} after {texts[0]!r}. "
            "Remedy: another processor, such as dpvr-mini's template."
        )
    labels = whole["input_ids"].clone()
    labels[:, :length] = IGNORED_LABEL
    return dict(whole), labels


def batches(
    encoded: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]], batch_size: int, pad: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches of single rows, padded on the right."""
    rows: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def joined() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        def stack(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([tensor[0] for tensor in tensors], True, value)

        inputs = {
            "input_ids": stack([row["input_ids"] for row, _ in rows], pad),
            "attention_mask": stack([row["attention_mask"] for row, _ in rows], 0),
            "pixel_values": torch.cat([row["pixel_values"] for row, _ in rows]),
        }
        return inputs, stack([labels for _, labels in rows], IGNORED_LABEL)

    for row in encoded:
        rows.append(row)
        if len(rows) == batch_size:
            yield joined()
            rows = []
    if rows:
        yield joined()


def run(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, list[dict[str, Any]], int]:
    """Measure what is not yet in samples.jsonl; return the model, all samples, and the rows without pictures."""
    path = args.output_dir / "samples.jsonl"
    settings = {name: str(vars(args)[name]) for name in ("model", "data", "data_split", "seed", "dtype")}
    samples = read_samples(path, settings)
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, trust_remote_code=True, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    model = model.eval().to(args.device)
    processor = load_processor(args.model)
    skipped = 0

    def encoded() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        nonlocal skipped
        taken = 0
        for row in load_rows(args):
            if taken == args.num_samples:
                return
            found = encode(processor, row)
            if found is None:
                skipped += 1
                continue
            taken += 1
            if taken > len(samples):
                yield found

    path.parent.mkdir(parents=True, exist_ok=True)
    pad = processor.tokenizer.pad_token_id or 0
    with path.open("a", encoding="utf-8") as file, tqdm(total=args.num_samples, initial=len(samples)) as progress:
        if not samples:
            file.truncate(0)
            file.write(json.dumps(settings) + "\n")
        for inputs, labels in batches(encoded(), args.batch_size, pad):
            inputs = {name: value.to(args.device) for name, value in inputs.items()}
            image = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
            lengths = inputs["attention_mask"].sum(1).tolist()
            for sample, tokens, length in zip(
                measure(model, inputs, labels.to(args.device)), image, lengths, strict=True
            ):
                samples.append({"image_tokens": tokens, "text_tokens": length - tokens, **asdict(sample)})
                file.write(json.dumps(samples[-1]) + "\n")
            file.flush()
            progress.update(len(lengths))
    return model, samples[: args.num_samples], skipped


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
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    return [json.loads(line) for line in whole[1:]]


def band(rows: list[list[float]]) -> dict[str, list[float]]:
    """The median and the quartiles over samples, per layer."""
    quartiles = torch.tensor(rows, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    return dict(zip(("q25", "median", "q75"), quartiles.tolist(), strict=True))


def summarise(samples: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """The curves, the transitions and the recommended splits."""
    depth = len(samples[0]["attention_mass"])
    curves = {
        name: {kind: band([sample[name][kind] for sample in samples]) for kind in ("image", "text")}
        for name in ("cosine", "logit_lens_kl")
    }
    mass = torch.tensor([sample["attention_mass"] for sample in samples], dtype=torch.float64)  # (samples, L, H)
    curves["attention_mass"] = band(mass.mean(-1).tolist()) | {"median_by_head": mass.quantile(0.5, dim=0).tolist()}
    curves["withdrawal"] = {
        graph: band([sample["withdrawal_kl"][graph] for sample in samples])
        | {
            "changed": torch.tensor([sample["withdrawal_changed"][graph] for sample in samples])
            .double()
            .mean(0)
            .tolist()
        }
        for graph in GRAPHS
    }
    transition = {kind: _transition(curves["logit_lens_kl"][kind]["median"]) for kind in ("image", "text")}
    changed = curves["withdrawal"]["text_only"]["changed"]
    causal = next((split for split, share in enumerate(changed, start=1) if share <= tolerance), None)
    papers = min(max(1, transition["image"] - PAPERS_MARGIN), depth - 1)
    return {
        **curves,
        "transition": transition,
        "tolerance": tolerance,
        "papers_split": papers,
        "recommended_split": causal,
        "image_tokens": statistics.median(sample["image_tokens"] for sample in samples),
        "text_tokens": statistics.median(sample["text_tokens"] for sample in samples),
    }


def _transition(median: list[float]) -> int:
    """The first layer after which the lens is less than half as far from the final distribution as at its farthest."""
    farthest = median.index(max(median))
    return next(layer for layer in range(farthest, len(median)) if median[layer] < max(median) / 2)


def flops_ratio(model: LlavaForConditionalGeneration, split: int, image: int, text: int) -> float:
    """Prefill FLOPs of late fusion at a split, as a share of vanilla's."""
    config = DpvrConfig(split_layer=split).for_base(model.config)
    with torch.device("meta"):
        dpvr = DpvrLlavaForConditionalGeneration(config)
    return dpvr.prefill_flops(image, text) / dpvr.prefill_flops(image, text, routing="none")


def advice(model: LlavaForConditionalGeneration, found: dict[str, Any]) -> list[str]:
    """What to split at, by which rule, and what it costs."""
    tokens = round(found["image_tokens"]), round(found["text_tokens"])
    lines = [
        f"Image tokens reach the prediction space after layer {found['transition']['image']}, text tokens after layer "
        f"{found['transition']['text']} (logit lens, half of the farthest KL).",
        f"The paper's rule, {PAPERS_MARGIN} layers before: --split_layer {found['papers_split']}, "
        f"{flops_ratio(model, found['papers_split'], *tokens):.3f} of vanilla's prefill FLOPs.",
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
            f"changes {changed:.1%}; {flops_ratio(model, split, *tokens):.3f} of vanilla's prefill FLOPs."
        )
    return lines


def draw(found: dict[str, Any], folder: Path) -> None:
    """The paper's three panels and the withdrawal curve, as saturation.png and .svg."""
    from matplotlib.figure import Figure  # not at the top: a figure is wanted here alone

    figure = Figure(figsize=(10, 7), facecolor="white", layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    colours = {"image": "#D55E00", "text": "#0072B2", "text_only": "#D55E00", "late_fusion": "#009E73"}  # Okabe, Ito
    depth = len(found["cosine"]["image"]["median"])
    lines = [
        [("image", found["cosine"]["image"], "image tokens"), ("text", found["cosine"]["text"], "text tokens")],
        [("image", found["attention_mass"], "mean over heads")],
        [
            ("image", found["logit_lens_kl"]["image"], "image tokens"),
            ("text", found["logit_lens_kl"]["text"], "text tokens"),
        ],
        [
            ("text_only", found["withdrawal"]["text_only"], "text alone above"),
            ("late_fusion", found["withdrawal"]["late_fusion"], "read again in the last layer"),
        ],
    ]
    labels = ("cosine", "share of attention", "KL to the final layer, nats", "KL of the answer to vanilla's, nats")
    for axis, title, label, curves in zip(axes, TITLES, labels, lines, strict=True):
        for kind, curve, name in curves:
            first = 1 if "changed" in curve else 0
            x = range(first, first + len(curve["median"]))
            style = "--" if kind in ("text", "late_fusion") else "-"
            axis.plot(x, curve["median"], style, color=colours[kind], label=name, marker="o", markersize=3)
            axis.fill_between(x, curve["q25"], curve["q75"], color=colours[kind], alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="layer", ylabel=label, xlim=(-0.5, depth - 0.5))
        axis.grid(alpha=0.3)
        if found["recommended_split"] is not None:
            axis.axvline(found["recommended_split"], color="0.3", linestyle=":", label="recommended split")
        axis.legend(fontsize="small")
    axes[3].set_xlabel("layers with the image")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"saturation.{kind}", dpi=150)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find where image tokens saturate in a LLaVA, and where to split it.")
    parser.add_argument("--model", default=".", help="any LLaVA or DPVR repository (id or path)")
    parser.add_argument("--data", default=MINIBENCH, help="minibench, or what train_sft.py --data reads")
    parser.add_argument("--data_split", default="train", help="of a data set from the Hub or a folder")
    parser.add_argument("--image_folder", help="what the names in LLaVA's JSON stand in")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share of answers that may change")
    parser.add_argument("--output_dir", type=Path, default=Path("results/saturation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any]:
    model, samples, skipped = run(args)
    if not samples:
        raise ValueError(f"Expected rows with pictures in {args.data!r}; got none. Remedy: other --data.")
    found = summarise(samples, args.tolerance)
    for line in (advised := advice(model, found)):
        print(line)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output_dir", "tolerance")}
    document = {**run_record("probe_saturation.py"), **settings, "num_samples": len(samples)}
    document |= {"rows_without_pictures": skipped, "advice": advised, **found}
    draw(found, args.output_dir)
    publish(document, args.output_dir / "saturation.json")
    return document


if __name__ == "__main__":
    main(parse_args())
