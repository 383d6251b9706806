"""TRL's SFTTrainer for each method: what its checkpoints hold, and how it resumes.

rows --collators.py--> batches --> SFTTrainer --> checkpoints, of --method dpvr the side branch alone
                                                  (checkpoints.py: whole, and of this run)
"""

import os
from typing import Any

import torch
from accelerate import DistributedType
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers import LlavaProcessor
from trl import SFTTrainer, get_peft_config

from dpvr.training.arguments import BaseArguments, SideBranchSFTConfig
from dpvr.training.checkpoints import WholeCheckpoints
from dpvr.training.collators import AlwaysAPicture, ReplyCollator, WithoutImageLabels
from dpvr.training.options import MINIBENCH, DpvrArguments
from dpvr.training.output_folder import side_branch_of, without_shards
from modeling_dpvr import DpvrLlavaForConditionalGeneration

WEIGHTS_NAME = "model.safetensors"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class CardlessTrainer(WholeCheckpoints, SFTTrainer):
    """An SFTTrainer that leaves the card to `hub_dpvr.py`, which makes it from the run's records."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


class SideBranchTrainer(CardlessTrainer):
    """An SFTTrainer whose checkpoints hold the side branch, as the saved repository does, and not the frozen base."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            model = without_shards(model, side_branch_of(state_dict or model.state_dict()))
            model.save_pretrained(output_dir or self.args.output_dir, side_branch_only=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:  # which keeps its shards beside the side branch
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model.load_side_branch(load_file(os.path.join(resume_from_checkpoint, WEIGHTS_NAME)))


class WholeModelTrainer(CardlessTrainer):
    """An SFTTrainer that resumes by `from_pretrained`: Trainer's own reading does not know the names LLaVA saves."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


class LoraTrainer(CardlessTrainer):
    """TRL's own, which saves and resumes PEFT's files."""


TRAINERS = {"dpvr": SideBranchTrainer, "lora": LoraTrainer, "full": WholeModelTrainer}


def make_trainer(
    model: DpvrLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Dataset | IterableDataset,
    args: DpvrArguments,
    training: SideBranchSFTConfig,
    base: BaseArguments,
) -> SFTTrainer:
    """The trainer of a method; the loss curve will be in its `state.log_history`.

    Raises:
        ValueError: if MiniBench's questions are to be answered by a model of which each process has a shard.
    """
    lora = None
    if args.method == "lora":
        base.use_peft = True
        lora = get_peft_config(base)
        lora.target_modules = lora.target_modules or LORA_TARGETS
    collate = ReplyCollator(processor, training.max_length, training.assistant_only_loss)
    training.assistant_only_loss = False  # TRL's way to it, which asks for marks in the template
    trainer = TRAINERS[args.method](
        model=model,
        args=training,
        train_dataset=rows,
        processing_class=processor,
        data_collator=WithoutImageLabels(collate, model),
        peft_config=lora,
    )
    if trainer.accelerator.distributed_type in SHARDED:
        if args.data == MINIBENCH and args.eval_questions:
            raise ValueError(
                f"--eval_questions is {args.eval_questions}, but under FSDP and ZeRO-3 no process has the whole model "
                "to ask: use --eval_questions 0, and python -m dpvr.benchmarks.accuracy afterwards."
            )
        trainer.data_collator = AlwaysAPicture(trainer.data_collator)
    return trainer
