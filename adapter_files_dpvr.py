"""The files of a saved adapter, checked before PEFT reads them and before the base is changed.

adapter_config.json          a JSON object of this method, without misspelt fields
adapter_model.safetensors    names and shapes of one side branch; finite numbers; never a pickle
"""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.utils import cached_file

from hub_dpvr import ADAPTER_KEY_PREFIX, ADAPTER_WEIGHTS_NAME
from loading_dpvr import check_finite, open_weights

CONFIG_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.bin"

Shapes = dict[str, tuple[int, ...]]


def read_adapter_config(repository: str, method: str, fields: Iterable[str], **where: Any) -> dict[str, Any]:
    """The config of an adapter.

    Args:
        method: the name of the PEFT method that it must be of.
        fields: those that a config of it has.

    Raises:
        ValueError: if there is none, or it is no JSON object, of another method, or has misspelt fields.
    """
    path = cached_file(repository, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if path is None:
        raise ValueError(f"There is no {CONFIG_NAME} in {repository!r}: name the folder or repository of an adapter.")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{CONFIG_NAME} in {repository!r} is no JSON ({error}): save the adapter again with save_pretrained."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{CONFIG_NAME} in {repository!r} is a {type(config).__name__}, and a JSON object is needed: save the "
            "adapter again with save_pretrained."
        )
    if config.get("peft_type") != method:
        raise ValueError(
            f"{CONFIG_NAME} in {repository!r} is of the method {config.get('peft_type')!r}, not {method!r}: load it "
            "with PeftModel.from_pretrained, which finds the method's own class."
        )
    known = {"peft_type", "auto_mapping", *fields}
    for name in config.keys() - known:
        if match := get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(
                f"{CONFIG_NAME} in {repository!r} has the field {name!r}: did you mean {match[0]!r}? Correct it, or "
                "save the adapter again with save_pretrained."
            )
    return config


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
