"""One training run, from its arguments to its record: what `python train_sft.py` does.

processor, rows, model --> scores before --> SFTTrainer --> output_dir --> scores after --> Hub, if asked
                                                                |
                                              training.json: what was trained, on what, how, and the loss curve
"""

import copy
import os
import time
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from transformers import LlavaProcessor
from transformers.integrations import unset_hf_deepspeed_config

from dpvr.data.conversations import Conversations, data_fingerprint, load_conversations
from dpvr.data.readable import RowCheck, readable
from dpvr.data.templates import with_ended_replies
from dpvr.inference.evaluation import evaluate
from dpvr.record import run_record, without_folders
from dpvr.training.arguments import BaseArguments, SideBranchSFTConfig
from dpvr.training.checkpoints import find_checkpoint, refuse_another_run, run_identity
from dpvr.training.models import check_plan, find_split, load_model, refuse_another_plan
from dpvr.training.options import AUTO, MINIBENCH, DpvrArguments
from dpvr.training.output_folder import finish_move, save, write_record
from dpvr.training.trainers import make_trainer
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
    "bf16",
)


def train(args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments) -> dict[str, Any]:
    """Train, save, score before and after, push if asked to; returns what training.json holds."""
    transformers.set_seed(training.seed)
    unset_hf_deepspeed_config()  # ZeRO-3 would load shards, of which no side branch can start; the trainer sets it
    checkpoint = find_place(training, base)
    refuse_another_run(checkpoint, run_identity(describe(args, training, base)))
    refuse_another_plan(checkpoint, args, check_plan(args, base))
    processor = with_ended_replies(load_processor(base.model_name_or_path, base.model_revision))
    as_loaded = copy.deepcopy(processor)  # a tokenizer notes how it last padded, and would save that
    rows = load_rows(args, training.seed)
    if args.split_layer == AUTO and args.method == "dpvr":
        args.split_layer = find_split(base, processor, rows.rows)
        refuse_another_plan(checkpoint, args, check_plan(args, base))
    model = load_model(args, base)
    if args.data != MINIBENCH:
        room = model.config.text_config.max_position_embeddings
        rows = readable(rows, RowCheck(processor, room, training.max_length), args.data, args.skip_bad_rows)
    record = describe(args, training, base, rows)
    run = run_identity(record)
    refuse_another_run(checkpoint, run)
    model.side_branch_base(training.output_dir)  # refuses the base's own folder now, not after the training
    repo_id = claim_repository(model, args, training)
    scores = Scores(model, processor, args)
    scores.before()
    trainer = make_trainer(model, processor, rows.rows, args, training, base)
    trainer.run = run
    record |= {
        "dpvr": model.config.dpvr_fields(),
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }
    clear_place(training)
    tell(f"Training {record['trainable_parameters']:,} of {model.num_parameters():,} parameters; "
         f"plan {model.config.layer_plan()}")  # fmt: skip
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    record |= {
        "train_seconds": time.perf_counter() - start,
        "resumed_from": os.path.basename(checkpoint) if checkpoint else None,
        "samples_per_second": None if checkpoint else result.metrics["train_samples_per_second"],
        "log": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],  # of this process alone
        "accuracy": scores.rows,
    }
    save(trainer, as_loaded, args.method, record, training.output_dir)
    tell(f"Saved in {training.output_dir} after {record['train_seconds']:.0f} s of training.")
    if scores.after():
        write_record(record, training.output_dir)
    if repo_id:
        print(f"Pushed to {upload(training.output_dir, repo_id, token=training.hub_token)}")
    return record


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
    if args.data == MINIBENCH:
        return Conversations(to_hf_dataset("train", args.num_rows, QUESTIONS_PER_ROW, seed), {})
    return load_conversations(
        args.data,
        split=args.data_split,
        image_folder=args.image_folder,
        skip_bad_rows=args.skip_bad_rows,
        streaming=args.streaming,
        allow_remote_images=args.allow_remote_images,
    )


class Scores:
    """Scores on MiniBench's validation questions, on the main process; none if it is trained on other rows.

    Attributes:
        rows: of the vanilla base, the untrained and the trained model, as `evaluate` returns them.
    """

    def __init__(
        self, model: DpvrLlavaForConditionalGeneration, processor: LlavaProcessor, args: DpvrArguments
    ) -> None:
        self.model, self.processor, self.method = model, processor, args.method
        self.num_questions = args.eval_questions * (PartialState().is_main_process and args.data == MINIBENCH)
        self.rows: list[dict[str, Any]] = []

    def before(self) -> None:
        self._add("vanilla", "none")
        if self.method == "dpvr":
            self._add("untrained branch", self.model.config.routing)

    def after(self) -> bool:
        """Whether there is a new score."""
        return self._add("trained branch" if self.method == "dpvr" else self.method, self.model.config.routing)

    def _add(self, name: str, routing: str) -> bool:
        if not self.num_questions:
            return False
        own = self.model.config.routing
        self.model.set_routing(routing)
        options = {"split": "validation", "num_questions": self.num_questions, "description": name}
        scores = evaluate(self.model, self.processor, **options)
        self.model.set_routing(own)
        tasks = "  ".join(f"{task} {score:.1%}" for task, score in scores["tasks"].items())
        print(f"{name:<16} mean {scores['mean']:6.1%}   {tasks}   (n = {scores['n']})", flush=True)
        self.rows.append({"name": name, "routing": routing, **scores})
        return True


def describe(
    args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments, rows: Conversations | None = None
) -> dict[str, Any]:
    """The part of the record that is known before the model is read; without rows, before those are."""
    lora = {"r": base.lora_r, "alpha": base.lora_alpha, "dropout": base.lora_dropout}
    return {
        **run_record("train_sft.py"),
        "method": args.method,
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
        "on_the_hub": args.data != MINIBENCH and not Path(args.data).exists(),
        "fingerprint": from_minibench if args.data == MINIBENCH else data_fingerprint(rows.rows),
        "bad_rows": rows.bad_rows,
    }


def claim_repository(
    model: DpvrLlavaForConditionalGeneration, args: DpvrArguments, training: SideBranchSFTConfig
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
        require_hub_base(model.side_branch_base(training.output_dir))
    name = training.hub_model_id or Path(training.output_dir).name
    return make_repository(name, private=training.hub_private_repo, token=training.hub_token)
