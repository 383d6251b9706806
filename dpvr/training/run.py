"""One training run, from its arguments to its record: what `python train_sft.py` does.

processor, rows, model --> scores before --> SFTTrainer --> output_dir --> scores after --> Hub, if asked
                                                                |
                                              training.json: what was trained, on what, how, and the loss curve
"""

import copy
import os
import time
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tqdm import tqdm
from transformers import IntervalStrategy, PreTrainedModel, ProcessorMixin
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTTrainer

from dpvr.data.conversations import Conversations, data_fingerprint, load_conversations
from dpvr.data.readable import RowCheck, readable
from dpvr.data.templates import with_ended_replies
from dpvr.models import as_base, plan_of
from dpvr.record import run_record, without_folders
from dpvr.training.arguments import BaseArguments, SideBranchSFTConfig
from dpvr.training.checkpoints import find_checkpoint, refuse_another_run, run_identity
from dpvr.training.latent_fit import Moments, Target, collect, solve
from dpvr.training.models import check_plan, find_split, load_model, method_fields, refuse_another_plan
from dpvr.training.objectives import match_loss
from dpvr.training.options import AUTO, MINIBENCH, SWAPPED, DpvrArguments
from dpvr.training.output_folder import finish_move, save, write_record
from dpvr.training.scores import RATES, Scores, compared, compared_arguments, costs, table
from dpvr.training.trainers import CardlessTrainer, check_recipe, collator_of, make_trainer, objective_of
from dpvr.training.used_folders import check_output_folder, delete_checkpoints
from hub_dpvr import make_repository, require_hub_base, upload
from minibench.data import to_hf_dataset
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

QUESTIONS_PER_ROW = 7  # of MiniBench
RECIPE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
    "data_seed",
    "optim",
    "max_grad_norm",
    "max_length",
    "first_stage_steps",
    "first_stage_learning_rate",
    "bf16",
)


def train(args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments) -> dict[str, Any]:
    """Train, save, score before and after, push if asked to; returns what training.json holds."""
    transformers.set_seed(training.seed)
    unset_hf_deepspeed_config()  # ZeRO-3 would load shards, of which no side branch can start; the trainer sets it
    check_recipe(args, training)
    objective = objective_of(args)
    checkpoint = find_place(training, base)
    refuse_another_run(checkpoint, run_identity(describe(args, training, base)))
    plan = check_plan(args, base)
    others = [compared_arguments(name, args) for name in compared(args, plan)]
    refuse_another_plan(checkpoint, args, base, plan)
    processor = with_ended_replies(load_processor(base.model_name_or_path, base.model_revision))
    as_loaded = copy.deepcopy(processor)  # a tokenizer notes how it last padded, and would save that
    rows = load_rows(args, training.seed)
    if args.split_layer == AUTO and args.method == "dpvr":
        args.split_layer = find_split(base, processor, rows.rows)
        refuse_another_plan(checkpoint, args, base, check_plan(args, base))
    model = load_model(args, base)
    if not is_minibench(args):
        room = model.config.get_text_config().max_position_embeddings
        rows = readable(rows, RowCheck(processor, room, training.max_length), args.data, args.skip_bad_rows)
    record = describe(args, training, base, rows)
    run = run_identity(record)
    refuse_another_run(checkpoint, run)
    if isinstance(model, DpvrLlavaForConditionalGeneration):
        model.side_branch_base(training.output_dir)  # refuses the base's own folder now, not after the training
    repo_id = claim_repository(model, args, training, base)
    scores = Scores(processor, args)
    scores.add_base(model)
    start = fit_start(model, processor, rows.rows, args, training)
    kind = "latent" if plan_of(model).latent_stride else "branch"
    if args.method == "dpvr":
        untrained = "fitted latent" if kind == "latent" else "untrained branch"
        scores.add(untrained, model, only=next(iter(scores.shown), None))
    trainer = make_trainer(model, processor, rows.rows, args, training, base)
    trainer.run = run
    if objective == "match":
        match_deviations(trainer, start)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    record |= {"dpvr": method_fields(model), "trainable_parameters": trained}
    clear_place(training)
    tell(f"Training {trained:,} of {model.num_parameters():,} parameters for {objective}; plan {plan_of(model)}")
    start_time = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if objective == "match" and kind == "latent":  # its states have changed
        fit_start(model, processor, rows.rows, args, training)
    record |= {
        "train_seconds": time.perf_counter() - start_time,
        "resumed_from": os.path.basename(checkpoint) if checkpoint else None,
        "samples_per_second": None if checkpoint else result.metrics["train_samples_per_second"],
        "log": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],  # of this process alone
        "accuracy": scores.rows,
    }
    save(trainer, as_loaded, args.method, record, training.output_dir)
    tell(f"Saved in {training.output_dir} after {record['train_seconds']:.0f} s of training.")
    name = f"trained {kind}" if args.method == "dpvr" else args.method
    if scores.add(name, trainer.model):
        record["table"] = [base_row(model, processor), model_row(name, trainer, record["train_seconds"])]
        for other in others:
            record["table"].append(train_beside(other, training, base, processor, rows, scores))
        tell("\n".join(table(record["table"], scores)))
        write_record(record, training.output_dir)
    if repo_id:
        print(f"Pushed to {upload(training.output_dir, repo_id, token=training.hub_token)}")
    return record


