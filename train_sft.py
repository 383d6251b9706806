"""Fine-tune a LLaVA with TRL's SFTTrainer: a DPVR side branch (paper section 3.4), or LoRA or all of it as baselines.

    rows            MiniBench, or conversations of one's own (conversations.py)
      |
    --method dpvr   base, frozen --> shared stack --> side branch, trained --> fusion layer, frozen --> loss on replies
             lora   vanilla LLaVA with LoRA in the decoder's linear layers          the same rows in the same order
             full   vanilla LLaVA, projector and decoder trained                    the same rows in the same order
      |
    output_dir      the side branch alone, its config and code, the processor, training.json; adapter/ for PEFT
      |
    --push_to_hub   all of this and a card in one commit (hub_dpvr.py)

With the side branch nothing is stored for backward below it and in the text-only layers, so no gradient checkpointing
is wanted. A run that was killed goes on with --resume_from_checkpoint last, if it saved checkpoints. Of several
processes each takes its share of a step's rows; FSDP and ZeRO-3 spread the weights too.

    python train_sft.py                                          # dpvr-mini on MiniBench, on a CPU
    python train_sft.py --split_layer 4 --fusion_layers 5 6 7    # another layer plan
    python train_sft.py --split_layer auto                       # where the probe would split
    python train_sft.py --plan results/saturation/plan_0.45.yaml # what probe_saturation.py --find_plan has found
    python train_sft.py --routing kv_substitution --learning_rate 5e-4 --max_steps 100 --seed 1
    python train_sft.py --method lora --lora_r 16 --learning_rate 2e-4
    python train_sft.py --model_name_or_path me/dpvr-mini --push_to_hub --hub_model_id me/x
    python train_sft.py --config configs/llava_1.5_7b.yaml --data llava_v1_5_mix665k.json --image_folder images
    accelerate launch --config_file configs/accelerate_ddp.yaml train_sft.py --config configs/llava_1.5_7b.yaml ...
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaProcessor
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig
from dpvr.analysis.plan_search import causal_split, read_plan
from dpvr.data.conversations import Conversations, Row, data_fingerprint, load_conversations
from dpvr.data.prompts import AnsweredPrompts, in_batches
from dpvr.inference.evaluation import evaluate
from dpvr.pretraining.processor import CHAT_TEMPLATE, load_processor
from dpvr.record import run_record, without_folders
from dpvr.training.output_folder import save, side_branch_of, without_shards, write_record
from generation_dpvr import IGNORED_LABEL
from hub_dpvr import make_repository, require_hub_base, upload
from minibench.data import to_hf_dataset
from modeling_dpvr import DpvrLlavaForConditionalGeneration

OLDEST_TRANSFORMERS = "5.18"
HERE = os.path.dirname(os.path.abspath(__file__))
MINIBENCH = "minibench"
AUTO, AUTO_PROMPTS, AUTO_BATCH, AUTO_TOLERANCE = "auto", 128, 8, 0.05
WEIGHTS_NAME, TRAINER_STATE_NAME = "model.safetensors", "trainer_state.json"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
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
    "bf16",
)


@dataclass
class DpvrArguments:
    """What to train, and on what. A DPVR field left out keeps the value in the model's config."""

    method: Literal["dpvr", "lora", "full"] = field(
        default="dpvr", metadata={"help": "The side branch, or a baseline on the vanilla model."}
    )
    routing: str | None = field(default=None, metadata={"help": "late_fusion, persistent_context or kv_substitution."})
    plan: str | None = field(default=None, metadata={"help": "YAML of the DPVR fields, by probe_saturation.py."})
    split_layer: str | None = field(
        default=None,
        metadata={"help": "Layers that image and text share; auto: as many as the answers need, by measurement."},
    )
    num_side_layers: int | None = field(default=None, metadata={"help": "Decoder layers in the side branch."})
    num_fusion_layers: int | None = field(default=None, metadata={"help": "Last layers that fuse the streams again."})
    fusion_layers: list[int] | None = field(default=None, metadata={"help": "Deep layers that read the image."})
    side_branch_init: str | None = field(default=None, metadata={"help": "split_layer, identity or random."})
    data: str = field(
        default=MINIBENCH, metadata={"help": "minibench, a Hub data set, a folder, or LLaVA's .json or .jsonl."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a data set from the Hub or a folder."})
    image_folder: str | None = field(default=None, metadata={"help": "What the names in LLaVA's JSON stand in."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and report them."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs --max_steps."})
    num_rows: int = field(default=5000, metadata={"help": "Training pictures from MiniBench."})
    questions_per_row: int = field(default=7, metadata={"help": "Questions about one picture, in one conversation."})
    eval_questions: int = field(
        default=60,
        metadata={"help": "With MiniBench: validation questions of each task, before and after; 0: none."},
    )


@dataclass
class BaseArguments(ModelConfig):
    """TRL's ModelConfig; LoRA's targets default to all linear layers of the decoder."""

    model_name_or_path: str | None = field(
        default=HERE, metadata={"help": "A DPVR repository or a vanilla LLaVA (id or path)."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers; None: all of the decoder's."}
    )


@dataclass
class SideBranchSFTConfig(SFTConfig):
    """TRL's SFTConfig with the paper's recipe (section 3.4, learning rate scaled to dpvr-mini) as defaults."""

    output_dir: str | None = field(default="outputs/dpvr-mini-sft", metadata={"help": "Where the side branch goes."})
    learning_rate: float = field(default=3e-3, metadata={"help": "The paper's is 1e-4 for 7B."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows in a step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Share (below 1) or number of warm-up steps."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Refused: nothing is stored anyway."})
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available, metadata={"help": "On a GPU."})
    bf16: bool | None = field(default=False, metadata={"help": "bf16 autocast."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Loss on the assistant's tokens only."})
    max_length: int | None = field(
        default=None, metadata={"help": "None: never cut a row, least of all inside an image."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    save_strategy: str = field(default="no", metadata={"help": "steps: checkpoints to resume from, every save_steps."})
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False},
        metadata={"help": "Every process reads its own rows: those of a stream differ in length and cannot be sent."},
    )


class CardlessTrainer(SFTTrainer):
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
        saved = DpvrLlavaConfig.from_pretrained(resume_from_checkpoint).layer_plan()
        if saved != model.config.layer_plan():
            raise ValueError(
                f"Expected a checkpoint of the plan {model.config.layer_plan()}; got one of {saved}. Remedy: resume "
                "with the DPVR fields of the run that was stopped."
            )
        if self.is_fsdp_enabled:  # which keeps its shards beside the side branch
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model.load_side_branch(load_file(os.path.join(resume_from_checkpoint, WEIGHTS_NAME)))


class WholeModelTrainer(CardlessTrainer):
    """An SFTTrainer that resumes by `from_pretrained`: Trainer's own reading does not know the names LLaVA saves."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


TRAINERS = {"dpvr": SideBranchTrainer, "lora": SFTTrainer, "full": WholeModelTrainer}


class WithoutImageLabels:
    """A collator that leaves image tokens out of the labels, and under a plan the tokens right after them.

    Nobody is to learn to say an image's mark, and past the split images predict nothing. The models' own losses leave
    them out as well; here they are left out of the count that the loss is divided by.
    """

    def __init__(self, collate: Callable[[list[Row]], dict[str, torch.Tensor]], model: torch.nn.Module) -> None:
        self.collate, self.image, self.routed = collate, model.config.image_token_id, not model.model.plan.is_vanilla

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        marks = batch["input_ids"] == self.image
        if self.routed:
            marks = marks | torch.nn.functional.pad(marks[:, :-1], (1, 0))
        return batch | {"labels": batch["labels"].masked_fill(marks, IGNORED_LABEL)}


class AlwaysAPicture:
    """A collator that adds to rows of text alone one with a picture and without labels: neither loss nor gradient.

    Processes that share a model's shards must all run the same layers, tower and side branch included, or they wait
    for each other's shards for ever, or take one layer's for another's.
    """

    def __init__(self, collate: Callable[[list[Row]], dict[str, torch.Tensor]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        if any(row["images"] for row in rows):
            return self.collate(rows)
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        batch = self.collate([*rows, {"images": [Image.new("RGB", (32, 32))], "messages": [question]}])
        batch["labels"][-1] = IGNORED_LABEL
        return batch


def with_plan(args: DpvrArguments, flags: list[str]) -> DpvrArguments:
    """The arguments with the fields of --plan, which a --config may have otherwise and a flag may not."""
    plan = read_plan(args.plan) if args.plan else {}
    if twice := [name for name in plan if f"--{name}" in flags]:
        raise ValueError(
            f"Expected each DPVR field in the plan or as a flag; got {twice} in both. Remedy: leave the flags out, or "
            f"edit {args.plan!r}."
        )
    args = replace(args, **plan)
    if args.split_layer not in (None, AUTO):
        if not str(args.split_layer).isdecimal():
            raise ValueError(f"Expected --split_layer to be a number or {AUTO}; got {args.split_layer!r}. Remedy: 18.")
        args.split_layer = int(args.split_layer)
    return args


def find_split(base: BaseArguments, processor: LlavaProcessor, rows: Dataset | IterableDataset) -> int:
    """The split for --split_layer auto, by probe_saturation.py's causal rule, on the first rows with a picture."""
    quantization = get_quantization_config(base)
    model = DpvrLlavaForConditionalGeneration.from_pretrained(
        base.model_name_or_path,
        revision=base.model_revision,
        dtype=base.dtype,
        attn_implementation=base.attn_implementation or "sdpa",
        quantization_config=quantization,
        routing="none",
    )
    if quantization is None:  # else it is on its device already
        model.to(PartialState().device)
    batches = in_batches(AnsweredPrompts(processor, rows, AUTO_PROMPTS), AUTO_BATCH, model.device)
    split = broadcast_object_list([causal_split(model.eval(), batches, AUTO_TOLERANCE)])[0]
    print(f"--split_layer {split}: withdrawing the image there changes at most {AUTO_TOLERANCE:.0%} of the answers.")
    return split


def load_model(args: DpvrArguments, base: BaseArguments) -> DpvrLlavaForConditionalGeneration:
    """The model, with what `args.method` trains and nothing else requiring gradients.

    A side branch starts afresh, so that a run does not depend on an earlier one.
    """
    fields = {name: value for name in DPVR_FIELDS if (value := vars(args).get(name)) is not None}
    if args.method != "dpvr":
        if fields:
            raise ValueError(
                f"Expected no DPVR fields with --method {args.method}, which trains the vanilla model; got {fields}. "
                "Remedy: leave them out, or --method dpvr."
            )
        fields = {"routing": "none"}
    if args.method == "full" and base.dtype != "float32":
        raise ValueError(
            f"Expected --dtype float32 with --method full, whose small steps are lost in half precision; got "
            f"{base.dtype!r}. Remedy: --dtype float32 --bf16 true, which computes in bfloat16."
        )
    model = DpvrLlavaForConditionalGeneration.from_pretrained(
        base.model_name_or_path,
        revision=base.model_revision,
        dtype=base.dtype,
        attn_implementation=base.attn_implementation or "sdpa",
        quantization_config=get_quantization_config(base),
        new_side_branch=True,
        **fields,
    )
    if args.method == "dpvr":
        if not model.config.layer_plan().reads_side_branch:
            raise ValueError(
                "Expected a routing that reads the side branch, or there is nothing to train; got "
                f"{model.config.routing!r}, which leaves it exactly zero gradient. Remedy: late_fusion, "
                "persistent_context or kv_substitution."
            )
        model.side_branch.float()  # small steps are lost in half precision; the base keeps its own
        model.freeze_base()
        model.is_quantized = False  # to Trainer: what it trains is not, whatever the base is held in
    elif args.method == "full":
        model.model.vision_tower.requires_grad_(False)  # as in LLaVA's second stage
        model.side_branch.requires_grad_(False)
    return model


def load_marked_processor(name_or_path: str, revision: str = "main") -> LlavaProcessor:
    """The base's processor, with a chat template that marks replies and their end token for the loss.

    LLaVA-1.5's published template leaves the end token out; ours writes the same prompts.
    """
    processor = load_processor(name_or_path, revision=revision)
    if not marks_replies(processor):
        print("The base's chat template does not mark replies and their end: dpvr-mini's, of the same form, is used.")
        processor.chat_template = CHAT_TEMPLATE.replace("</s>", processor.tokenizer.eos_token)
    return processor


def marks_replies(processor: LlavaProcessor) -> bool:
    """Whether the chat template marks a reply for the loss, with the end token that teaches the model to stop."""
    if not processor.chat_template:
        return False
    talk = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    tokens = processor.tokenizer.apply_chat_template(
        talk,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [token for token, mark in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mark]
    return bool(kept) and kept[-1] == processor.tokenizer.eos_token_id


def with_bos(processor: LlavaProcessor) -> LlavaProcessor:
    """A copy for TRL, which tokenizes what the template writes as it stands: the template begins with the BOS token.

    Everywhere else the tokenizer puts it in front, so the template that is saved must not.
    """
    copied = copy.deepcopy(processor)
    copied.chat_template = "{{- bos_token -}}" + processor.chat_template
    return copied


def load_rows(args: DpvrArguments, seed: int) -> Conversations:
    """MiniBench's rows, or those of `args.data`, checked."""
    if args.data == MINIBENCH:
        return Conversations(to_hf_dataset("train", args.num_rows, args.questions_per_row, seed=seed), {})
    return load_conversations(
        args.data,
        split=args.data_split,
        image_folder=args.image_folder,
        skip_bad_rows=args.skip_bad_rows,
        streaming=args.streaming,
    )


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
    trainer = TRAINERS[args.method](
        model=model, args=training, train_dataset=rows, processing_class=with_bos(processor), peft_config=lora
    )
    trainer.data_collator = WithoutImageLabels(trainer.data_collator, model)
    if trainer.accelerator.distributed_type in SHARDED:
        if args.data == MINIBENCH and args.eval_questions:
            raise ValueError(
                "Expected --eval_questions 0 under FSDP and ZeRO-3, where no process has the whole model; got "
                f"{args.eval_questions}. Remedy: that, and benchmark_accuracy.py afterwards."
            )
        trainer.data_collator = AlwaysAPicture(trainer.data_collator)
    return trainer


def find_checkpoint(training: SideBranchSFTConfig) -> str | None:
    """The folder to resume from; "last" is the newest whole one in `output_dir`, a killed run may leave a torn one."""
    name = training.resume_from_checkpoint
    if name is None:
        return None
    found = Path(training.output_dir).glob("checkpoint-*") if name == "last" else [Path(name)]
    whole = [folder for folder in found if (folder / TRAINER_STATE_NAME).is_file()]  # which Trainer writes last
    if not whole:
        raise ValueError(
            f"Expected a whole checkpoint, with {TRAINER_STATE_NAME}; got none in "
            f"{training.output_dir if name == 'last' else name!r}. Remedy: name another one, or start anew with "
            "--save_strategy steps --save_steps 100 and without --resume_from_checkpoint."
        )
    return str(max(whole, key=lambda folder: int(folder.name.rsplit("-", 1)[1])) if name == "last" else whole[0])


def measure(
    model: DpvrLlavaForConditionalGeneration, processor: LlavaProcessor, name: str, routing: str, num_questions: int
) -> dict[str, Any]:
    """Score on MiniBench's validation questions under a routing, printed as one line of the table."""
    before = model.config.routing
    model.set_routing(routing)
    scores = evaluate(model, processor, split="validation", num_questions=num_questions, description=name)
    model.set_routing(before)
    tasks = "  ".join(f"{task} {score:.1%}" for task, score in scores["tasks"].items())
    print(f"{name:<16} mean {scores['mean']:6.1%}   {tasks}   (n = {scores['n']})", flush=True)
    return {"name": name, "routing": routing, **scores}


def require_transformers() -> None:
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"Expected transformers {OLDEST_TRANSFORMERS} or newer for training, which TRL's assistant-only loss on "
            f"pictures needs; got {transformers.__version__}. Remedy: pip install "
            f"'transformers>={OLDEST_TRANSFORMERS}'; loading and generation work with this version."
        )


def parse_args(argv: list[str] | None = None) -> tuple[DpvrArguments, SideBranchSFTConfig, BaseArguments]:
    require_transformers()
    args, training, base = TrlParser((DpvrArguments, SideBranchSFTConfig, BaseArguments)).parse_args_and_config(argv)
    return with_plan(args, sys.argv[1:] if argv is None else argv), training, base


def describe(
    model: DpvrLlavaForConditionalGeneration,
    args: DpvrArguments,
    training: SideBranchSFTConfig,
    base: BaseArguments,
    rows: Conversations,
) -> dict[str, Any]:
    """The part of the record that is known before the training."""
    from_minibench = [args.num_rows, args.questions_per_row, training.seed]
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
        "dpvr": {name: vars(model.config)[name] for name in DPVR_FIELDS if name != "base_model_name_or_path"},
        "lora": lora if args.method == "lora" else None,
        "recipe": {
            **{name: value for name in RECIPE if (value := training.to_dict().get(name)) is not None},
            "processes": training.world_size,
        },
        "data": {
            "name": without_folders(args.data),
            "on_the_hub": args.data != MINIBENCH and not Path(args.data).exists(),
            "fingerprint": from_minibench if args.data == MINIBENCH else data_fingerprint(rows.rows),
            "bad_rows": rows.bad_rows,
        },
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "seed": training.seed,
    }


def claim_repository(
    model: DpvrLlavaForConditionalGeneration, args: DpvrArguments, training: SideBranchSFTConfig
) -> str:
    """Return the id of the repository to push to: a run that could not push in the end is not to begin.

    Raises:
        ValueError: for LoRA, whose files are no DPVR repository, for another branch, and for a base in a local folder.
        OSError: if the Hub cannot be reached or does not let us.
    """
    if args.method == "lora" or training.hub_revision is not None:
        raise ValueError(
            "Expected --push_to_hub with --method dpvr or full, to the main branch; got "
            f"{args.method} and {training.hub_revision!r}. Remedy: hf upload <repository> {training.output_dir} after "
            "the training."
        )
    if args.method == "dpvr":
        require_hub_base(model.side_branch_base(training.output_dir))
    name = training.hub_model_id or Path(training.output_dir).name
    return make_repository(name, private=training.hub_private_repo, token=training.hub_token)


def main(args: DpvrArguments, training: SideBranchSFTConfig, base: BaseArguments) -> dict[str, Any]:
    """Train, save, measure before and after, push if asked to; returns what training.json holds."""
    transformers.set_seed(training.seed)
    unset_hf_deepspeed_config()  # ZeRO-3 would load shards, of which no side branch can start; the trainer sets it
    checkpoint = find_checkpoint(training)
    processor = load_marked_processor(base.model_name_or_path, base.model_revision)
    rows = load_rows(args, training.seed)
    if args.split_layer == AUTO and args.method == "dpvr":
        args.split_layer = find_split(base, processor, rows.rows)
    model = load_model(args, base)
    model.side_branch_base(training.output_dir)  # refuses the base's own folder now, not after the training
    is_main, routing, scores = PartialState().is_main_process, model.config.routing, []
    repo_id = claim_repository(model, args, training) if training.push_to_hub and is_main else None
    training.push_to_hub = False  # Trainer's own would push checkpoints and a card that knows nothing of the run
    measured = args.eval_questions if is_main and args.data == MINIBENCH else 0
    if measured:
        scores.append(measure(model, processor, "vanilla", "none", measured))
        if args.method == "dpvr":
            scores.append(measure(model, processor, "untrained branch", routing, measured))
    trainer = make_trainer(model, processor, rows.rows, args, training, base)
    record = describe(model, args, training, base, rows)
    if is_main:
        trainable, plan = record["trainable_parameters"], model.config.layer_plan()
        print(f"Training {trainable:,} of {model.num_parameters():,} parameters; plan {plan}")
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    record["train_seconds"] = time.perf_counter() - start
    record["resumed_from"] = os.path.basename(checkpoint) if checkpoint else None
    record["samples_per_second"] = None if checkpoint else result.metrics["train_samples_per_second"]
    record |= {"log": trainer.state.log_history, "accuracy": scores}
    save(trainer, processor, args.method, record, training.output_dir)
    if is_main:
        print(f"Saved in {training.output_dir} after {record['train_seconds']:.0f} s of training.")
    if measured:
        name = "trained branch" if args.method == "dpvr" else args.method
        scores.append(measure(model, processor, name, routing, measured))
        write_record(record, training.output_dir)
    if repo_id:
        print(f"Pushed to {upload(training.output_dir, repo_id, token=training.hub_token)}")
    return record


if __name__ == "__main__":
    main(*parse_args())
