"""DPVR as a PEFT method: a side branch on a stock model that is added, trained, saved, switched and removed again.

    Qwen3VLForConditionalGeneration                get_peft_model(qwen, DpvrConfig(split_layer=4))
        model: Qwen3VLModel          ->            model: the same, frozen, its class routed (forward_dpvr.py)
        lm_head                                        side_branch: DpvrLayer
                                                           <adapter>       only this is trained and saved

The base is any vision-language model whose images are tokens of its prompt: docs/families.md lists those tested.

No module is wrapped or renamed. Instead the class of the model without its head, and that of the model with it, is
replaced by a subclass of the same name that runs the adapter's layer plan; unloading the adapter restores it. So on a
LLaVA the logits are those of `DpvrLlavaForConditionalGeneration`, an adapter fits a stock LLaVA and a DPVR model
alike, and LoRA may be added before or after. Paper section 3.4.

    import adapter_dpvr                                      # registers the method "DPVR" with PEFT
    model = PeftModel.from_pretrained(llava, "me/branch")    # checked against the base before anything is changed
    with model.disable_adapter(): ...                        # the base, bit for bit

    adapter_config.json, adapter_model.safetensors           base_model.model.model.side_branch.<layer>.<weight>
"""

from dataclasses import dataclass, field
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import adapter_doors_dpvr  # noqa: F401
from adapter_files_dpvr import METHOD, Shapes, check_shapes, find_weights, shapes_of  # noqa: F401
from configuration_dpvr import (
    METHOD_FIELDS,
    SIDE_BRANCH_INITS,
    LayerPlan,
    check_choice,
    check_fusion_fields,
    make_plan,
    vanilla_plan,
)
from costs_dpvr import Branch, DecoderCosts, prefill_flops
from decoders_dpvr import check_decoder, decoder_of, recurrent_layers
from forward_dpvr import check_attention, routed_model
from generation_dpvr import routed
from hub_dpvr import ADAPTER_KEY_PREFIX
from latent_dpvr import Latent, reset_latent
from loading_dpvr import check_finite
from side_branch_dpvr import SideBranch, device_of, make_side_branch, reset_side_branch
from versions_dpvr import LINE_4


class PeftTypeName(str):
    """The name of a PEFT method, which behaves as a member of `peft.PeftType`: members cannot be added to an enum."""

    @property
    def name(self) -> str:
        return str.__str__(self)

    value = name

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PEFT_TYPE = PeftTypeName(METHOD)
TARGET = "model"  # what a model with a head calls the model without it
PLACE = f"{TARGET}.side_branch"  # of the adapters in the model with its head
SIDE_BRANCH_MLPS = ("copy", "dense")


