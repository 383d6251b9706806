"""TRL's SFTTrainer for each method and objective: its loss, what its checkpoints hold, and how it resumes.

rows --collators.py--> batches --objectives.py--> SFTTrainer --> checkpoints, of --method dpvr the side branch alone
                                                                 (checkpoints.py: whole, and of this run)
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTTrainer, get_peft_config

from decoders_dpvr import decoder_of, owner_of
from dpvr.training.activations import counting_saved
from dpvr.training.arguments import BaseArguments, SideBranchSFTConfig
from dpvr.training.checkpoints import WholeCheckpoints
from dpvr.training.collators import TEACHER_IMAGES, AlwaysAPicture, ReplyCollator, WithoutImageLabels
from dpvr.training.objectives import distil_loss, forward_replaced
from dpvr.training.options import MINIBENCH, SWAPPED, DpvrArguments
from dpvr.training.output_folder import side_branch_of, without_shards

WEIGHTS_NAME = "model.safetensors"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class CardlessTrainer(WholeCheckpoints, SFTTrainer):
    """An SFTTrainer that leaves the card to `hub_dpvr.py`, which makes it from the run's records.

    Attributes:
        objective: the loss of a model and a batch; None: TRL's, on the replies.
        saved_activation_bytes: what autograd saved for backward in the first step; None before it, and of a model of
            which each process has a shard.
    """

    objective: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor] | None = None
    saved_activation_bytes: int | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def set_objective(self, objective: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]) -> None:
        """Train for the mean of a loss over batches in place of TRL's."""
        self.objective, self.model_accepts_loss_kwargs = objective, False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.saved_activation_bytes is not None or self.accelerator.distributed_type in SHARDED:
            return super().training_step(model, inputs, *args, **kwargs)
        given = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        with counting_saved([*model.parameters(), *model.buffers(), *given]) as saved:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.saved_activation_bytes = saved.bytes
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.objective is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inner = self.accelerator.unwrap_model(model)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with forward_replaced(inner, lambda **inputs: self.objective(inner, inputs)):
            return model(**inputs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedule, after a first stage at a low constant rate (paper section 6, future work iv)."""
        first, low = self.args.first_stage_steps, self.args.first_stage_learning_rate
        steps = int(first * num_training_steps if first < 1 else first)
        if steps == 0:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = super().create_scheduler(num_training_steps - steps, optimizer)
        factors = [
            lambda step, then=then: low / self.args.learning_rate if step < steps else then(step - steps)
            for then in schedule.lr_lambdas
        ]
        for group in schedule.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(schedule.optimizer, factors)
        return self.lr_scheduler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TEACHER_IMAGES not in self._signature_columns:
            self._signature_columns.append(TEACHER_IMAGES)


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


class AdapterTrainer(CardlessTrainer):
    """TRL's own, which saves and resumes PEFT's files."""


TRAINERS = {"dpvr": SideBranchTrainer, "lora": AdapterTrainer, "full": WholeModelTrainer}


def make_trainer(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Dataset | IterableDataset,
    args: DpvrArguments,
    training: SideBranchSFTConfig,
    base: BaseArguments,
) -> SFTTrainer:
    """The trainer of a method; the loss curve will be in its `state.log_history`.

    Raises:
        ValueError: if MiniBench's questions are to be answered by a model of which each process has a shard, or if
            such a model is to be trained on what the base does.
    """
    lora, objective = None, objective_of(args)
    if args.method == "lora":
        base.use_peft = True
        lora = get_peft_config(base)
        lora.target_modules = lora.target_modules or lora_targets(model)
    own = copy.copy(training)
    own.assistant_only_loss = False  # TRL's way to it, which asks for marks in the template
    if args.method == "dpvr":
        own.router_aux_loss_coef = 0.0  # the routers of a mixture of experts are frozen: there is nothing to balance
    kind = AdapterTrainer if isinstance(model, PeftModel) else TRAINERS[args.method]
    trainer = kind(
        model=model,
        args=own,
        train_dataset=rows,
        processing_class=processor,
        data_collator=WithoutImageLabels(collator_of(processor, args, training), model),
        peft_config=lora,
    )
    if trainer.accelerator.distributed_type in SHARDED:
        _check_sharded(args, objective)
        trainer.data_collator = AlwaysAPicture(trainer.data_collator)
    if objective == "distil":
        trainer.set_objective(distil_loss)
    return trainer


def lora_targets(model: PreTrainedModel) -> str:
    """PEFT's pattern for the linear layers of a model's decoder, and of nothing else."""
    name, _ = decoder_of(owner_of(model))
    return rf"(.*\.)?{name}\.layers\..*\.({'|'.join(LORA_TARGETS)})"


def objective_of(args: DpvrArguments) -> str:
    """What a run trains for, where nothing is said: the base's answers, if the rows show the base other pictures.

    Raises:
        ValueError: if a method trains what the base itself runs on, for which it is no teacher.
    """
    if args.method == "dpvr":
        return args.objective or ("distil" if args.data == SWAPPED else "sft")
    if args.objective not in (None, "sft"):
        raise ValueError(
            f"--objective {args.objective} has the base as teacher, and --method {args.method} changes the base's own "
            "weights: use --objective sft, or --method dpvr."
        )
    return "sft"


def check_recipe(args: DpvrArguments, training: SideBranchSFTConfig) -> None:
    """
    Raises:
        ValueError: for an objective that the method has not, and options that lack another.
    """
    if objective_of(args) == "match" and args.fit_rows < 1:
        raise ValueError(
            f"--fit_rows is {args.fit_rows}, and --objective match measures on such rows how much the base's keys and "
            "values vary: give it 1 or more; 400 is the default."
        )
    if bool(training.first_stage_steps) != (training.first_stage_learning_rate is not None):
        raise ValueError(
            f"--first_stage_steps is {training.first_stage_steps} and --first_stage_learning_rate "
            f"{training.first_stage_learning_rate}: a first stage needs both."
        )


def collator_of(
    processor: ProcessorMixin, args: DpvrArguments, training: SideBranchSFTConfig, *, for_teacher: bool | None = None
) -> ReplyCollator:
    """The collator of a run; for the teacher too if its objective has one, or if that is wanted."""
    for_teacher = objective_of(args) != "sft" if for_teacher is None else for_teacher
    return ReplyCollator(processor, training.max_length, training.assistant_only_loss, for_teacher=for_teacher)


def _check_sharded(args: DpvrArguments, objective: str) -> None:
    if args.data in (MINIBENCH, SWAPPED) and args.eval_questions:
        raise ValueError(
            f"--eval_questions is {args.eval_questions}, but under FSDP and ZeRO-3 no process has the whole model "
            "to ask: use --eval_questions 0, and python -m dpvr.benchmarks.accuracy afterwards."
        )
    if objective != "sft":
        raise ValueError(
            f"--objective {objective} runs base and plan in one call, and under FSDP and ZeRO-3 no process has whole "
            "layers to do so: use --objective sft, or plain data parallelism."
        )
