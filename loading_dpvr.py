"""Making, loading and saving: a repository holds all weights, or the side branch alone and the name of its base.

    config.json: base_model_name_or_path    model.safetensors
    null                                    a whole LLaVA, with or without `model.side_branch.*`
    a Hub id or a path                      `model.side_branch.*` alone; the other weights are loaded from there

Weights are safetensors files; no pickle is opened. The side branch is 3% of the weights of LLaVA-1.5-7B, and all that
the paper trains (section 3.4).
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

try:
    from .configuration_dpvr import AUTO_MAP, DPVR_FIELDS, DpvrLlavaConfig, with_fields
    from .latent_dpvr import WithLatent, with_saved_latent
    from .side_branch_dpvr import device_of, keep_present, reset_side_branch
    from .versions_dpvr import LINE_4
except ImportError:
    from configuration_dpvr import AUTO_MAP, DPVR_FIELDS, DpvrLlavaConfig, with_fields
    from latent_dpvr import WithLatent, with_saved_latent
    from side_branch_dpvr import device_of, keep_present, reset_side_branch
    from versions_dpvr import LINE_4

try:  # transformers 5 renames the weights of old LLaVA checkpoints by model type, version 4 by an inherited attribute
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming
except ImportError:
    WeightRenaming = None
else:
    for own, stock in (("dpvr_llava", "llava"), ("DpvrLlavaModel", "LlavaModel")):  # the second in some releases only
        if (mapping := get_checkpoint_conversion_mapping(stock)) is not None:
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)

PUBLISHED_NAMES = {  # weight names of llava-hf's checkpoints, which both versions read; version 5 would write others
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector": "model.multi_modal_projector",
    "vision_tower.vision_model": "model.vision_tower",
}

WEIGHTS_NAME = "model.safetensors"
VIDEO_SETTINGS, IMAGE_SETTINGS = "video_preprocessor_config.json", "preprocessor_config.json"
SIDE_BRANCH = "model.side_branch"
LATENT = ".side_branch.latent."
QUANTISATION_FIELDS = ("quantization_config", "_pre_quantization_dtype")  # of the config of a quantised base


def is_side_branch(parameter_name: str) -> bool:
    """Whether a weight is the side branch's: one predicate for what is trained, saved, loaded and counted."""
    return "side_branch" in parameter_name.split(".")


def with_side_branch_in_float(quantization: QuantizationConfigMixin | dict) -> BitsAndBytesConfig:
    """Return the quantisation with the side branch, which is trained, among the modules to skip.

    Raises:
        ValueError: for another library than bitsandbytes.
    """
    if isinstance(quantization, QuantizationConfigMixin):
        quantization = quantization.to_dict()
    if not isinstance(quantization, dict):
        raise ValueError(
            f"quantization_config is {quantization!r}: use BitsAndBytesConfig(load_in_4bit=True), or leave it out."
        )
    method = quantization.get("quant_method", QuantizationMethod.BITS_AND_BYTES)
    if method != QuantizationMethod.BITS_AND_BYTES:  # whose members are strings
        raise ValueError(
            f"The base is quantised by {str(getattr(method, 'value', method))!r}; a side branch runs on bases that "
            "are quantised by bitsandbytes, with quantization_config=BitsAndBytesConfig(load_in_4bit=True), or in "
            "floating point."
        )
    quantization = BitsAndBytesConfig.from_dict(dict(quantization))
    kept = quantization.llm_int8_skip_modules or ["lm_head"]
    quantization.llm_int8_skip_modules = [name for name in kept if name != SIDE_BRANCH] + [SIDE_BRANCH]
    return quantization


def with_side_branch_placed(device_map: dict[str, Any]) -> dict[str, Any]:
    """Return a device_map with a place for the side branch, which one that was made for a LLaVA does not have."""
    places = {"", SIDE_BRANCH.partition(".")[0], SIDE_BRANCH}
    if places & device_map.keys() or any(name.startswith(f"{SIDE_BRANCH}.") for name in device_map):
        return device_map
    return {**device_map, SIDE_BRANCH: next((at for at in device_map.values() if at not in ("cpu", "disk")), "cpu")}


