"""Fine-tune the side branch of a DPVR-LLaVA with TRL's SFTTrainer; everything else stays frozen (paper section 3.4).

    base, frozen --> shared stack --> side branch, trained --> fusion layer, frozen --> loss on the assistant's tokens
                                                                    |
    output_dir: the side branch alone, its config and code, the processor, training.json

Nothing is stored for backward below the side branch and in the text-only layers, so no gradient checkpointing is
wanted.

    python train_sft.py                                          # dpvr-mini on MiniBench, on a CPU
    python train_sft.py --split_layer 4 --fusion_layers 5 6 7    # another layer plan
    python train_sft.py --routing kv_substitution --learning_rate 5e-4 --max_steps 100 --seed 1
    python train_sft.py --model_name_or_path path/to/llava --split_layer 7   # a vanilla LLaVA with the same processor
"""

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import LlavaProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from configuration_dpvr import DPVR_FIELDS
from loading_dpvr import is_side_branch
from minibench.data import to_hf_dataset
from minibench.evaluate import evaluate
from minibench.processor import load_processor
from minibench.record import run_record
from modeling_dpvr import DpvrLlavaForConditionalGeneration

OLDEST_TRANSFORMERS = "5.18"
HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class DpvrArguments:
    """What to train. A DPVR field left out keeps the value in the model's config."""

    model_name_or_path: str = field(
        default=HERE, metadata={"help": "A DPVR repository or a vanilla LLaVA (id or path)."}
    )
    routing: str | None = field(default=None, metadata={"help": "late_fusion, persistent_context or kv_substitution."})
    split_layer: int | None = field(default=None, metadata={"help": "Layers that image and text share."})
    num_side_layers: int | None = field(default=None, metadata={"help": "Decoder layers in the side branch."})
    num_fusion_layers: int | None = field(default=None, metadata={"help": "Last layers that fuse the streams again."})
    fusion_layers: list[int] | None = field(default=None, metadata={"help": "Deep layers that read the image."})
    side_branch_init: str | None = field(default=None, metadata={"help": "split_layer, identity or random."})
    num_rows: int = field(default=5000, metadata={"help": "Training pictures from MiniBench."})
    questions_per_row: int = field(default=7, metadata={"help": "Questions about one picture, in one conversation."})
    eval_questions: int = field(
        default=60, metadata={"help": "Validation questions of each task, before and after; 0: none."}
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
    save_strategy: str = field(default="no", metadata={"help": "The side branch is saved at the end."})


def load_model(args: DpvrArguments) -> DpvrLlavaForConditionalGeneration:
    """The model with a fresh side branch (so that a run does not depend on an earlier one) and a frozen base."""
    fields = {name: value for name in DPVR_FIELDS if (value := vars(args).get(name)) is not None}
    model = DpvrLlavaForConditionalGeneration.from_pretrained(args.model_name_or_path, **fields)
    plan = model.config.layer_plan()
    if not plan.reads_side_branch:
        raise ValueError(
            "Expected a routing that reads the side branch, or there is nothing to train; got "
            f"{model.config.routing!r}, which leaves it exactly zero gradient. Remedy: late_fusion, "
            "persistent_context or kv_substitution."
        )
    model.reset_side_branch()
    model.freeze_base()
    return model


def train(
    model: DpvrLlavaForConditionalGeneration,
    processor: LlavaProcessor,
    args: DpvrArguments,
    training: SideBranchSFTConfig,
) -> SFTTrainer:
    """Train the side branch on MiniBench; the loss curve is in `trainer.state.log_history`."""
    rows = to_hf_dataset("train", args.num_rows, args.questions_per_row, seed=training.seed)
    trainer = SFTTrainer(model=model, args=training, train_dataset=rows, processing_class=processor)
    trainer.train()
    return trainer


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


def save(
    model: DpvrLlavaForConditionalGeneration, processor: LlavaProcessor, record: dict[str, Any], output_dir: str
) -> None:
    """Write the side branch, config, code, processor and the run's record into `output_dir`."""
    model.save_pretrained(output_dir, side_branch_only=True)
    processor.save_pretrained(output_dir)
    with open(os.path.join(output_dir, "training.json"), "w") as file:
        json.dump(record, file, indent=2)


def require_transformers() -> None:
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"Expected transformers {OLDEST_TRANSFORMERS} or newer for training, which TRL's assistant-only loss on "
            f"pictures needs; got {transformers.__version__}. Remedy: pip install "
            f"'transformers>={OLDEST_TRANSFORMERS}'; loading and generation work with this version."
        )


def parse_args(argv: list[str] | None = None) -> tuple[DpvrArguments, SideBranchSFTConfig]:
    require_transformers()
    return TrlParser((DpvrArguments, SideBranchSFTConfig)).parse_args_and_config(args=argv)


def main(args: DpvrArguments, training: SideBranchSFTConfig) -> dict[str, Any]:
    """Train, measure before and after, save; returns what training.json holds."""
    transformers.set_seed(training.seed)
    processor = load_processor(args.model_name_or_path)
    model = load_model(args)
    model.side_branch_base(training.output_dir)  # refuses the base's own folder now, not after the training
    routing, rows = model.config.routing, []
    trainable = sum(parameter.numel() for name, parameter in model.named_parameters() if is_side_branch(name))
    print(f"Training {trainable:,} of {model.num_parameters():,} parameters; plan {model.config.layer_plan()}")
    if args.eval_questions:
        rows.append(measure(model, processor, "vanilla", "none", args.eval_questions))
        rows.append(measure(model, processor, "untrained branch", routing, args.eval_questions))
    start = time.perf_counter()
    trainer = train(model, processor, args, training)
    seconds = time.perf_counter() - start
    if args.eval_questions:
        rows.append(measure(model, processor, "trained branch", routing, args.eval_questions))
    record = {
        **run_record("train_sft.py"),
        "dpvr": {name: vars(model.config)[name] for name in DPVR_FIELDS if name != "base_model_name_or_path"},
        "trainable_parameters": trainable,
        "seed": training.seed,
        "train_seconds": seconds,
        "log": trainer.state.log_history,
        "accuracy": rows,
    }
    save(model, processor, record, training.output_dir)
    print(f"Saved the side branch in {training.output_dir} after {seconds:.0f} s of training.")
    return record


if __name__ == "__main__":
    main(*parse_args())
