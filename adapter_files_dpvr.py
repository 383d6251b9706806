"""The files of a saved adapter, checked before PEFT reads them and before the base is changed.

adapter_config.json          a JSON object of this method, without misspelt fields
adapter_model.safetensors    names and shapes of one side branch; finite numbers; never a pickle
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.utils import cached_file

from hub_dpvr import ADAPTER_KEY_PREFIX, ADAPTER_WEIGHTS_NAME
from loading_dpvr import check_finite, open_weights

METHOD = "DPVR"  # the name of the PEFT method
PICKLE_NAME = "adapter_model.bin"
TEXTS = ("base_model_name_or_path", "revision", "peft_version", "task_type")
OPTIONAL = (type(None),)
TYPES = {  # of PEFT's own fields; the layer plan checks those of the method
    **dict.fromkeys(TEXTS, (str, *OPTIONAL)),
    "inference_mode": (bool,),
    "num_hidden_layers": (int, *OPTIONAL),
    "auto_mapping": (dict, *OPTIONAL),
}
AUTO_MAPPING = ("base_model_class", "parent_library")

Shapes = dict[str, tuple[int, ...]]


def check_adapter_config(path: str, methods: Mapping[str, type], needs_method: bool) -> None:
    """Check the JSON file of an adapter's config, of this method or another.

    Args:
        methods: the classes of the methods' configs.
        needs_method: whether the config has to name its method.

    Raises:
        ValueError: if it is no JSON object, of an unknown method, or one of this method with misspelt fields or values
            of a wrong type.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): save the adapter again with save_pretrained.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is a {type(config).__name__}, and a JSON object is needed: save the adapter again with "
            "save_pretrained."
        )
    method = config.get("peft_type")
    if not isinstance(method, str | None) or (method not in methods and (needs_method or "peft_type" in config)):
        raise ValueError(
            f"{path} is of the method {method!r}, which PEFT does not know here: set peft_type to {METHOD!r} for a "
            "side branch, or update PEFT."
        )
    if method == METHOD:
        _check_fields(path, config, {"peft_type", "auto_mapping", *(each.name for each in fields(methods[METHOD]))})


def _check_fields(path: str, config: dict[str, Any], known: set[str]) -> None:
    for name in sorted(config.keys() - known):
        if match := get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(
                f"{path} has the field {name!r}: did you mean {match[0]!r}? Correct it, or save the adapter again "
                "with save_pretrained."
            )
    wrong = [name for name, types in TYPES.items() if name in config and type(config[name]) not in types]
    mapping = config.get("auto_mapping")
    if not wrong and mapping is not None and not all(type(mapping.get(name)) is str for name in AUTO_MAPPING):
        wrong = ["auto_mapping"]
    for name in wrong:
        kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in TYPES[name])
        inside = f", with {' and '.join(AUTO_MAPPING)} as str" if name == "auto_mapping" else ""
        raise ValueError(
            f"{path} has {name}={config[name]!r}, and {kinds} is needed{inside}: correct it, or save the adapter "
            "again with save_pretrained."
        )


def find_weights(repository: str, **where: Any) -> str:
    """The path of an adapter's safetensors file, local or from the Hub.

    Raises:
        ValueError: if there is none. A pickle is not opened.
    """
    found = {
        name: cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **where)
        for name in (ADAPTER_WEIGHTS_NAME, PICKLE_NAME)
    }
    if found[ADAPTER_WEIGHTS_NAME] is None:
        pickle = f", only {PICKLE_NAME}, a pickle that could run code" if found[PICKLE_NAME] else ""
        raise ValueError(
            f"There is no {ADAPTER_WEIGHTS_NAME} in {repository!r}{pickle}: save the adapter again with "
            "save_pretrained, which writes safetensors."
        )
    return found[ADAPTER_WEIGHTS_NAME]


def read_shapes(path: str) -> Shapes:
    """The names and shapes in a safetensors file.

    Raises:
        ValueError: if a weight in it is NaN or infinite.
    """
    shapes = {}
    with open_weights(path) as file:
        for name in file.keys():
            weight = file.get_tensor(name)
            check_finite({name: weight})
            shapes[name] = tuple(weight.shape)
    return shapes


def check_shapes(saved: Shapes, side_branch: nn.ModuleList, prefix: str, base: Shapes, base_name: str | None) -> None:
    """Raise ValueError unless the saved weights are exactly those of this side branch, in name and shape.

    Args:
        prefix: of the names of the side branch.
        base: the weights of the base, which PEFT saves too with save_embedding_layers=True, and loads again.
    """
    expected = {prefix + name: tuple(weight.shape) for name, weight in side_branch.state_dict().items()}
    of_base = {ADAPTER_KEY_PREFIX + name: shape for name, shape in base.items()}
    own = {name: shape for name, shape in saved.items() if name in expected or of_base.get(name) != shape}
    if wrong := sorted(name for name in expected.keys() | own.keys() if expected.get(name) != own.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights of the adapter do not fit the {len(expected)} of {len(side_branch)} side layers on "
            f"this base, such as {name!r}: its shape is {own.get(name)}, and {expected.get(name)} is needed. Load "
            f"it on the base it was made for ({base_name!r}), with the config it was saved with."
        )


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
