"""The options of train_sft.py that are the project's own, and its `--help`. Light to import: no library is loaded.

MethodOptions, DataOptions   what to train, and on what                 -> DpvrArguments
BaseOptions, RecipeOptions   defaults of ours for fields of TRL's       -> arguments.py mixes them in
TRAINER_OPTIONS              TRL's and Trainer's own that are used most, named in --help and nowhere else
"""

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from dpvr.command_line import Parser

HERE = str(Path(__file__).parents[2])
MINIBENCH, SWAPPED = "minibench", "minibench-swapped"
AUTO = "auto"


@dataclass
class MethodOptions:
    """A field of the layer plan that is left out keeps the value in the model's config."""

    method: Literal["dpvr", "lora", "full"] = field(
        default="dpvr",
        metadata={"help": "dpvr: the side branch or the latent; lora, full: baselines on the vanilla model."},
    )
    objective: Literal["sft", "match", "distil"] | None = field(
        default=None,
        metadata={
            "help": "sft: the replies; match: the base's keys and values; distil: the base's own answers, and neither "
            "needs labels. Default: distil for minibench-swapped, else sft."
        },
    )
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "With MiniBench: trained on the same rows too, for the last table: late_fusion (default for a "
            "latent on minibench-swapped), kv_substitution, persistent_context, lora; none: nothing."
        },
    )
    routing: str | None = field(
        default=None, metadata={"help": "late_fusion, persistent_context, kv_substitution or latent."}
    )
    plan: str | None = field(
        default=None, metadata={"help": "YAML file with a layer plan, written by dpvr.analysis.probe --find_plan."}
    )
    split_layer: str | None = field(
        default=None,
        metadata={"help": "Number of layers that image and text share; auto: measured on the first rows."},
    )
    num_side_layers: int | None = field(default=None, metadata={"help": "Decoder layers in the side branch."})
    num_fusion_layers: int | None = field(default=None, metadata={"help": "K, how many of the last layers fuse."})
    fusion_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers past the split that read the image, in place of the last K."}
    )
    side_branch_init: str | None = field(default=None, metadata={"help": "split_layer, identity or random."})
    latent_rank: int | None = field(default=None, metadata={"help": "Of the latent that routing latent reads."})
    latent_split_layer: int | None = field(default=None, metadata={"help": "The split of the latent, from 0 on."})
    latent_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that read it; default: all past its split."}
    )
    latent_side_layers: int | None = field(default=None, metadata={"help": "Decoder layers before the latent."})
    latent_stride: int | None = field(default=None, metadata={"help": "Only every k-th image token is read."})
    latent_score: str | None = field(
        default=None, metadata={"help": "norm or distance: those that stand out are read, not every k-th."}
    )
    fit_rows: int = field(
        default=400,
        metadata={"help": "Rows on whose pictures a latent is fitted, in closed form, before it is trained."},
    )


@dataclass
class DataOptions:
    data: str = field(
        default=SWAPPED,
        metadata={
            "help": "minibench; minibench-swapped, with red and blue exchanged in its pictures, which the base sees "
            "as they were; a Hub data set, a folder, or LLaVA's .json or .jsonl."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a data set from the Hub or a folder."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that the picture names in LLaVA's JSON are relative to."}
    )
    allow_remote_images: bool = field(
        default=False, metadata={"help": "Also read a data set's pictures from web addresses and other folders."}
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and report them."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs --max_steps."})
    num_rows: int = field(default=960, metadata={"help": "With MiniBench: number of training pictures."})
    eval_questions: int = field(
        default=60,
        metadata={"help": "With MiniBench: validation questions of each task, before and after; 0: none."},
    )


@dataclass
class DpvrArguments(MethodOptions, DataOptions):
    """What to train, and on what."""


@dataclass
class BaseOptions:
    model_name_or_path: str | None = field(
        default=HERE, metadata={"help": "A DPVR repository or a LLaVA, Hub id or folder; default: dpvr-mini."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "LoRA: names of linear layers; default: all of the decoder's."}
    )


