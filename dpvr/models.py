"""Loading a vision-language model from a repository that may be a stranger's: its code is not run unasked.

config.json: model_type    dpvr_llava               -> DpvrLlavaForConditionalGeneration, the class of this project
                           llava, qwen3_vl, ...     -> the class of transformers
                           another                  -> refused, unless trust_remote_code says that its code may run
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from configuration_dpvr import LayerPlan, vanilla_plan
from decoders_dpvr import DECODER_NAMES
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from versions_dpvr import LINE_4

CUSTOM_GENERATE = "custom_generate/generate.py"


def load_model(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, **loading: Any
) -> PreTrainedModel:
    """Load a DPVR repository or a stock vision-language model with a class that is installed here.

    Args:
        name: a name on the Hub or a folder.
        trust_remote_code: load it with the code in the repository, if it has any.
        **loading: as `from_pretrained` takes it: dtype, attn_implementation, ...

    Raises:
        ValueError: if the model has another type, which only the repository's own code might load.
    """
    if trust_remote_code:
        return AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True, **loading)
    values, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    kind = values.get("model_type")
    if kind == DpvrLlavaForConditionalGeneration.config_class.model_type:
        return DpvrLlavaForConditionalGeneration.from_pretrained(name, revision=revision, **loading)
    if stock_model(kind) is None and "auto_map" in values:
        raise ValueError(
            f"{name!r} holds a model of type {kind!r}, which needs the code in its repository, and that code is not "
            "run unasked: read it, and if you trust it add --trust_remote_code (in Python: trust_remote_code=True)."
        )
    return load_stock(name, revision=revision, **loading)


def stock_model(kind: str | None) -> type | None:
    """The class of transformers for vision-language models of this type, or None if it has none."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(CONFIG_MAPPING[kind], None) if kind in CONFIG_MAPPING else None


def load_stock(name: str, *, revision: str = "main", **loading: Any) -> Any:
    """Load a vision-language model with transformers' class; arguments and result are those of `from_pretrained`.

    A DPVR repository with all weights is loaded as the LLaVA that it is based on.

    Raises:
        ValueError: if transformers has no vision-language model of its type, or this release would run code in the
            folder while it loads the weights.
    """
    kind = PretrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    model = stock_model("llava" if kind == DpvrLlavaForConditionalGeneration.config_class.model_type else kind)
    if model is None:
        raise ValueError(
            f"{name!r} holds a model of type {kind!r}, which is neither a DPVR model nor a vision-language model of "
            "the installed transformers: name one such as a LLaVA, Qwen3-VL or InternVL."
        )
    if LINE_4 and cached_file(name, CUSTOM_GENERATE, revision=revision, _raise_exceptions_for_missing_entries=False):
        raise ValueError(
            f"{name!r} brings its own generate in {CUSTOM_GENERATE}, which transformers 4 runs unasked: remove that "
            "file from a copy of the repository, or use transformers 5."
        )
    return model.from_pretrained(name, revision=revision, **loading)


def plan_of(model: nn.Module) -> LayerPlan:
    """The layer plan that a model runs, its own or its adapter's; of a stock model, all layers joint."""
    for module in model.modules():
        if hasattr(type(module), "plan") and any(name in module._modules for name in DECODER_NAMES):
            return module.plan
    return vanilla_plan(model.config.get_text_config().num_hidden_layers)


@contextmanager
def as_base(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A model that runs as its base meanwhile: under the routing "none", or without its adapters."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    elif isinstance(model, DpvrLlavaForConditionalGeneration):
        routing = model.config.routing
        model.set_routing("none")
        try:
            yield
        finally:
            model.set_routing(routing)
    else:
        yield
