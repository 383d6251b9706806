"""The model that a run trains, with what its method trains and nothing else requiring gradients.

--method dpvr   the base, frozen, and a new side branch or latent in float32: on a LLaVA in a DPVR model, on any other
                vision-language model in a PEFT adapter
         lora   the vanilla model; TRL adds LoRA to it
         full   the vanilla model, projector and decoder trained
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin
from trl import get_quantization_config

from adapter_dpvr import DpvrConfig
from configuration_dpvr import DPVR_FIELDS, DpvrLlavaConfig, LayerPlan, with_fields
from dpvr.analysis.plan_search import TOLERANCE, causal_split
from dpvr.cost_table import load_config
from dpvr.data.prompts import AnsweredPrompts, in_batches
from dpvr.models import load_stock
from dpvr.training.arguments import BaseArguments
from dpvr.training.options import AUTO, DpvrArguments
from modeling_dpvr import DpvrLlavaForConditionalGeneration

AUTO_PROMPTS, AUTO_BATCH = 128, 8
TOWERS = ("vision_tower", "visual", "vision_model")  # what models call the encoder of their images


def check_plan(args: DpvrArguments, base: BaseArguments) -> LayerPlan:
    """The layer plan that a run will have, from the base's config alone: nothing else is read.

    With `--split_layer auto` the plan is the one with the lowest split, which allows whatever any other one does.

    Raises:
        ValueError: for fields that contradict each other or the base, and that the method does not train with.
    """
    fields = _fields(args, base)
    if fields.get("split_layer") == AUTO:
        fields["split_layer"] = 1
    if is_llava(base):
        values, _ = DpvrLlavaConfig.get_config_dict(base.model_name_or_path, revision=base.model_revision)
        config = DpvrLlavaConfig.from_dict(with_fields(values, fields))
        plan, routing = config.layer_plan(), config.routing
    elif args.method != "dpvr":
        return LayerPlan(0, ())
    else:
        adapter = DpvrConfig(**_of_adapter(fields, base))
        plan, routing = adapter.plan_for(load_config(base.model_name_or_path, base.model_revision)), adapter.routing
    if args.method == "dpvr" and (plan.is_vanilla or not plan.reads_side_branch):
        raise ValueError(
            f"Under the routing {routing!r} no layer reads the side branch, so there is nothing to train: use "
            "late_fusion, persistent_context, kv_substitution or latent."
        )
    return plan


def is_llava(base: BaseArguments) -> bool:
    """Whether the base is a LLaVA-1.5 or a DPVR repository, whose side branch is part of the model."""
    values, _ = PretrainedConfig.get_config_dict(base.model_name_or_path, revision=base.model_revision)
    return values.get("model_type") in ("llava", DpvrLlavaConfig.model_type)


def _fields(args: DpvrArguments, base: BaseArguments) -> dict[str, Any]:
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


def _of_adapter(fields: dict[str, Any], base: BaseArguments) -> dict[str, Any]:
    """Fields of a `DpvrConfig`.

    Raises:
        ValueError: if there is no split, for which a model without DPVR fields has no value.
    """
    split = fields.get("split_layer", fields.get("latent_split_layer"))
    if split is None:
        raise ValueError(
            f"{base.model_name_or_path!r} has no layer plan of its own: choose a --split_layer, such as an eighth of "
            "its depth, or auto; python -m dpvr.costs shows what each costs."
        )
    return {"split_layer": max(1, split), **fields}


def refuse_another_plan(checkpoint: str | None, args: DpvrArguments, base: BaseArguments, plan: LayerPlan) -> None:
    """
    Raises:
        ValueError: if a side branch that was trained under another plan is to be trained on.
    """
    if checkpoint is None or args.method != "dpvr" or args.split_layer == AUTO:
        return
    if is_llava(base):
        saved = DpvrLlavaConfig.from_pretrained(checkpoint).layer_plan()
    else:
        config = load_config(base.model_name_or_path, base.model_revision)
        saved = DpvrConfig.from_pretrained(checkpoint).plan_for(config)
    if saved != plan:
        raise ValueError(
            f"The checkpoint has the layer plan {saved} and this run {plan}: resume with the routing and layers of "
            "the run that was stopped."
        )


def load_model(args: DpvrArguments, base: BaseArguments) -> PreTrainedModel | PeftModel:
    """The model of a method. A side branch or latent starts afresh, so that no run depends on an earlier one.

    Raises:
        ValueError: for fields and types that the method does not train with.
    """
    fields = _fields(args, base)
    model = _load_llava(args, base, fields) if is_llava(base) else _load_other(args, base, fields)
    if args.method == "full":
        for name in TOWERS:  # as in LLaVA's second stage
            if (tower := getattr(model.model, name, None)) is not None:
                tower.requires_grad_(False)
        if isinstance(model, DpvrLlavaForConditionalGeneration):
            model.side_branch.requires_grad_(False)
    return model


def _load_llava(args: DpvrArguments, base: BaseArguments, fields: dict[str, Any]) -> DpvrLlavaForConditionalGeneration:
    if check_plan(args, base).latent_stride:
        model = _from_pretrained(base, **fields)
        model.reset_latent()
    else:
        model = _from_pretrained(base, new_side_branch=True, **fields, latent_rank=None)
    if args.method != "dpvr":
        return model
    model.side_branch.float()  # small steps are lost in half precision; the base keeps its own
    model.freeze_base()
    if model.side_branch.has_latent:  # and the side branch beside it is not read
        model.side_branch.requires_grad_(False).latent.requires_grad_(True)
    model.is_quantized = False  # to Trainer: what it trains is not, whatever the base is held in
    return model


def _load_other(args: DpvrArguments, base: BaseArguments, fields: dict[str, Any]) -> PreTrainedModel | PeftModel:
    model = load_stock(base.model_name_or_path, revision=base.model_revision, **_loading(base))
    if args.method != "dpvr":
        return model
    adapted = get_peft_model(model, DpvrConfig(**_of_adapter(fields, base)))
    model.is_quantized = False
    return adapted


def find_split(base: BaseArguments, processor: ProcessorMixin, rows: Dataset | IterableDataset) -> int:
    """The split for --split_layer auto: the causal rule of dpvr.analysis.probe on the first rows with a picture."""
    if is_llava(base):
        model = _from_pretrained(base, routing="none")
    else:
        model = load_stock(base.model_name_or_path, revision=base.model_revision, **_loading(base))
    if get_quantization_config(base) is None:  # else it is on its device already
        model.to(PartialState().device)
    batches = in_batches(AnsweredPrompts(processor, rows, AUTO_PROMPTS), AUTO_BATCH, model.device)
    split = broadcast_object_list([causal_split(model.eval(), batches, TOLERANCE)])[0]
    print(f"--split_layer {split}: removing the image there changes at most {TOLERANCE:.0%} of the answers.")
    return split


def method_fields(model: PreTrainedModel | PeftModel) -> dict[str, Any] | None:
    """The fields of the method that a model has, in its config or in an adapter's; None for a stock model."""
    if isinstance(model, DpvrLlavaForConditionalGeneration):
        return model.config.dpvr_fields()
    adapters = getattr(model, "peft_config", {}).values()
    return next((each.dpvr_fields() for each in adapters if isinstance(each, DpvrConfig)), None)


def _from_pretrained(base: BaseArguments, **fields: Any) -> DpvrLlavaForConditionalGeneration:
    where = {"revision": base.model_revision, **_loading(base)}
    return DpvrLlavaForConditionalGeneration.from_pretrained(base.model_name_or_path, **where, **fields)


def _loading(base: BaseArguments) -> dict[str, Any]:
    return {
        "dtype": base.dtype,
        "attn_implementation": base.attn_implementation or "sdpa",
        "quantization_config": get_quantization_config(base),
    }
