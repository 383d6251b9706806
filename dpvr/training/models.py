"""The model that a run trains, with what its method trains and nothing else requiring gradients.

--method dpvr   the base, frozen, and a new side branch in float32
         lora   vanilla LLaVA; TRL adds LoRA to it
         full   vanilla LLaVA, projector and decoder trained
"""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import LlavaProcessor
from trl import get_quantization_config

from configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig, LayerPlan, with_fields
from dpvr.analysis.plan_search import TOLERANCE, causal_split
from dpvr.data.prompts import AnsweredPrompts, in_batches
from dpvr.training.arguments import BaseArguments
from dpvr.training.options import AUTO, DpvrArguments
from modeling_dpvr import DpvrLlavaForConditionalGeneration

AUTO_PROMPTS, AUTO_BATCH = 128, 8


def check_plan(args: DpvrArguments, base: BaseArguments) -> LayerPlan:
    """The layer plan that a run will have, from the base's config alone: nothing else is read.

    With `--split_layer auto` the plan is the one with the lowest split, which allows whatever any other one does.

    Raises:
        ValueError: for fields that contradict each other or the base, and that the method does not train with.
    """
    fields = _fields(args, base)
    if fields.get("split_layer") == AUTO:
        fields["split_layer"] = 1
    values, _ = DpvrLlavaConfig.get_config_dict(base.model_name_or_path, revision=base.model_revision)
    config = DpvrLlavaConfig.from_dict(with_fields(values, fields))
    plan = config.layer_plan()
    if args.method == "dpvr":
        _require_side_branch(config)
    return plan


def _fields(args: DpvrArguments, base: BaseArguments) -> dict[str, object]:
    fields = {name: value for name in DPVR_FIELDS if (value := vars(args).get(name)) is not None}
    if args.method != "dpvr":
        if fields:
            raise ValueError(
                f"--method {args.method} trains the vanilla model, which has no {', '.join(fields)}: leave these "
                "options out, or use --method dpvr."
            )
        fields = {"routing": "none"}
    if args.method == "full" and base.dtype != "float32":
        raise ValueError(
            f"--method full needs --dtype float32, as small steps are lost in {base.dtype}: use --dtype float32 with "
            "--bf16 true, which computes in bfloat16."
        )
    return fields


def refuse_another_plan(checkpoint: str | None, args: DpvrArguments, plan: LayerPlan) -> None:
    """
    Raises:
        ValueError: if a side branch that was trained under another plan is to be trained on.
    """
    if checkpoint is None or args.method != "dpvr" or args.split_layer == AUTO:
        return
    saved = DpvrLlavaConfig.from_pretrained(checkpoint).layer_plan()
    if saved != plan:
        raise ValueError(
            f"The checkpoint has the layer plan {saved} and this run {plan}: resume with the routing and layers of "
            "the run that was stopped."
        )


def load_model(args: DpvrArguments, base: BaseArguments) -> DpvrLlavaForConditionalGeneration:
    """The model of a method. A side branch starts afresh, so that a run does not depend on an earlier one.

    Raises:
        ValueError: for fields and types that the method does not train with.
    """
    fields = _fields(args, base)
    model = _from_pretrained(base, new_side_branch=True, **fields)
    if args.method == "dpvr":
        _prepare_side_branch(model)
    elif args.method == "full":
        model.model.vision_tower.requires_grad_(False)  # as in LLaVA's second stage
        model.side_branch.requires_grad_(False)
    return model


def _require_side_branch(config: DpvrLlavaConfig) -> None:
    if not config.layer_plan().reads_side_branch:
        raise ValueError(
            f"Under the routing {config.routing!r} no layer reads the side branch, so there is nothing to "
            "train: use late_fusion, persistent_context or kv_substitution."
        )


def _prepare_side_branch(model: DpvrLlavaForConditionalGeneration) -> None:
    _require_side_branch(model.config)
    model.side_branch.float()  # small steps are lost in half precision; the base keeps its own
    model.freeze_base()
    model.is_quantized = False  # to Trainer: what it trains is not, whatever the base is held in


def find_split(base: BaseArguments, processor: LlavaProcessor, rows: Dataset | IterableDataset) -> int:
    """The split for --split_layer auto: the causal rule of dpvr.analysis.probe on the first rows with a picture."""
    model = _from_pretrained(base, routing="none")
    if get_quantization_config(base) is None:  # else it is on its device already
        model.to(PartialState().device)
    batches = in_batches(AnsweredPrompts(processor, rows, AUTO_PROMPTS), AUTO_BATCH, model.device)
    split = broadcast_object_list([causal_split(model.eval(), batches, TOLERANCE)])[0]
    print(f"--split_layer {split}: removing the image there changes at most {TOLERANCE:.0%} of the answers.")
    return split


def _from_pretrained(base: BaseArguments, **fields: object) -> DpvrLlavaForConditionalGeneration:
    return DpvrLlavaForConditionalGeneration.from_pretrained(
        base.model_name_or_path,
        revision=base.model_revision,
        dtype=base.dtype,
        attn_implementation=base.attn_implementation or "sdpa",
        quantization_config=get_quantization_config(base),
        **fields,
    )
