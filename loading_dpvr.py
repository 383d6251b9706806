"""Making, loading and saving: a repository holds all weights, or the side branch alone beside the name of its base.

    base_model_name_or_path is None      model.safetensors: a whole LLaVA, with or without `model.side_branch.*`
    base_model_name_or_path is a name    model.safetensors: `model.side_branch.*` only; the rest comes from there

Weights are safetensors; nothing is unpickled. The paper trains, and so shares, 3% of the weights (section 3.4).
"""

import copy
import os

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

try:
    from .configuration_dpvr import AUTO_MAP, DPVR_FIELDS, DpvrLlavaConfig
except ImportError:
    from configuration_dpvr import AUTO_MAP, DPVR_FIELDS, DpvrLlavaConfig

try:  # transformers 5 renames the weights of old LLaVA checkpoints by model type, version 4 by an inherited attribute
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming
except ImportError:
    WeightRenaming = None
else:
    register_checkpoint_conversion_mapping("dpvr_llava", get_checkpoint_conversion_mapping("llava"), overwrite=True)

PUBLISHED_NAMES = {  # of llava-hf's checkpoints, which both versions read; version 5 by itself would write others
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector": "model.multi_modal_projector",
    "vision_tower.vision_model": "model.vision_tower",
}

WEIGHTS_NAME = "model.safetensors"
SIDE_BRANCH = "model.side_branch"
BITS = ("quantization_config", "_pre_quantization_dtype")  # what a config says of a quantised base


def is_side_branch(parameter_name: str) -> bool:
    """The one predicate for what is trained, saved, loaded and counted as the side branch."""
    return "side_branch" in parameter_name.split(".")


def make_side_branch(layers: nn.ModuleList, config: DpvrLlavaConfig) -> nn.ModuleList:
    """New decoder layers like those of a decoder, numbered after them; their weights are not yet meaningful."""
    side_branch = nn.ModuleList(type(layers[0])(config.text_config, 0) for _ in range(config.num_side_layers))
    for index, side_layer in enumerate(side_branch):
        side_layer.self_attn.layer_idx = len(layers) + index
    return side_branch


@torch.no_grad()
def reset_side_branch(side_branch: nn.ModuleList, layers: nn.ModuleList, config: DpvrLlavaConfig) -> None:
    """Start a side branch of a decoder's layers afresh, as `config.side_branch_init` says."""
    for index, side_layer in enumerate(side_branch):
        if config.side_branch_init == "random":
            for name, parameter in side_layer.named_parameters():
                _reset_parameter(name, parameter, config.text_config.initializer_range)
            continue
        source = layers[min(config.split_layer + index, len(layers) - 1)]
        side_layer.load_state_dict(_weights_in_float(source, side_layer))
        if config.side_branch_init == "identity":
            for projection in (side_layer.self_attn.o_proj, side_layer.mlp.down_proj):
                for parameter in projection.parameters():
                    parameter.zero_()


def _weights_in_float(source: nn.Module, like: nn.Module) -> dict[str, torch.Tensor]:
    """A decoder layer's weights as the numbers that a plain layer `like` it would need to do what it does.

    Those of a linear layer in 4 bits, or with LoRA in it, are what it makes of unit vectors.
    """
    weights: dict[str, torch.Tensor] = {}
    dtype = next(weight.dtype for weight in source.parameters() if weight.is_floating_point())  # a norm's, or LoRA's
    for name, plain in like.named_modules():
        module = source.get_submodule(name)
        if type(plain) is nn.Linear and (type(module) is not nn.Linear or not module.weight.is_floating_point()):
            device, training = next(module.parameters()).device, module.training
            units = torch.eye(plain.in_features, dtype=dtype, device=device)
            module.eval()  # without LoRA's dropout
            bias = module(torch.zeros_like(units[:1]))  # (1, out_features)
            weights[f"{name}.weight"] = (module(units) - bias).T
            if plain.bias is not None:
                weights[f"{name}.bias"] = bias[0]
            module.train(training)
        else:
            weights |= {f"{name}.{key}".lstrip("."): weight for key, weight in module.named_parameters(recurse=False)}
    return weights


def with_side_branch_in_float(quantization: QuantizationConfigMixin | dict) -> BitsAndBytesConfig:
    """Return a quantisation of the base that leaves the side branch, which is trained, as it is.

    Raises:
        ValueError: for other than bitsandbytes.
    """
    if isinstance(quantization, QuantizationConfigMixin):
        quantization = quantization.to_dict()
    method = QuantizationMethod(quantization.get("quant_method", QuantizationMethod.BITS_AND_BYTES))
    if method != QuantizationMethod.BITS_AND_BYTES:
        raise ValueError(
            f"Expected a base in floating point or quantised by bitsandbytes; got {method.value!r}. Remedy: "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True), or a base in floating point."
        )
    quantization = BitsAndBytesConfig.from_dict(dict(quantization))
    kept = quantization.llm_int8_skip_modules or ["lm_head"]
    quantization.llm_int8_skip_modules = [name for name in kept if name != SIDE_BRANCH] + [SIDE_BRANCH]
    return quantization