def fit_start(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Dataset | IterableDataset,
    args: DpvrArguments,
    training: SideBranchSFTConfig,
) -> Moments | None:
    """Fit a latent in closed form on the first rows with pictures, from where its training goes on.

    Returns:
        The moments of what was fitted; None if there is no latent and no objective that needs them.
    """
    if args.method != "dpvr" or not (plan_of(model).latent_stride or objective_of(args) == "match"):
        return None
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        model.to(PartialState().device)  # else it is there, and cannot be moved
    was_training, target = model.training, Target.of(model.eval())
    collate, size = collator_of(processor, args, training, for_teacher=True), training.per_device_train_batch_size
    pictured = (row for row in rows if row["images"])
    batches = iter(lambda: list(islice(pictured, size)), [])
    limit, device = -(-args.fit_rows // size), model.device
    hidden = not PartialState().is_main_process
    bar = tqdm(islice(batches, limit), total=limit, desc="Fitting", unit="batch", disable=hidden)
    inputs = ({name: value.to(device) for name, value in collate(batch).items()} for batch in bar)
    moments = collect(target, inputs)
    if moments.count == 0:
        raise ValueError("No row has a picture, so there is nothing to fit a latent on: give rows with pictures.")
    if target.plan.latent_stride:
        solution = solve(moments)
        solution.put_into(target.latent)
        explained = solution.explained(moments, target.latent.reduce.out_features).values()
        tell(f"The latent explains {sum(explained) / len(explained):.1%} of the base's keys and values on those rows.")
    model.train(was_training)
    return moments


def match_deviations(trainer: CardlessTrainer, moments: Moments) -> None:
    """Train for the distance to the base's keys and values, in units of how much these vary."""
    trainer.set_objective(partial(match_loss, deviations=moments.deviations))


def base_row(model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> dict[str, Any]:
    with as_base(model):
        trained = {"trained_parameters": 0, "seconds_per_step": None, "saved_activation_bytes": None}
        return {"name": "vanilla", **costs(model, processor), **trained}


def model_row(name: str, trainer: SFTTrainer, seconds: float) -> dict[str, Any]:
    """A row of the last table, of a trained model."""
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    return {
        "name": name,
        **costs(trainer.model, trainer.processing_class),
        "trained_parameters": trained,
        "seconds_per_step": seconds / max(1, trainer.state.global_step),
        "saved_activation_bytes": trainer.saved_activation_bytes,
    }


def train_beside(
    args: DpvrArguments,
    training: SideBranchSFTConfig,
    base: BaseArguments,
    processor: ProcessorMixin,
    rows: Conversations,
    scores: Scores,
) -> dict[str, Any]:
    """Train another method on the same rows for as many steps, for the last table; it is not saved."""
    method = args.method if args.method == "lora" else args.routing
    with TemporaryDirectory() as folder:
        own = copy.copy(training)
        own.output_dir, own.save_strategy, own.learning_rate = folder, IntervalStrategy.NO, RATES[method]
        transformers.set_seed(own.seed)
        model = load_model(args, base)
        moments = fit_start(model, processor, rows.rows, args, own)
        trainer = make_trainer(model, processor, rows.rows, args, own, copy.copy(base))
        if objective_of(args) == "match":
            match_deviations(trainer, moments)
        start = time.perf_counter()
        trainer.train()
        name = f"trained {method}".replace("_", " ")
        row = model_row(name, trainer, time.perf_counter() - start)
    scores.add(name, trainer.model)
    return row | {"learning_rate": own.learning_rate, "objective": objective_of(args)}


def is_minibench(args: DpvrArguments) -> bool:
    return args.data in (MINIBENCH, SWAPPED)


def find_place(training: SideBranchSFTConfig, base: BaseArguments) -> str | None:
    """Make sure that `output_dir` can be used; returns the checkpoint to go on from, None for a new run.

    Raises:
        ValueError: if the folder cannot be used, or if there is no whole checkpoint to go on from.
    """
    resumed = training.resume_from_checkpoint is not None
    options = {"resumed": resumed, "overwrite": training.overwrite_output_dir}
    check_output_folder(training.output_dir, base.model_name_or_path, **options)
    PartialState().wait_for_everyone()
    if resumed and PartialState().is_main_process and finish_move(Path(training.output_dir)):
        print(f"A run was killed as it moved its files into {training.output_dir}; they are in place now.", flush=True)
    PartialState().wait_for_everyone()
    return find_checkpoint(training.resume_from_checkpoint, training.output_dir)


def clear_place(training: SideBranchSFTConfig) -> None:
    """Delete the checkpoints of an earlier run, for a new one that was told to."""
    if training.overwrite_output_dir and training.resume_from_checkpoint is None and PartialState().is_main_process:
        finish_move(Path(training.output_dir))
        delete_checkpoints(training.output_dir)
    PartialState().wait_for_everyone()


def tell(line: str) -> None:
    """Print on the main process alone."""
    if PartialState().is_main_process:
        print(line, flush=True)


def load_rows(args: DpvrArguments, seed: int) -> Conversations:
    """MiniBench's rows, or those of `args.data`, checked."""
    if is_minibench(args):
        swap = args.data == SWAPPED
        return Conversations(to_hf_dataset("train", args.num_rows, QUESTIONS_PER_ROW, seed, swap=swap), {})
    return load_conversations(
        args.data,
        split=args.data_split,
        image_folder=args.image_folder,
        skip_bad_rows=args.skip_bad_rows,
        streaming=args.streaming,
        allow_remote_images=args.allow_remote_images,
    )


def describe(
    args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments, rows: Conversations | None = None
) -> dict[str, Any]:
    """The part of the record that is known before the model is read; without rows, before those are."""
    lora = {"r": base.lora_r, "alpha": base.lora_alpha, "dropout": base.lora_dropout}
    return {
        **run_record("train_sft.py"),
        "method": args.method,
        "objective": objective_of(args),
        "fit_rows": args.fit_rows,
        "base": {
            "name": without_folders(base.model_name_or_path),
            "revision": base.model_revision,
            "dtype": base.dtype,
            "bits": 4 if base.load_in_4bit else 8 if base.load_in_8bit else None,
        },
        "lora": lora if args.method == "lora" else None,
        "recipe": {
            **{name: value for name in RECIPE if (value := training.to_dict().get(name)) is not None},
            "processes": training.world_size,
        },
        "seed": training.seed,
        **({"data": describe_rows(args, training.seed, rows)} if rows is not None else {}),
    }


def describe_rows(args: DpvrArguments, seed: int, rows: Conversations) -> dict[str, Any]:
    from_minibench = [args.num_rows, QUESTIONS_PER_ROW, seed]
    return {
        "name": without_folders(args.data),
        "on_the_hub": not is_minibench(args) and not Path(args.data).exists(),
        "fingerprint": from_minibench if is_minibench(args) else data_fingerprint(rows.rows),
        "bad_rows": rows.bad_rows,
    }


def claim_repository(
    model: PreTrainedModel | PeftModel, args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments
) -> str | None:
    """The id of the repository to push to, None if none is: a run that could not push in the end is not to begin.

    Raises:
        ValueError: for LoRA, whose files are no DPVR repository, for another branch, and for a base in a local folder.
        OSError: if the Hub cannot be reached or does not let us.
    """
    wanted, training.push_to_hub = training.push_to_hub, False  # Trainer's own would push checkpoints and its own card
    if not wanted or not PartialState().is_main_process:
        return None
    if args.method == "lora" or training.hub_revision is not None:
        raise ValueError(
            "--push_to_hub pushes what --method dpvr and full save, to the main branch, but this is --method "
            f"{args.method} with --hub_revision {training.hub_revision}: train first, then hf upload <repository> "
            f"{training.output_dir}."
        )
    if args.method == "dpvr":
        own = isinstance(model, DpvrLlavaForConditionalGeneration)
        require_hub_base(model.side_branch_base(training.output_dir) if own else base.model_name_or_path)
    name = training.hub_model_id or Path(training.output_dir).name
    return make_repository(name, private=training.hub_private_repo, token=training.hub_token)
