"""A run of `python -m dpvr.training.fit`: model and rows, moments, the maps, and a report on rows not fitted on.

load --> collect(fitted rows) --> solve --> choose the rank --> write into the model --> save
                                     |
         collect(further rows) --> R² by rank; replies and KL of the fitted model beside the base's
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from adapter_dpvr import DpvrConfig
from dpvr.analysis.probe_samples import MINIBENCH, load_rows
from dpvr.data.prompts import AnsweredPrompts, Batch, in_batches
from dpvr.models import as_base, load_model
from dpvr.record import publish, run_record, without_folders
from dpvr.training.fit_progress import NAME, check_folder, collect_on
from dpvr.training.latent_fit import Moments, Solution, Target, collect, solve
from generation_dpvr import IGNORED_LABEL
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

LATENT_OPTIONS = ("latent_side_layers", "latent_layers", "latent_stride", "latent_score")
AUTO = "auto"  # of --latent_rank
SHOWN_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """Fit, report and save; the document of fit.json."""
    check_folder(args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(args.model)
    base = load_model(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa").eval().to(args.device)
    width = base.config.get_text_config().hidden_size
    model = with_latent(base, args, width if args.latent_rank == AUTO else args.latent_rank)
    target = Target.of(model)
    fitted, solution, seconds = solved(target, processor, args)
    held_out = collect(target, batches(args, processor, args.num_samples, args.eval_samples, "Measuring"))
    ranks = [rank for rank in SHOWN_RANKS if rank < width] + [width]
    by_rank = {rank: mean_explained(solution, held_out, rank) for rank in ranks}
    rank = args.latent_rank
    if rank == AUTO:
        rank = next(each for each in ranks if by_rank[each] >= by_rank[width] - args.tolerance)
        model = with_latent(unloaded(model), args, rank)
        target = Target.of(model)
    solution.put_into(target.latent)
    document = {
        **run_record("-m dpvr.training.fit"),
        "model": without_folders(args.model),
        "data": without_folders(args.data),
        "plan": str(target.plan),
        **{name: vars(args)[name] for name in ("num_samples", "eval_samples", "split_layer", "dtype", "seed")},
        **{name: vars(args)[name] for name in LATENT_OPTIONS},
        "latent_rank": rank,
        "image_tokens_fitted": fitted.count,
        "moments_bytes": moments_bytes(fitted),
        "seconds": seconds,
        "latent_parameters": sum(weight.numel() for weight in target.latent.parameters()),
        "explained_by_rank": by_rank,
        "explained": {f"{layer} {kind}": value for (layer, kind), value in solution.explained(held_out, rank).items()},
        **agreement(model, batches(args, processor, args.num_samples, args.eval_samples, "Comparing")),
    }
    save(model, processor, args)
    publish(document, args.output_dir / "fit.json")
    (args.output_dir / NAME).unlink(missing_ok=True)
    print("\n".join(table(document)))
    publish(document, None, args.json)
    return document


def solved(
    target: Target, processor: ProcessorMixin, args: argparse.Namespace
) -> tuple[Moments, Solution, dict[str, float]]:
    """The moments of the rows to fit on, the maps, and the seconds that this run took for each."""
    start = time.perf_counter()
    fitted = collect_on(target, lambda first, count: batches(args, processor, first, count, "Fitting"), args)
    forwards, start = time.perf_counter() - start, time.perf_counter()
    solution = solve(fitted)
    return fitted, solution, {"forwards": forwards, "solution": time.perf_counter() - start}


def with_latent(base: PreTrainedModel, args: argparse.Namespace, rank: int) -> PreTrainedModel | PeftModel:
    """The base with a new latent: in a DPVR model its own, in any other model an adapter's."""
    fields = {"latent_rank": rank, "latent_split_layer": args.split_layer, "routing": "latent"}
    fields |= {name: vars(args)[name] for name in LATENT_OPTIONS}
    if not isinstance(base, DpvrLlavaForConditionalGeneration):
        return get_peft_model(base, DpvrConfig(**fields, split_layer=max(1, args.split_layer))).eval()
    base.new_latent(**fields)
    return base


def unloaded(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.unload() if isinstance(model, PeftModel) else model


def batches(
    args: argparse.Namespace, processor: ProcessorMixin, first: int, count: int, description: str
) -> Iterator[Batch | dict[str, torch.Tensor]]:
    """Batches of inputs of `count` rows with pictures after the first ones, with a progress bar.

    Raises:
        ValueError: if there are too few such rows.
    """
    of_rows = argparse.Namespace(**{**vars(args), "num_samples": first + count, "tuned_lens": first + count})
    prompts = AnsweredPrompts(processor, load_rows(of_rows, "train" if args.data == MINIBENCH else ""), first + count)
    taken = 0
    with tqdm(total=count, desc=description, unit="row", disable=None) as bar:
        for inputs, labels in in_batches(islice(prompts, first, None), args.batch_size, args.device):
            taken += len(labels)
            yield {**inputs, "labels": labels}
            bar.update(len(labels))
    if taken < count:
        raise ValueError(
            f"{taken} rows with a picture are left after {first}, and {count} are needed: give more rows, or lower "
            "--num_samples or --eval_samples."
        )


def mean_explained(solution: Solution, moments: Moments, rank: int) -> float:
    found = solution.explained(moments, rank).values()
    return sum(found) / len(found)


def moments_bytes(moments: Moments) -> int:
    """What the moments hold in memory, whatever the number of pictures."""
    held = [moments.state, moments.states, *moments.target.values(), *moments.square.values(), *moments.cross.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@torch.no_grad()
def agreement(model: PreTrainedModel | PeftModel, prompts: Iterator[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Of a fitted model and its base, given the rows' answers: shares of equal answers and tokens, KL in nats."""
    tokens = alike = answers = whole = 0
    divergence = 0.0
    for inputs in prompts:
        labels = inputs.pop("labels")[:, 1:]
        fitted = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        with as_base(model):
            base = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        answer = labels != IGNORED_LABEL
        same = (fitted.argmax(-1) == base.argmax(-1)) | ~answer
        divergence += (base.exp() * (base - fitted)).sum(-1)[answer].sum().item()
        tokens, alike = tokens + int(answer.sum()), alike + int(same[answer].sum())
        answers, whole = answers + len(labels), whole + int(same.all(1).sum())
    return {"answers_equal": whole / answers, "tokens_equal": alike / tokens, "kl_to_base": divergence / tokens}


def save(model: PreTrainedModel | PeftModel, processor: ProcessorMixin, args: argparse.Namespace) -> None:
    """An adapter, or a DPVR repository with side branch and latent alone."""
    if isinstance(model, PeftModel):
        model.save_pretrained(args.output_dir)
    else:
        model.save_pretrained(args.output_dir, side_branch_only=True)
    processor.save_pretrained(args.output_dir)


def table(document: dict[str, Any]) -> list[str]:
    lines = ["rank    explained of keys and values, on rows not fitted on"]
    lines += [f"{rank:<8}{share:.3f}" for rank, share in document["explained_by_rank"].items()]
    return [
        *lines,
        f"Rank {document['latent_rank']}, plan {document['plan']}: {document['answers_equal']:.1%} of "
        f"{document['eval_samples']} answers have the base's tokens; KL to the base {document['kl_to_base']:.4f}.",
    ]