def _on_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass
class RecipeOptions:
    """The paper's recipe (section 3.4), with the learning rate that suits dpvr-mini's latent."""

    output_dir: str | None = field(default="outputs/dpvr-mini-sft", metadata={"help": "Where the side branch goes."})
    learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Peak learning rate; suits dpvr-mini's latent. Its late fusion: 3e-3; the paper's 7B: 1e-4."
        },
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a step on each device."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    first_stage_steps: float = field(
        default=0, metadata={"help": "Steps at first_stage_learning_rate before the schedule: a share if below 1."}
    )
    first_stage_learning_rate: float | None = field(default=None, metadata={"help": "A low one, paper section 6."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a share of the steps if below 1, else steps."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Refused: nothing below the side branch is stored for backward anyway."}
    )
    dataloader_pin_memory: bool = field(default_factory=_on_a_gpu, metadata={"help": "Default: on a GPU."})
    bf16: bool | None = field(default=False, metadata={"help": "bfloat16 autocast."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Loss on the replies' tokens only."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens at which a row is cut; default: never, least of all inside an image."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    save_strategy: str = field(default="no", metadata={"help": "steps: checkpoints to resume from, every save_steps."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in a used output_dir: deletes what earlier runs wrote there, nothing else."},
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False},
        metadata={"help": "Every process reads its own rows: those of a stream differ in length and cannot be sent."},
    )


TRAINER_OPTIONS = {  # title -> option -> (what its value is called, help)
    "model": {
        "model_revision": ("TEXT", "Branch, tag or commit of the model on the Hub."),
        "dtype": ("TEXT", "Of the frozen base: float32 (default), bfloat16, float16 or auto."),
        "attn_implementation": ("TEXT", "sdpa (default), eager or flex_attention."),
        "load_in_4bit": (None, "Hold the frozen base in 4 bits (pip install bitsandbytes)."),
        "lora_r": ("N", "LoRA: rank."),
        "lora_alpha": ("N", "LoRA: scale."),
    },
    "recipe": {
        "gradient_accumulation_steps": ("N", "Batches whose gradients make one step."),
        "max_steps": ("N", "Stop after so many steps."),
        "seed": ("N", "Of rows, their order and random weights."),
    },
    "output": {
        "save_steps": ("N", "Steps between two checkpoints."),
        "resume_from_checkpoint": ("TEXT", "last, or the folder of a checkpoint."),
        "report_to": ("TEXT ...", "tensorboard, trackio, wandb: where the loss curve goes beside training.json."),
        "push_to_hub": (None, "Push output_dir with a model card when the run ends."),
        "hub_model_id": ("TEXT", "Repository to push to, me/x."),
        "hub_private_repo": (None, "Make a new repository private."),
    },
}
OUTPUT_FIELDS = ("output_dir", "overwrite_output_dir", "logging_steps", "save_strategy")
NOT_IN_HELP = ("gradient_checkpointing", "dataloader_pin_memory", "accelerator_config", "assistant_only_loss")


def make_help(doc: str | None) -> Parser:
    """The parser behind `--help`: the docstring and the project's options in groups. It parses nothing else."""
    parser = Parser(doc, prog="train_sft.py", usage="python train_sft.py [options]")
    recipe = [f for f in fields(RecipeOptions) if f.name not in NOT_IN_HELP]
    _add(parser, "what to train", fields(MethodOptions))
    _add(parser, "data", fields(DataOptions))
    _add(parser, "model", fields(BaseOptions), TRAINER_OPTIONS["model"])
    _add(parser, "recipe", [f for f in recipe if f.name not in OUTPUT_FIELDS], TRAINER_OPTIONS["recipe"])
    _add(parser, "output", [f for f in recipe if f.name in OUTPUT_FIELDS], TRAINER_OPTIONS["output"])
    more = parser.add_argument_group("more")
    more.add_argument("--config", metavar="FILE", help="YAML file of options; the command line overrides it.")
    more.add_argument("--help-all", action="store_true", help="Show TRL's and Trainer's several hundred options too.")
    return parser


def _add(
    parser: Parser, title: str, own: Iterable[Field], others: dict[str, tuple[str | None, str]] | None = None
) -> None:
    group = parser.add_argument_group(title)
    for option in own:
        default = None if option.default in (MISSING, HERE, False) else option.default
        _add_one(group, option.name, _metavar(option.type), option.metadata["help"], default)
    for name, (metavar, text) in (others or {}).items():
        _add_one(group, name, metavar, text)


def _add_one(group: Any, name: str, metavar: str | None, text: str, default: Any = None) -> None:
    if metavar is None:
        group.add_argument(f"--{name}", action="store_true", help=text)
    else:
        group.add_argument(f"--{name}", metavar=metavar, default=default, help=text)


def _metavar(kind: Any) -> str | None:
    """What the value of an option of this type is called in the help; None for a flag."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        return f"{_metavar(get_args(kind)[0])} ..."
    return {bool: None, int: "N", float: "X"}.get(kind, "TEXT")
