"""DPVR as a PEFT method: a side branch on a stock LLaVA, added, trained, saved, switched and taken off again.

    LlavaForConditionalGeneration                  get_peft_model(llava, DpvrConfig(split_layer=18))
        model: LlavaModel            ->            model: DpvrLayer
        lm_head                                        base_layer: LlavaModel      untouched, frozen
                                                       side_branch.<adapter>       trained and saved, nothing else

`DpvrLayer` runs the same `routed_forward` as `DpvrLlavaModel`, so both give the same logits, and an adapter fits a
stock LLaVA and a `DpvrLlavaForConditionalGeneration` alike. Paper section 3.4.

    import adapter_dpvr                                      # PEFT learns the method's name, "DPVR"
    model = PeftModel.from_pretrained(llava, "me/branch")    # checked against the base before anything is changed
    with model.disable_adapter(): ...                        # the base, bit for bit

    adapter_config.json, adapter_model.safetensors           base_model.model.model.side_branch.<layer>.<weight>
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.utils import cached_file

from configuration_dpvr import DPVR_FIELDS, JOINT, DpvrLlavaConfig, LayerPlan
from loading_dpvr import make_side_branch, reset_side_branch
from sharing_dpvr import ADAPTER_CONFIG_NAME, ADAPTER_KEY_PREFIX, ADAPTER_WEIGHTS_NAME
from two_stream_dpvr import check_support, routed_forward, stock_class
from versions_dpvr import argument_names

PEFT_TYPE = "DPVR"
PICKLE_NAME = "adapter_model.bin"
TARGET = "model"  # what LlavaForConditionalGeneration calls its LlavaModel
FIELDS = tuple(name for name in DPVR_FIELDS if name != "base_model_name_or_path")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

Shapes = dict[str, tuple[int, ...]]


@dataclass
class DpvrConfig(PeftConfig):
    """What a side branch is and how the decoder's layers use it; the fields of `DpvrLlavaConfig`."""

    routing: str = field(
        default="late_fusion", metadata={"help": "late_fusion, persistent_context, kv_substitution or text_only."}
    )
    split_layer: int = field(default=18, metadata={"help": "Layers that image and text share; the paper's 7B: 18."})
    num_side_layers: int = field(default=1, metadata={"help": "Decoder layers in the side branch."})
    num_fusion_layers: int = field(default=1, metadata={"help": "Last layers that fuse the streams again."})
    fusion_layers: list[int] | None = field(default=None, metadata={"help": "Deep layers that read the image."})
    side_branch_init: str = field(default="split_layer", metadata={"help": "split_layer, identity or random."})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Depth of the base's decoder; filled in from the base."}
    )

    target_modules = TARGET  # not a choice, so not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.saved_shapes: Shapes | None = None  # of the weights beside the config, once it was read from a file

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "DpvrConfig":
        """Read a saved adapter's config, and look at the weights beside it: PEFT reads them when it is too late.

        Raises:
            ValueError: if the weights are missing, pickled, damaged, or not those of the layers that the config names.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        path = find_weights(pretrained_model_name_or_path, subfolder=subfolder or "", **hub)
        config.saved_shapes = read_shapes(path)
        return config

    def for_base(self, base: LlavaConfig) -> DpvrLlavaConfig:
        """Return the DPVR config of a base with this adapter, or raise ValueError if the two do not fit."""
        if self.saved_shapes is not None and self.num_hidden_layers != base.text_config.num_hidden_layers:
            raise ValueError(
                f"Expected a base of {self.num_hidden_layers} decoder layers, as this adapter was made for; got one "
                f"of {base.text_config.num_hidden_layers}. Remedy: load it on {self.base_model_name_or_path!r}."
            )
        values = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "auto_map")}
        config = DpvrLlavaConfig(**{**values, **{name: vars(self)[name] for name in FIELDS}})
        config.text_config, config.vision_config = base.text_config, base.vision_config
        check_support(config)
        if config.routing == "none":
            raise ValueError(
                "Expected a routing that an adapter can change; got 'none', the base itself. Remedy: late_fusion, or "
                "disable_adapter()."
            )
        return config


class DpvrLayer(nn.Module, BaseTunerLayer):
    """A `LlavaModel` and the side branches of its adapters; the active one's plan is run."""

    adapter_layer_names = ("side_branch",)

    def __init__(self, base_layer: LlavaModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.side_branch = nn.ModuleDict()
        self.plans: dict[str, LayerPlan] = {}
        self.merged_adapters = []
        self.stock = stock_class(base_layer)

    def __getattr__(self, name: str) -> Any:
        """The model around it asks for the tower, the embeddings, the image features, ... of its LlavaModel."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def update_layer(self, adapter_name: str, peft_config: DpvrConfig) -> None:
        """Add a side branch, started as the config says."""
        config = peft_config.for_base(self.base_layer.config)
        layers = self.base_layer.language_model.layers
        like = next(weight for weight in layers[config.split_layer].parameters() if weight.is_floating_point())
        side_branch = make_side_branch(layers, config)
        if all(weight.device.type != "meta" for weight in side_branch.parameters()):  # low_cpu_mem_usage
            side_branch.to(like.device, like.dtype)
            reset_side_branch(side_branch, layers, config)
        self.side_branch[adapter_name] = side_branch
        self.plans[adapter_name] = config.layer_plan()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Expected one side branch at a time; got {names}. Remedy: set_adapter with one of the names."
            )
        super().set_adapter(names, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        like = next(self.base_layer.language_model.layers[self.plans[adapter_name].split_layer].parameters())
        self.side_branch[adapter_name].to(device or like.device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.plans.pop(adapter_name, None)

    def merge(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "Expected unload(); got a merge. A side branch is a path of its own and has no base weights to go into. "
            "Remedy: keep the adapter, or take it off with unload()."
        )

    @property
    def active_branch(self) -> str | None:
        """The name of the side branch that runs, or None where the base does."""
        active = [name for name in self.active_adapters if name in self.plans]
        return active[0] if active and not self.disable_adapters else None

    @property
    def plan(self) -> LayerPlan:
        """What every decoder layer does."""
        if self.active_branch is not None:
            return self.plans[self.active_branch]
        if hasattr(self.base_layer, "side_branch"):
            return self.base_layer.plan
        depth = len(self.base_layer.language_model.layers)
        return LayerPlan(depth, (JOINT,) * depth)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's, under the active adapter's plan."""
        if self.active_branch is None and hasattr(self.base_layer, "side_branch"):
            return self.base_layer(*args, **kwargs)
        arguments = dict(zip(argument_names(self.stock.forward), args, strict=False)) | kwargs
        return_dict = arguments.pop("return_dict", None)
        branch = nn.ModuleList() if self.active_branch is None else self.side_branch[self.active_branch]
        output = routed_forward(self.base_layer, self.stock.forward, branch, self.plan, arguments)
        return output.to_tuple() if return_dict is False else output


class DpvrModel(BaseTuner):
    """Puts side branches on a LLaVA and takes them off."""

    prefix = "side_branch"
    tuner_layer_cls = DpvrLayer
    target_module_mapping: dict = {}

    def _prepare_adapter_config(self, peft_config: DpvrConfig, model_config: dict) -> DpvrConfig:
        peft_config.num_hidden_layers = model_config["text_config"]["num_hidden_layers"]
        return peft_config

    def _check_new_adapter_config(self, config: DpvrConfig) -> None:
        """Refuse a base that the adapter does not fit, before anything is changed."""
        super()._check_new_adapter_config(config)
        base = dict(self.model.named_children()).get(TARGET)
        base = base.base_layer if isinstance(base, DpvrLayer) else base
        if not isinstance(base, LlavaModel):
            raise ValueError(
                f"Expected a LlavaForConditionalGeneration; got {type(self.model).__name__}. Remedy: load the LLaVA "
                "with its class, or as AutoModelForImageTextToText."
            )
        self._check_name(next(name for name, known in self.peft_config.items() if known is config))
        full = config.for_base(base.config)
        if config.saved_shapes is not None:
            with torch.device("meta"):
                side_branch = make_side_branch(base.language_model.layers, full)
            check_shapes(config.saved_shapes, side_branch, config.base_model_name_or_path)

    def _check_name(self, adapter_name: str) -> None:
        """PEFT tells adapters apart by their names in the weights' names, so these must mean nothing else there."""
        parts = {part for key in self.model.state_dict() for part in key.split(".")} | {"base_model", "base_layer"}
        taken = (parts | {self.prefix}) - (set(self.peft_config) - {adapter_name})
        if not adapter_name.isidentifier() or adapter_name in taken | set(dir(nn.ModuleDict)):
            raise ValueError(
                f"Expected a name for the adapter that is an identifier and no part of a weight's name; got "
                f"{adapter_name!r}. Remedy: another name, such as 'my_branch'."
            )

    def _create_and_replace(
        self,
        peft_config: DpvrConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, DpvrLayer) else DpvrLayer(target)
        layer.update_layer(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own would also hand on a `weight`, which a LlavaModel has not

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DpvrConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check weights on whatever way they come: PEFT itself would leave out what does not fit."""
        (layer,) = (module for module in model.modules() if isinstance(module, DpvrLayer))
        shapes = {name: tuple(weight.shape) for name, weight in state_dict.items()}
        check_shapes(shapes, layer.side_branch[adapter_name], config.base_model_name_or_path)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DpvrConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DpvrModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DpvrModel.prefix


def find_weights(repository: str, **where: Any) -> str:
    """The path of an adapter's safetensors file, local or from the Hub; a pickle is refused, not opened."""
    found = {
        name: cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **where)
        for name in (ADAPTER_WEIGHTS_NAME, PICKLE_NAME)
    }
    if found[ADAPTER_WEIGHTS_NAME] is None:
        got = f"{PICKLE_NAME}, a pickle that could run code" if found[PICKLE_NAME] else "neither that nor a pickle"
        raise ValueError(
            f"Expected {ADAPTER_WEIGHTS_NAME} beside {ADAPTER_CONFIG_NAME} in {repository!r}; got {got}. Remedy: save "
            "the adapter again with save_pretrained, which writes safetensors."
        )
    return found[ADAPTER_WEIGHTS_NAME]


def read_shapes(path: str) -> Shapes:
    """The names and shapes in a safetensors file, without reading the weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"Expected a safetensors file at {path}; got a damaged one ({error}). Remedy: download or save it again."
        ) from error


def check_shapes(saved: Shapes, side_branch: nn.ModuleList, base_name: str | None) -> None:
    """Raise ValueError unless the saved weights are those of this side branch, all of them and nothing else."""
    prefix = f"{ADAPTER_KEY_PREFIX}{TARGET}.{DpvrModel.prefix}."
    expected = {prefix + name: tuple(weight.shape) for name, weight in side_branch.state_dict().items()}
    if wrong := sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name)):
        name = wrong[0]
        raise ValueError(
            f"Expected the {len(expected)} weights of {len(side_branch)} side layers that fit this base; {len(wrong)} "
            f"differ, such as {name!r}: expected shape {expected.get(name)}, got {saved.get(name)}. Remedy: load the "
            f"adapter on the base it was made for ({base_name!r}) and with the config it was saved with."
        )