class SideBranchLoading(WithLatent):
    """`from_llava`, `from_pretrained` and `save_pretrained` of a model with a `side_branch`; a mixin of the model.

    It stands before the stock class.
    """

    _checkpoint_conversion_mapping = {  # for transformers 4: names that version 5 writes, then the published ones
        r"^language_model(?!\.(model|lm_head)\.)": "model.language_model",
        r"^vision_tower(?!\.vision_model\.)": "model.vision_tower.vision_model",
        **{f"^{old}": new for old, new in PUBLISHED_NAMES.items()},
        "^vision_tower.vision_model": "model.vision_tower.vision_model",
    }

    @classmethod
    def from_llava(cls, llava: LlavaForConditionalGeneration | str, **dpvr_fields: Any) -> "SideBranchLoading":
        """Make a DPVR model of a LLaVA: it shares the LLaVA's weights and sub-configs; only the side branch is new.

        Args:
            llava: a model, or the id or path of one.
            **dpvr_fields: fields of `DpvrLlavaConfig`; with an id, also what `from_pretrained` takes (dtype, ...).

        Raises:
            ValueError: for fields that are unknown or contradict each other.
        """
        if isinstance(llava, str | os.PathLike):
            return cls.from_pretrained(llava, **dpvr_fields)
        if unknown := sorted(set(dpvr_fields) - set(DPVR_FIELDS)):
            raise ValueError(
                f"from_llava does not know {', '.join(unknown)}: the DPVR fields are {', '.join(DPVR_FIELDS)}."
            )
        base = {key: value for key, value in llava.config.to_dict().items() if key != "model_type"}
        config = DpvrLlavaConfig(**{**base, **dpvr_fields})
        config.text_config, config.vision_config = llava.config.text_config, llava.config.vision_config
        config._name_or_path = llava.config._name_or_path
        with torch.device("meta"):
            model = cls(config)
        for name in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(model.model, name, llava.model.get_submodule(name))
        model.lm_head, model.generation_config = llava.lm_head, llava.generation_config
        last = llava.model.language_model.layers[-1]
        model.side_branch.to(next(last.parameters()).dtype).to_empty(device=device_of(last))
        model.reset_side_branch()
        model.remember_base()
        return model.train(llava.training)

    def reset_side_branch(self) -> None:
        """Initialise the side branch anew, as `config.side_branch_init` says."""
        config = self.config
        reset_side_branch(self.side_branch, self.model.language_model, config.split_layer, config.side_branch_init)
        self.reset_latent()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: DpvrLlavaConfig | None = None,
        new_side_branch: bool = False,
        **kwargs: Any,
    ) -> "SideBranchLoading | tuple[SideBranchLoading, dict]":
        """Load a DPVR repository, with all weights or the side branch alone, or a vanilla LLaVA.

        A repository with the side branch alone names its base in `config.base_model_name_or_path`, which is loaded
        from there. A vanilla LLaVA gets a new side branch. With fields of another latent than the repository's the
        model gets a new one, to be fitted.

        Args:
            pretrained_model_name_or_path, *model_args, config, **kwargs: as `PreTrainedModel.from_pretrained` takes
                them; among kwargs also fields of `DpvrLlavaConfig`, which replace the repository's.
            new_side_branch: initialise a new side branch, to be trained, in place of the repository's own.

        Raises:
            ValueError: if the side branch is incomplete, damaged or of another shape, or if weights of the base are
                missing.
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
            if not values:
                raise ValueError(
                    f"There is no config.json in {str(pretrained_model_name_or_path)!r}: name a saved model."
                )
            config = DpvrLlavaConfig.from_dict(with_fields(values, fields))
            config, wanted = with_saved_latent(config, values)
        else:
            wanted = None
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
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = with_side_branch_placed(kwargs["device_map"])
        for options in (vars(config), kwargs):  # the base may be stored in 4 bits, or the caller may ask for them
            if options.get("quantization_config") is not None:
                options["quantization_config"] = with_side_branch_in_float(options["quantization_config"])
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            saved = None
            if base != pretrained_model_name_or_path:  # a base may have a latent, too, and another one
                config, saved = with_saved_latent(config, DpvrLlavaConfig.get_config_dict(base, **hub)[0])
            model, info = super().from_pretrained(base, *model_args, config=config, output_loading_info=True, **kwargs)
        except (OSError, HFValidationError) as error:
            if base == pretrained_model_name_or_path:
                raise
            raise OSError(
                f"The base {base!r} of {str(pretrained_model_name_or_path)!r} cannot be loaded "
                f"({' '.join(str(error).split())}): give another with base_model_name_or_path=..."
            ) from error
        if saved is not None:
            model.replace_latent(**saved)
        model._check_loaded(base, info, branch, new_side_branch)
        if wanted is not None:
            model.replace_latent(**wanted)
        model.remember_base()
        return (model, info) if wants_info else model

    def load_custom_generate(self, name_or_path: str, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
        """As transformers does, but never unasked: transformers 4 runs a local folder's code without being told to.

        Raises:
            OSError: unless the code is trusted; transformers then keeps the model's own `generate`.
        """
        if not trust_remote_code:
            raise OSError(f"custom_generate of {name_or_path!r} is not run without trust_remote_code=True.")
        return super().load_custom_generate(name_or_path, trust_remote_code=trust_remote_code, **kwargs)

    def _check_loaded(
        self, base: str, info: dict, branch: dict[str, torch.Tensor] | None, new_side_branch: bool
    ) -> None:
        """Refuse a base with missing weights; then load the side branch, or initialise a new one.

        Args:
            base: the name of what was loaded, for messages.
            info: the loading info of `from_pretrained`.
            branch: the weights of the side branch, if they lie in a repository of their own.
        """
        missing = sorted(info["missing_keys"])
        if of_base := [name for name in missing if not is_side_branch(name)]:
            raise ValueError(
                f"{base!r} is not a full LLaVA: it lacks {len(of_base)} of the weights, such as {of_base[:3]}. Load a "
                "full LLaVA; in a repository with the side branch alone, set base_model_name_or_path to one."
            )
        new = missing if branch is None else [name for name in self.state_dict() if is_side_branch(name)]
        self._keep_side_branch_present(new)
        own = {name: weight for name, weight in self.state_dict().items() if is_side_branch(name)}
        check_finite({name: weight for name, weight in own.items() if name not in new})
        surplus = sorted(name for name in info["unexpected_keys"] if is_side_branch(name))
        if branch is not None:
            self.load_side_branch(branch)
        elif new_side_branch or len(missing) == len(own):
            self.reset_side_branch()
        elif missing and not surplus and set(missing) == {name for name in own if LATENT in name}:
            self.reset_latent()
        elif missing or surplus:
            raise ValueError(
                f"The side branch in {base!r} does not have the {len(own)} weights of {len(self.side_branch)} side "
                f"layers: {missing[:3]} are missing, {surplus[:3]} are unknown. Set num_side_layers as in its config, "
                "or new_side_branch=True to train a new one."
            )

    def _keep_side_branch_present(self, new: list[str]) -> None:
        """Whatever a device_map says, the side branch lies where it runs; its weights in `new` are in no file."""
        new = [name.removeprefix(f"{SIDE_BRANCH}.") for name in new]
        if (device := keep_present(self.side_branch, new)) is not None:
            own = f"{SIDE_BRANCH}."
            self.hf_device_map = {name: at for name, at in self.hf_device_map.items() if not name.startswith(own)}
            self.hf_device_map[SIDE_BRANCH] = "cpu" if device.type == "cpu" else device.index

    def load_side_branch(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the weights of a side branch, named as in `state_dict()`, into this model.

        Raises:
            ValueError: for missing or unknown names and for other shapes; then no weight is changed.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if is_side_branch(name)}
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if wrong := sorted(name for name in shapes.keys() | got.keys() if shapes.get(name) != got.get(name)):
            name = wrong[0]
            raise ValueError(
                f"{len(wrong)} weights of the side branch do not fit the {len(shapes)} of this model, such as "
                f"{name!r}: its shape is {got.get(name)}, and {shapes.get(name)} is needed. Load it on the base and "
                "with the num_side_layers that it was trained with."
            )
        check_finite(weights)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def remember_base(self) -> None:
        """Note the base's weights as they are in the base's own repository; PyTorch counts what is written to them."""
        self._base_as_loaded = {
            name: (weight._version, tuple(weight.shape))
            for name, weight in self.named_parameters()
            if not is_side_branch(name)
        }

    def _refuse_changed_base(self) -> None:
        known = vars(self).get("_base_as_loaded", {})
        changed = [
            name
            for name, weight in self.named_parameters()
            if name in known and (weight._version > known[name][0] or tuple(weight.shape) != known[name][1])
        ]
        if changed:
            raise ValueError(
                f"{len(changed)} weights of the base were changed since it was loaded, such as {changed[0]!r}, and "
                "saving the side branch alone would lose them: save all weights, with side_branch_only=False."
            )

    def side_branch_base(self, save_directory: str | os.PathLike) -> str:
        """The base to name in the config of a side branch that is saved in `save_directory`: a Hub id or full path.

        Raises:
            ValueError: if the model does not know its base, if `save_directory` is the folder of the base, and if
                weights of the base were changed, as a projector that was trained.
        """
        self._refuse_changed_base()
        base = self.config.base_model_name_or_path or self.config._name_or_path
        if not base:
            raise ValueError(
                "A side branch is saved with the name of its base, and this model does not know it: set "
                "config.base_model_name_or_path to a Hub id or a path, or save with side_branch_only=False."
            )
        if not os.path.isdir(base):
            return base
        if os.path.realpath(base) == os.path.realpath(save_directory):
            raise ValueError(
                f"{str(save_directory)!r} is the folder of the base, and its weights would be overwritten by those of "
                "the side branch alone: save to a new folder, or with side_branch_only=False."
            )
        return os.path.abspath(base)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, side_branch_only: bool = False, **kwargs: Any
    ) -> None:
        """Save weights, config and code, for `from_pretrained(..., trust_remote_code=True)`.

        Args:
            side_branch_only: save the side branch without the base's weights; the config then names the base. A local
                base is named by its absolute path, so load the base by its Hub id if others are to use the result.
            **kwargs: as `PreTrainedModel.save_pretrained` takes them.

        Raises:
            ValueError: with side_branch_only, as `side_branch_base`; without, for a base with layers on the disk under
                transformers 4.
        """
        if LINE_4 and not side_branch_only and any(weight.device.type == "meta" for weight in self.parameters()):
            raise ValueError(
                "transformers 4 cannot save a LLaVA whose layers are on the disk or on the CPU beside a GPU: save "
                "with side_branch_only=True, load it without device_map, or use transformers 5."
            )
        base = self.side_branch_base(save_directory) if side_branch_only else None
        if side_branch_only:
            for name in ("max_shard_size", "variant"):
                if kwargs.get(name) is not None:
                    raise ValueError(
                        f"{name}={kwargs[name]!r} does not go with side_branch_only=True. Expected is None, as a side "
                        f"branch is read back as the one file {WEIGHTS_NAME}: leave it out."
                    )
            kwargs["max_shard_size"] = "1TB"
            weights = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {name: tensor for name, tensor in weights.items() if is_side_branch(name)}
        to_save = self._copy_to_save(base, side_branch_only)
        super(SideBranchLoading, to_save).save_pretrained(save_directory, **kwargs)

    def _copy_to_save(self, base: str | None, side_branch_only: bool) -> "SideBranchLoading":
        """A shallow copy with the config, weight names and quantisation to save; `self` may be in use meanwhile."""
        new = object.__new__(type(self))  # FSDP 2 wraps __new__, so copy.copy would call __init__
        vars(new).update(vars(self))
        if WeightRenaming is not None and vars(self).get("hf_quantizer") is None:
            new._weight_conversions = [WeightRenaming(f"^{old}", name) for old, name in PUBLISHED_NAMES.items()]
        new.config = copy.deepcopy(self.config)
        new.config.base_model_name_or_path = base
        vars(new.config).update(new.config.dpvr_fields())
        new.config.auto_map = dict(AUTO_MAP)
        if side_branch_only:  # who loads it chooses in how many bits the base is held
            for part in (new.config, new.config.text_config, new.config.vision_config):
                for name in QUANTISATION_FIELDS:
                    vars(part).pop(name, None)
            vars(new).pop("hf_quantizer", None)  # it would save the base's quantisation
        return new


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a weight is NaN or infinite: the model would answer nothing."""
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.device.type != "meta" and not bool(weight.isfinite().all()):
            broken = int((~weight.isfinite()).sum())
            raise ValueError(
                f"{broken} of {weight.numel()} numbers of the weight {name!r} are NaN or infinite: the training that "
                "wrote it diverged, or the file is damaged. Take an earlier checkpoint, or save it again."
            )


@contextmanager
def open_weights(path: str) -> Iterator[Any]:
    """Open a safetensors file, or raise ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"The safetensors file at {path} is damaged ({error}): download it or save it again."
        ) from error


def _read_side_branch(repository: str, **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """The weights of a repository that holds the side branch alone."""
    with open_weights(cached_file(repository, WEIGHTS_NAME, **hub_kwargs)) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    if others := sorted(name for name in weights if not is_side_branch(name)):
        raise ValueError(
            f"The config in {repository!r} names a base, so its weights should be the side branch alone, but there "
            f"are others, such as {others[:3]}. If it holds all weights, set base_model_name_or_path to null."
        )
    return weights