class SideBranchLoading:
    """Ways to and from a model with a `side_branch`; mixed in before the stock model."""

    _checkpoint_conversion_mapping = {  # for transformers 4: the names that version 5 writes, then the published ones
        r"^language_model(?!\.(model|lm_head)\.)": "model.language_model",
        r"^vision_tower(?!\.vision_model\.)": "model.vision_tower.vision_model",
        **{f"^{old}": new for old, new in PUBLISHED_NAMES.items()},
        "^vision_tower.vision_model": "model.vision_tower.vision_model",
    }

    @classmethod
    def from_llava(cls, llava: LlavaForConditionalGeneration | str, **dpvr_fields) -> "SideBranchLoading":
        """Turn a LLaVA into DPVR: its weights and sub-configs are shared, not copied; only the side branch is new.

        Args:
            llava: a model, or the id or path of one.
            **dpvr_fields: fields of `DpvrLlavaConfig`; with an id, also what `from_pretrained` takes (dtype, ...).
        """
        if isinstance(llava, str | os.PathLike):
            return cls.from_pretrained(llava, **dpvr_fields)
        if unknown := sorted(set(dpvr_fields) - set(DPVR_FIELDS)):
            raise ValueError(f"Expected the DPVR fields {DPVR_FIELDS}; got {unknown}. Remedy: drop or respell them.")
        base = {key: value for key, value in llava.config.to_dict().items() if key != "model_type"}
        config = DpvrLlavaConfig(**{**base, **dpvr_fields})
        config.text_config, config.vision_config = llava.config.text_config, llava.config.vision_config
        config._name_or_path = llava.config._name_or_path
        with torch.device("meta"):
            model = cls(config)
        for name in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(model.model, name, llava.model.get_submodule(name))
        model.lm_head, model.generation_config = llava.lm_head, llava.generation_config
        base_weight = next(llava.model.language_model.layers[-1].parameters())
        model.side_branch.to(base_weight.dtype).to_empty(device=base_weight.device)
        model.reset_side_branch()
        return model.train(llava.training)

    def reset_side_branch(self) -> None:
        """Start the side branch afresh, as `config.side_branch_init` says."""
        reset_side_branch(self.side_branch, self.model.language_model.layers, self.config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, new_side_branch: bool = False, **kwargs
    ):
        """Load a DPVR repository, whole or side branch only, or a vanilla LLaVA, which gets a new side branch.

        Takes what `PreTrainedModel.from_pretrained` takes, and the fields of `DpvrLlavaConfig`. Of a repository that
        holds the side branch only, the base is loaded from `config.base_model_name_or_path`.

        With `new_side_branch` a repository's own side branch is left aside for a new one, to be trained, of as many
        layers and begun as the fields say.

        Raises:
            ValueError: if the side branch is incomplete, damaged or of another shape, or the base holds no full LLaVA.
        """
        fields = {name: kwargs.pop(name) for name in DPVR_FIELDS if name in kwargs}
        where = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
        hub = {
            name: kwargs[name]
            for name in ("token", "cache_dir", "local_files_only", "force_download")
            if name in kwargs
        }
        if config is None:
            values, _ = DpvrLlavaConfig.get_config_dict(pretrained_model_name_or_path, **where, **hub)
            config = DpvrLlavaConfig.from_dict({**values, **fields, "model_type": DpvrLlavaConfig.model_type})
        else:
            for name, value in fields.items():
                setattr(config, name, value)
            config.check_dpvr_fields()

        base, branch = pretrained_model_name_or_path, None
        if config.base_model_name_or_path is not None:
            base = config.base_model_name_or_path
            if not new_side_branch:
                branch = _read_side_branch(pretrained_model_name_or_path, **where, **hub)
            kwargs = {name: value for name, value in kwargs.items() if name not in where}
        kwargs["use_safetensors"] = True
        for owner in (vars(config), kwargs):  # a base may be stored in 4 bits, or be asked for so
            if owner.get("quantization_config") is not None:
                owner["quantization_config"] = with_side_branch_in_float(owner["quantization_config"])
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(base, *model_args, config=config, output_loading_info=True, **kwargs)
        model._check_loaded(base, info, branch, new_side_branch)
        return (model, info) if wants_info else model

    def _check_loaded(
        self, base: str, info: dict, branch: dict[str, torch.Tensor] | None, new_side_branch: bool
    ) -> None:
        """Refuse a base with holes; take the side branch from `branch`, from the checkpoint, or start it afresh."""
        missing = sorted(info["missing_keys"])
        if holes := [name for name in missing if not is_side_branch(name)]:
            raise ValueError(
                f"Expected a full LLaVA in {base!r}; got one without {len(holes)} weights, such as {holes[:3]}. "
                "Remedy: name a full LLaVA, or set base_model_name_or_path in a repository that holds the side branch "
                "only."
            )
        own = [name for name in self.state_dict() if is_side_branch(name)]
        surplus = sorted(name for name in info["unexpected_keys"] if is_side_branch(name))
        if branch is not None:
            self.load_side_branch(branch)
        elif new_side_branch or len(missing) == len(own):
            self.reset_side_branch()
        elif missing or surplus:
            raise ValueError(
                f"Expected the {len(own)} weights of {len(self.side_branch)} side layers in {base!r}; missing: "
                f"{missing[:3]}, surplus: {surplus[:3]}. Remedy: set num_side_layers to the repository's, or "
                "new_side_branch=True to train one of as many."
            )

    def load_side_branch(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the weights of a side branch, named as in `state_dict()`, into this model; all of them or none.

        Raises:
            ValueError: for missing or unknown names and for other shapes, before anything is changed.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if is_side_branch(name)}
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if wrong := sorted(name for name in shapes.keys() | got.keys() if shapes.get(name) != got.get(name)):
            name = wrong[0]
            raise ValueError(
                f"Expected a side branch of {len(shapes)} weights as the config says; {len(wrong)} differ, such as "
                f"{name!r}: expected shape {shapes.get(name)}, got {got.get(name)}. Remedy: load it onto the base and "
                "with the num_side_layers it was trained with."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def side_branch_base(self, save_directory: str | os.PathLike) -> str:
        """The name of the base to save beside a side branch in `save_directory`.

        Raises:
            ValueError: if the model does not know where its base came from, or if that is where it should be saved.
        """
        base = self.config.base_model_name_or_path or self.config._name_or_path
        if not base:
            raise ValueError(
                "Expected config.base_model_name_or_path, where the frozen LLaVA lies, to save the side branch alone; "
                "got None. Remedy: set it to a Hub id or a path, or save with side_branch_only=False."
            )
        if not os.path.isdir(base):
            return base
        if os.path.realpath(base) == os.path.realpath(save_directory):
            raise ValueError(
                "Expected another folder than the base's, whose weights the side branch alone would replace; got "
                f"{str(save_directory)!r} for both. Remedy: save into a new folder, or with side_branch_only=False."
            )
        return os.path.abspath(base)

    def save_pretrained(self, save_directory: str | os.PathLike, *, side_branch_only: bool = False, **kwargs) -> None:
        """Save weights, config and code so that one `from_pretrained(..., trust_remote_code=True)` loads them.

        Args:
            side_branch_only: save the side branch, and the name of the base in the config in place of its weights. A
                base in a local folder is named by its absolute path; for sharing, load it by its Hub id.
            **kwargs: as `PreTrainedModel.save_pretrained` takes them.

        Raises:
            ValueError: with side_branch_only, as `side_branch_base`.
        """
        base = self.side_branch_base(save_directory) if side_branch_only else None
        conversions = getattr(self, "_weight_conversions", None)
        if WeightRenaming is not None and getattr(self, "hf_quantizer", None) is None:
            self._weight_conversions = [WeightRenaming(f"^{old}", new) for old, new in PUBLISHED_NAMES.items()]
        if side_branch_only:
            kwargs.setdefault("max_shard_size", "1TB")  # it is read back as one file
            weights = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {name: tensor for name, tensor in weights.items() if is_side_branch(name)}
        own, quantizer = self.config, None
        self.config = copy.deepcopy(own)
        self.config.base_model_name_or_path = base
        self.config.auto_map = dict(AUTO_MAP)
        if side_branch_only:  # in how many bits the base is held is for those to say who load it
            for part in (self.config, self.config.text_config, self.config.vision_config):
                for name in BITS:
                    vars(part).pop(name, None)
            quantizer = vars(self).pop("hf_quantizer", None)  # which would save the base's bits
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config, self._weight_conversions = own, conversions
            if quantizer is not None:
                self.hf_quantizer = quantizer


def load_processor(name_or_path: str, revision: str = "main", token: str | bool | None = None) -> ProcessorMixin:
    """Load the processor of a LLaVA or DPVR repository; code beside it is not run, as a processor needs none."""
    AutoConfig.register(DpvrLlavaConfig.model_type, DpvrLlavaConfig, exist_ok=True)
    AutoProcessor.register(DpvrLlavaConfig, LlavaProcessor, exist_ok=True)
    return AutoProcessor.from_pretrained(name_or_path, revision=revision, token=token, trust_remote_code=False)


def _read_side_branch(repository: str, **hub_kwargs) -> dict[str, torch.Tensor]:
    """The weights of a repository that holds the side branch only (safetensors; nothing is unpickled)."""
    path = cached_file(repository, WEIGHTS_NAME, **hub_kwargs)
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"Expected a safetensors file at {path}; got a damaged one ({error}). Remedy: download or save it again."
        ) from error
    if others := sorted(name for name in weights if not is_side_branch(name)):
        raise ValueError(
            f"Expected nothing but the side branch beside base_model_name_or_path in {repository!r}; got {others[:3]} "
            "as well. Remedy: set base_model_name_or_path to null for a repository with all weights."
        )
    return weights


def _reset_parameter(name: str, parameter: torch.Tensor, std: float) -> None:
    if parameter.ndim > 1:
        parameter.normal_(0.0, std)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
