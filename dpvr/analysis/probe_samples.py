"""The samples of a probe run: measured batch by batch and appended to a file, so that a stopped run can resume.

    model, rows --> AnsweredPrompts --> batches --> saturation.measure --> OUTPUT_DIR/samples.jsonl

The first line of the file holds the settings that samples depend on; a run with other settings refuses the file.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from dpvr.analysis.saturation import Sample, measure, measure_routed
from dpvr.analysis.tuned_lens import TunedLens
from dpvr.data.conversations import Row, load_conversations
from dpvr.data.prompts import AnsweredPrompts, in_batches
from generation_dpvr import IGNORED_LABEL
from images_dpvr import image_marks
from minibench.data import to_hf_dataset

MINIBENCH = "minibench"


def load_rows(args: argparse.Namespace, split: str = "validation") -> Iterable[Row]:
    """The rows to measure; of MiniBench those of one question, from a split."""
    if args.data == MINIBENCH:
        count = args.num_samples if split == "validation" else args.tuned_lens
        return to_hf_dataset(split, count, questions_per_row=1, seed=args.seed)
    options = {name: getattr(args, name) for name in ("image_folder", "skip_bad_rows", "allow_remote_images")}
    return load_conversations(args.data, split=args.data_split, streaming=True, **options).rows


def load_lens(
    args: argparse.Namespace,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Iterable[Row],
    settings: dict[str, str],
) -> TunedLens | None:
    """The tuned lens in `output_dir`, or one trained on prompts that are not measured; None without --tuned_lens.

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


def is_routed(model: PreTrainedModel) -> bool:
    """Whether this is a DPVR model with a routing other than "none"."""
    return model.config.model_type == "dpvr_llava" and not model.config.layer_plan().is_vanilla


def settings_of(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, str]:
    """What samples depend on: a run with other settings cannot resume with them."""
    names = ("model", "data", "data_split", "image_folder", "skip_bad_rows", "allow_remote_images")
    names += ("seed", "dtype", "tuned_lens")
    weights = sum(weight.double().abs().sum().item() for weight in model.parameters())
    plan = str(model.config.layer_plan()) if model.config.model_type == "dpvr_llava" else "vanilla"
    statistics = " ".join(field.name for field in fields(Sample))
    given = {name: str(vars(args)[name]) for name in names}
    return {**given, "plan": plan, "weights": f"{weights:.9g}", "statistics": statistics}


def collect(
    args: argparse.Namespace,
    model: PreTrainedModel,
    lens: TunedLens | None,
    prompts: AnsweredPrompts,
    settings: dict[str, str],
) -> list[dict[str, Any]]:
    """Measure the prompts that are not yet in samples.jsonl; all samples.

    Raises:
        ValueError: if no row has a picture.
    """
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
        raise ValueError(f"No row of {args.data!r} has a picture, so there is nothing to measure: give other --data.")
    return samples[: args.num_samples]


def read_samples(path: Path, settings: dict[str, str]) -> list[dict[str, Any]]:
    """The samples of an earlier run with the same settings; an incomplete last line is dropped from the file.

    Raises:
        ValueError: if the settings differ.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    if len(lines) < 2:
        return []
    complete = lines[:-1]
    if (found := json.loads(complete[0])) != settings:
        names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        changes = "; ".join(f"{name} was {found.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(f"{path} holds samples of a run with other settings ({changes}): use another --output_dir.")
    path.write_text("\n".join(complete) + "\n", encoding="utf-8")
    return [json.loads(line) for line in complete[1:]]


def measure_batch(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor, lens: TunedLens | None
) -> Iterator[dict[str, Any]]:
    """The samples of a batch as they are kept, with each prompt's numbers of tokens."""
    image = (image_marks(model.model, inputs["input_ids"], None) & inputs["attention_mask"].bool()).sum(1)
    pictures = iter(inputs["pixel_values"])  # of a LLaVA, all of one number of tokens, where is_routed
    per_picture = int(image.sum()) // len(inputs["pixel_values"])
    for row, sample in enumerate(measure(model, inputs, labels, lens=lens)):
        valid = inputs["attention_mask"][row].bool()
        answer = int((labels[row] != IGNORED_LABEL).sum())
        tokens = {"image_tokens": int(image[row]), "text_tokens": int(valid.sum() - image[row]) - answer}  # to prefill
        found = {**tokens, **asdict(sample)}
        if is_routed(model):
            ids = inputs["input_ids"][row, valid][None]
            own = torch.stack(list(islice(pictures, int(image[row]) // per_picture)))
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": own}
            found["routed"] = asdict(measure_routed(model, prompt))
        yield found
