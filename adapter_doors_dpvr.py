"""The doors of PEFT through which a saved adapter comes, with the checks of this method in each of them (PEFT 0.21).

    PeftModel.from_pretrained    AutoPeftModel    PeftModel.load_adapter    transformers' model.load_adapter
                \\________________________\\______________/_______________________/
                         from_json_file       a JSON object of a known method, without misspelt fields
                         from_pretrained      of the config: names, shapes and numbers of the weights
                                |
                         BaseTuner            does it fit the base? (adapter_dpvr.py)

PEFT finds a config's class in its file, and does not ask that class to read it. So its own functions are wrapped, each
in one place for all doors. Files of other methods only get a clearer message if they are broken.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, auto, mixed_model
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from adapter_files_dpvr import METHOD, check_adapter_config, find_weights, read_shapes

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_from_json_file = PeftConfigMixin.from_json_file.__func__
_config_from_pretrained = PeftConfigMixin.from_pretrained.__func__
_model_from_pretrained, _load_adapter = PeftModel.from_pretrained.__func__, PeftModel.load_adapter
_auto_from_pretrained = auto._BaseAutoPeftModel.from_pretrained.__func__
_check_mixed = mixed_model._check_config_compatible


@wraps(_from_json_file)
def from_json_file(cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> dict[str, Any]:
    needs_method = cls in (PeftConfig, PEFT_TYPE_TO_CONFIG_MAPPING.get(METHOD))
    check_adapter_config(path_json_file, PEFT_TYPE_TO_CONFIG_MAPPING, needs_method)
    return _from_json_file(cls, path_json_file, **kwargs)


@wraps(_config_from_pretrained)
def config_from_pretrained(
    cls: type[PeftConfig], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
) -> PeftConfig:
    config = _config_from_pretrained(cls, pretrained_model_name_or_path, subfolder, **kwargs)
    if config.peft_type == METHOD:
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs} | {"subfolder": subfolder or ""}
        config.saved_shapes = read_shapes(find_weights(pretrained_model_name_or_path, **where))
    return config


@wraps(_model_from_pretrained)
def model_from_pretrained(
    cls: type[PeftModel],
    model: nn.Module,
    model_id: str,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    **kwargs: Any,
) -> PeftModel:
    hub = {name: kwargs[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in kwargs}
    method = PeftConfig._get_peft_type(model_id, **hub) if config is None else config.peft_type
    with left_in_place(model) if method == METHOD else nullcontext():
        return _model_from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **kwargs)


@wraps(_load_adapter)
def load_adapter(self: PeftModel, model_id: str, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
    """As PEFT's, which keeps the config if the name is in use: a side branch needs the plan saved with its weights."""
    if not any(config.peft_type == METHOD for config in self.peft_config.values()):
        return _load_adapter(self, model_id, adapter_name, is_trainable=is_trainable, **kwargs)
    kwargs["key_mapping"] = None  # saved under the model's own names, not those of its old checkpoints
    present = self.peft_config.get(adapter_name)
    # a new one was made by `from_pretrained` just before, with the saved config or with one that the caller passed
    if present is not None and (present.loaded or present.inference_mode == is_trainable):
        hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "subfolder") if name in kwargs}
        self.base_model.replace_adapter(adapter_name, type(present).from_pretrained(model_id, **hub))
    with left_in_place(self.get_base_model()):
        return _load_adapter(self, model_id, adapter_name, is_trainable=is_trainable, **kwargs)


@contextmanager
def left_in_place(model: nn.Module) -> Iterator[None]:
    """Without the device map, for which PEFT would take an offloaded base apart and dispatch it again."""
    device_map = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


@wraps(_auto_from_pretrained)
def auto_from_pretrained(cls: type, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> PeftModel:
    try:
        return _auto_from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
    except (OSError, HFValidationError, AttributeError, ImportError) as error:
        where = {name: kwargs[name] for name in ("subfolder", *HUB_ARGUMENTS) if name in kwargs}
        config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        if config.peft_type != METHOD:
            raise
        raise ValueError(
            f"The base of the adapter {pretrained_model_name_or_path!r} cannot be loaded: its config says "
            f"base_model_name_or_path={config.base_model_name_or_path!r} and auto_mapping={config.auto_mapping!r}. "
            "Load the base yourself, and then PeftModel.from_pretrained(base, adapter)."
        ) from error


@wraps(_check_mixed)
def check_config_compatible(peft_config: PeftConfig) -> None:
    if peft_config.peft_type == METHOD:
        raise ValueError(
            "A PeftMixedModel cannot hold a side branch, as it takes LoRA and similar methods alone: call "
            "inject_adapter_in_model(lora, model), then get_peft_model(model, DpvrConfig(...))."
        )
    _check_mixed(peft_config)


PeftConfigMixin.from_json_file = classmethod(from_json_file)
PeftConfigMixin.from_pretrained = classmethod(config_from_pretrained)
PeftModel.from_pretrained = classmethod(model_from_pretrained)
PeftModel.load_adapter = load_adapter
auto._BaseAutoPeftModel.from_pretrained = classmethod(auto_from_pretrained)
mixed_model._check_config_compatible = check_config_compatible
