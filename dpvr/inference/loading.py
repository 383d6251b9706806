"""What the chat can answer with: a DPVR repository, an adapter and its base, or a stock vision-language model.

name --adapter_config.json alone--> the adapter's base, and the side branch on it      AdapterWays, or Ways on a LLaVA
     --config.json--> the model, its own code only if it is trusted                    Ways, or StockWays
"""

from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from adapter_dpvr import DpvrConfig, find_weights
from configuration_dpvr import fields_that_run
from dpvr.inference.ways import is_dpvr_llava
from dpvr.models import load_model, load_stock
from hub_dpvr import ADAPTER_CONFIG_NAME, ADAPTER_KEY_PREFIX
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor


def load(name: str, *args: Any, **settings: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a DPVR-LLaVA, or an adapter for one and its base, as `load_any`.

    Raises:
        ValueError: as `load_any`, and for another model.
    """
    model, *where = _load(name, *args, **settings)
    if not is_dpvr_llava(model):
        raise ValueError(
            f"{name!r} holds a model of type {model.config.model_type!r}, neither a DPVR model nor an adapter: train "
            "a side branch on it with train_sft.py first."
        )
    return model, load_processor(*where)


def load_any(name: str, *args: Any, **settings: Any) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a DPVR repository, an adapter and its base, or a stock vision-language model, with its own processor.

    Args:
        base: for an adapter, where its base lies, if not where its config says.
        revision: of what is loaded by its name.
        device: where to put it; the GPU if there is one, unless said.
        trust_remote_code: load a repository with its own code; unless said, none of it is run.
        **loading: as `from_pretrained` takes it: dtype (that of the weights, unless said), attn_implementation, ...

    Raises:
        ValueError: if it is none of these, if it needs code that is not trusted, or if a base is given for what
            names its own.
    """
    model, *where = _load(name, *args, **settings)
    return model, load_processor(*where)


def _load(
    name: str,
    base: str | None = None,
    revision: str = "main",
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
    **loading: Any,
) -> tuple[PreTrainedModel | PeftModel, str, str]:
    """Load a model; returns it, and the name and revision under which its processor lies."""
    home, loading = name, {"dtype": "auto", **loading}
    if _find(name, ADAPTER_CONFIG_NAME, revision) and not _find(name, "config.json", revision):
        config = DpvrConfig.from_pretrained(name, revision=revision)
        home = base or config.base_model_name_or_path
        model = _on_base(config, home, name, revision, **loading)
        revision = "main"
    elif base is not None:
        raise ValueError(f"{name!r} is not a PEFT adapter, so it brings its own base: leave the base {base!r} out.")
    else:
        model = load_model(name, revision=revision, trust_remote_code=trust_remote_code, **loading)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), home, revision


def _on_base(config: DpvrConfig, base: str, name: str, revision: str, **loading: Any) -> PreTrainedModel | PeftModel:
    """Put an adapter's side branch on its base; no code of a base that a mere adapter names is run."""
    stock, info = load_stock(base, output_loading_info=True, **loading)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The base {base!r} lacks {len(missing)} weights, such as {missing[0]!r}: name the model that the adapter "
            "was trained on."
        )
    config.plan_for(stock.config)
    if not isinstance(stock, LlavaForConditionalGeneration):
        return PeftModel.from_pretrained(stock, name, revision=revision)
    model = DpvrLlavaForConditionalGeneration.from_llava(stock, **fields_that_run(config.dpvr_fields()))
    branch = load_file(find_weights(name, revision=revision))
    model.load_side_branch({key.removeprefix(ADAPTER_KEY_PREFIX): tensor for key, tensor in branch.items()})
    return model


def _find(name: str, file: str, revision: str) -> str | None:
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