@dataclass
class DpvrConfig(PeftConfig):
    """The side branch and the layer plan of an adapter, in the fields of `DpvrLlavaConfig`."""

    routing: str = field(
        default="late_fusion", metadata={"help": "late_fusion, persistent_context, kv_substitution or text_only."}
    )
    split_layer: int = field(default=18, metadata={"help": "Layers that image and text share; the paper's 7B: 18."})
    num_side_layers: int = field(default=1, metadata={"help": "Decoder layers in the side branch."})
    num_fusion_layers: int = field(default=1, metadata={"help": "Last layers that fuse the streams again."})
    fusion_layers: list[int] | None = field(default=None, metadata={"help": "Deep layers that read the image."})
    side_branch_init: str = field(default="split_layer", metadata={"help": "split_layer, identity or random."})
    side_branch_mlp: str = field(
        default="copy",
        metadata={"help": "copy: of the decoder's layers; dense: one MLP in place of a mixture of experts."},
    )
    latent_rank: int | None = field(default=None, metadata={"help": "Width of the latent that `latent` reads."})
    latent_split_layer: int | None = field(default=None, metadata={"help": "From 0 on; None: split_layer."})
    latent_layers: list[int] | None = field(default=None, metadata={"help": "Layers that read the latent; None: all."})
    latent_side_layers: int = field(default=0, metadata={"help": "Decoder layers that make the latent's states."})
    latent_stride: int = field(default=1, metadata={"help": "Only every k-th image token is read."})
    latent_score: str | None = field(default=None, metadata={"help": "norm, distance: read those that stand out."})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Depth of the base's decoder; filled in from the base."}
    )

    target_modules = TARGET  # not a choice, so not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.saved_shapes: Shapes | None = None  # of the saved weights, for a config that was read from a file
        self.loaded = False  # whether saved weights were loaded for this config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "DpvrConfig":
        """Read the config of a saved adapter, and the shapes of its weights, to check them before the base is changed.

        Raises:
            ValueError: if config or weights are missing, damaged, or of another method; pickles are not opened.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):
            raise ValueError(
                f"The adapter in {pretrained_model_name_or_path!r} is of the method {str(config.peft_type.value)!r}, "
                f"not {METHOD!r}: load it with PeftModel.from_pretrained, which finds the method's own class."
            )
        return config

    def dpvr_fields(self) -> dict[str, Any]:
        """The fields that this shares with `DpvrLlavaConfig`, by name."""
        return {name: vars(self)[name] for name in METHOD_FIELDS}

    def plan_for(self, base: PretrainedConfig) -> LayerPlan:
        """The layer plan of a base with this adapter.

        Args:
            base: the config of the whole vision-language model.

        Raises:
            ValueError: if the adapter does not fit the base, or has the routing "none".
        """
        text = base.get_text_config()
        if self.saved_shapes is not None and self.num_hidden_layers != text.num_hidden_layers:
            raise ValueError(
                f"This adapter was made for a base of {self.num_hidden_layers} decoder layers, and this one has "
                f"{text.num_hidden_layers}: load it on {self.base_model_name_or_path!r}."
            )
        if self.routing == "none":
            raise ValueError(
                "The routing of this adapter is 'none', which is the base without it: choose another, such as "
                "late_fusion, and run the base with disable_adapter()."
            )
        check_choice("side_branch_init", self.side_branch_init, SIDE_BRANCH_INITS)
        check_choice("side_branch_mlp", self.side_branch_mlp, SIDE_BRANCH_MLPS)
        fields = {name: value for name, value in self.dpvr_fields().items() if name != "side_branch_init"}
        check_fusion_fields(self.routing, self.num_fusion_layers, self.fusion_layers)
        plan = make_plan(text.num_hidden_layers, **fields, recurrent=recurrent_layers(text))
        check_decoder(base, plan.split_layer)
        check_attention(base)
        return plan

    def prefill_ratio(self, base: PretrainedConfig, num_image_tokens: int, num_text_tokens: int) -> float:
        """Prefill FLOPs of a base's language model with this adapter, as a share of those without.

        Args:
            base: the config of the whole vision-language model.
            num_image_tokens, num_text_tokens: of a prompt, V and X.

        Raises:
            ValueError: as `plan_for`.
        """
        costs, plan = DecoderCosts.of(base.get_text_config()), self.plan_for(base)
        branch = self.branch_for(plan)
        depth, size = len(plan.modes), (num_image_tokens, num_text_tokens)
        own, vanilla = (prefill_flops(costs, each, *size, branch=branch) for each in (plan, vanilla_plan(depth)))
        return own / vanilla

    def branch_for(self, plan: LayerPlan) -> Branch:
        """What runs on image tokens past the split, to count its costs."""
        return Branch.of(plan, self.dpvr_fields(), dense_mlp=self.side_branch_mlp == "dense")

    def new_side_branch(self, decoder: nn.Module, plan: LayerPlan) -> SideBranch:
        """A side branch of this config for a decoder, not yet initialised."""
        if plan.latent_stride:
            return SideBranch(latent=Latent(decoder, plan, self.latent_rank, self.latent_side_layers))
        dense = self.side_branch_mlp == "dense"
        return make_side_branch(decoder, plan.split_layer, self.num_side_layers, dense_mlp=dense)


class DpvrLayer(nn.ModuleDict, BaseTunerLayer):
    """The side branches of a model's adapters and their layer plans, by the names of the adapters."""

    adapter_layer_names = ("branches",)

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, LayerPlan] = {}
        self.merged_adapters = []

    @property
    def branches(self) -> nn.ModuleDict:
        return self

    @property
    def active_branch(self) -> str | None:
        """The name of the adapter whose side branch runs, or None if the base runs without one."""
        active = [name for name in self.active_adapters if name in self.plans]
        return active[0] if active and not self.disable_adapters else None

    def update_layer(self, adapter_name: str, peft_config: DpvrConfig, owner: nn.Module) -> None:
        """Add a side branch for the decoder of `owner`, initialised as the config says."""
        plan, decoder = peft_config.plan_for(owner.config), decoder_of(owner)[1]
        source = decoder.layers[plan.split_layer]
        like = next(weight for weight in source.parameters() if weight.is_floating_point())
        side_branch, device = peft_config.new_side_branch(decoder, plan), device_of(source)
        if all(weight.device.type != "meta" for weight in side_branch.parameters()):  # meta with low_cpu_mem_usage
            side_branch.to(device, like.dtype)
            if side_branch.has_latent:
                reset_latent(side_branch.latent, decoder, plan, peft_config.side_branch_init)
            else:
                reset_side_branch(side_branch, decoder, plan.split_layer, peft_config.side_branch_init)
        self[adapter_name] = side_branch
        self.plans[adapter_name] = plan
        self.device = device

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(branches := [name for name in names if name in self]) > 1:
            raise ValueError(
                f"The adapters {branches} are side branches, and one runs at a time: call set_adapter with one name."
            )
        super().set_adapter(names, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self:
            self[adapter_name].to(device or self.device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.plans.pop(adapter_name, None)

    def merge(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "A side branch cannot be merged, as it adds layers and does not change the base's weights: keep the "
            "adapter, or remove it with unload()."
        )

    unmerge = merge


class WithSideBranches:
    """A mixin that `with_side_branches` puts before the class of a model without its head that has adapters.

    The own side branch of a DPVR model is kept at `own_branch` meanwhile, and runs when no adapter is active.
    """

    @property
    def plan(self) -> LayerPlan:
        """What every decoder layer does under the active adapter; without one, as before the adapters came."""
        name = self.side_branch.active_branch
        if name is not None and not self.is_base:
            return self.side_branch.plans[name]
        if "own_branch" in self._modules:
            return super().plan
        return vanilla_plan(len(decoder_of(self)[1].layers))

    @property
    def branch(self) -> nn.ModuleList:
        name = self.side_branch.active_branch
        return self._modules.get("own_branch", nn.ModuleList()) if name is None else self.side_branch[name]


@lru_cache
def with_side_branches(own: type) -> type:
    """The class for a model without its head that has adapters, a subclass of its own class with the same name."""
    base = own if hasattr(own, "stock") else routed_model(own)
    named = {"own": own, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (WithSideBranches, base), named)


def attach(head: nn.Module, owner: nn.Module) -> DpvrLayer:
    """Replace the class of a model, `owner`, and that of the model with its head by ones that run adapters' plans."""
    if "side_branch" in owner._modules:
        owner.own_branch = owner._modules.pop("side_branch").requires_grad_(False)
    owner.side_branch = DpvrLayer()
    change_class(owner, with_side_branches(type(owner)))
    if not hasattr(type(head), "own"):
        change_class(head, routed(type(head)))
    return owner.side_branch


def detach(head: nn.Module, owner: nn.Module) -> None:
    """Undo `attach`."""
    del owner.side_branch
    vars(owner).pop("_text_twin", None)
    change_class(owner, type(owner).own)
    if "own_branch" in owner._modules:
        owner.side_branch = owner._modules.pop("own_branch")
    else:
        vars(head).get("hf_device_map", {}).pop(PLACE, None)
        change_class(head, type(head).own)


def change_class(module: nn.Module, new: type) -> None:
    """Make a module one of another class, also where accelerate calls the forward of its former class for it."""
    if isinstance(kept := vars(module).get("_old_forward"), MethodType) and kept.__func__ is type(module).forward:
        module._old_forward = MethodType(new.forward, module)
    module.__class__ = new


class DpvrModel(BaseTuner):
    """The tuner, as PEFT calls it: adds side branches to a vision-language model and removes them."""

    prefix = "side_branch"
    tuner_layer_cls = DpvrLayer
    target_module_mapping: dict = {}

    def _prepare_adapter_config(self, peft_config: DpvrConfig, model_config: dict) -> DpvrConfig:
        peft_config.num_hidden_layers = self.model.config.get_text_config().num_hidden_layers
        return peft_config

    def _check_new_adapter_config(self, config: DpvrConfig) -> None:
        """Refuse a base that does not fit the adapter, before anything is changed."""
        BaseTuner._check_new_adapter_config(self, config)
        base = dict(self.model.named_children()).get(TARGET)
        if not isinstance(self.model, PreTrainedModel) or not isinstance(base, PreTrainedModel):
            raise ValueError(
                f"A side branch needs a vision-language model with its head, and this is a "
                f"{type(self.model).__name__}: load the model with AutoModelForImageTextToText. To combine it with "
                "LoRA, first call inject_adapter_in_model(lora, model)."
            )
        decoder_of(base)
        _check_places(config, self.model)
        self._check_name(next(name for name, known in self.peft_config.items() if known is config))
        _check_base(config, self.model)

    def _check_name(self, adapter_name: str) -> None:
        """Refuse a name that occurs in the weights' names already, where PEFT looks for the names of adapters."""
        parts = {part for key in self.model.state_dict() for part in key.split(".")} | {"base_model", "base_layer"}
        tuned = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        adapters = {name for layer in tuned for name in layer._all_available_adapter_names()}  # LoRA's among them
        taken = (parts | {DpvrModel.prefix}) - adapters
        if not adapter_name.isidentifier() or adapter_name in taken | set(dir(nn.ModuleDict)):
            raise ValueError(
                f"The adapter cannot have the name {adapter_name!r}, which must be an identifier that occurs in no "
                "weight's name: choose another, such as 'my_branch'."
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
        layer = target.side_branch if isinstance(target, WithSideBranches) else attach(parent, target)
        layer.update_layer(adapter_name, peft_config, target)
        if "hf_device_map" in vars(parent):  # transformers loads the weights to where this says
            parent.hf_device_map.setdefault(PLACE, str(layer.device))
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def replace_adapter(self, adapter_name: str, peft_config: DpvrConfig) -> None:
        """Put a new side branch, with its own plan, in place of the adapter of this name."""
        owner = getattr(self.model, TARGET)
        peft_config.inference_mode = self.peft_config[adapter_name].inference_mode
        _check_base(peft_config, self.model)
        dtype = next(owner.side_branch[adapter_name].parameters()).dtype  # chosen by PEFT for training
        owner.side_branch.update_layer(
            adapter_name, self._prepare_adapter_config(peft_config, self.get_model_config(self.model)), owner
        )
        owner.side_branch[adapter_name].to(dtype)
        owner.side_branch.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        self.peft_config[adapter_name] = peft_config

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, which skips modules whose name contains the method's prefix."""
        super().delete_adapter(adapter_name)
        layer = getattr(self.model, TARGET).side_branch
        layer.delete_adapter(adapter_name)
        self.active_adapter = layer.active_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; PEFT would call its `forward`, past `RoutedGeneration.__call__`."""
        return self.model(*args, **kwargs)

    def _enable_adapter_layers(self, enabled: bool) -> None:
        """Enable or disable the side branches alone: LoRA belongs to the base here."""
        getattr(self.model, TARGET).side_branch.enable_adapters(enabled)

    def _unload_and_optionally_merge(self, merge: bool = True, **_: Any) -> nn.Module:
        owner = getattr(self.model, TARGET)
        if merge:
            owner.side_branch.merge()
        detach(self.model, owner)
        del self.model.peft_config
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.prefix}.{adapter_name}.", f".{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DpvrConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check the weights here, where all ways to load them meet; PEFT would ignore those that do not fit."""
        (layer,) = (module for module in model.modules() if isinstance(module, DpvrLayer))
        shapes = {  # transformers 4 has removed the prefix
            ADAPTER_KEY_PREFIX + name.removeprefix(ADAPTER_KEY_PREFIX): tuple(weight.shape)
            for name, weight in state_dict.items()
        }
        base = shapes_of(model.base_model.model) if isinstance(model, PeftModel) else shapes_of(model)
        check_shapes(shapes, layer[adapter_name], WEIGHTS_PREFIX, base, config.base_model_name_or_path)
        check_finite(state_dict)
        config.loaded = True
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_places(config: DpvrConfig, model: PreTrainedModel) -> None:
    """Refuse what transformers 4 cannot: its own `load_adapter` on an offloaded base. PEFT's shows no device map."""
    places = set(map(str, vars(model).get("hf_device_map", {}).values()))
    if LINE_4 and config.saved_shapes is not None and places & {"cpu", "disk"} and places != {"cpu"}:
        raise ValueError(
            "transformers 4 cannot load an adapter on a base with layers on the disk or on the CPU beside a GPU: use "
            "PeftModel.from_pretrained(base, adapter), or transformers 5."
        )


def _check_base(config: DpvrConfig, model: PreTrainedModel) -> None:
    """Raise ValueError unless a base fits the config and its saved weights."""
    owner = getattr(model, TARGET)
    plan = config.plan_for(owner.config)
    with torch.device("meta"):
        side_branch = config.new_side_branch(decoder_of(owner)[1], plan)
    if config.saved_shapes is not None:
        check_shapes(
            config.saved_shapes, side_branch, WEIGHTS_PREFIX, shapes_of(model), config.base_model_name_or_path
        )


WEIGHTS_PREFIX = f"{ADAPTER_KEY_PREFIX}{TARGET}.{DpvrModel.prefix}."
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DpvrConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DpvrModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DpvrModel.prefix
