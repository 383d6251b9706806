"""Files that are no adapter's, through every door of PEFT and transformers: one sentence, and the base as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_llava
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
NO_CONFIGS = {  # the bytes of a file -> what is said
    "empty": (b"", "is no JSON"),
    "a brace": (b"{", "is no JSON"),
    "deep": (DEEP.encode(), "is no JSON"),
    "binary": (b"\x00\x01", "is no JSON"),
    "another encoding": ('{"peft_type": "DPVR"}'.encode("utf-16"), "is no JSON"),
    "two objects": (b"{}{}", "is no JSON"),
    "null": (b"null", "is a NoneType, and a JSON object is needed"),
    "a list": (b"[]", "is a list"),
    "a number": (b"3", "is a int"),
    "a string": (b'"DPVR"', "is a str"),
    "an empty object": (b"{}", "is of the method None"),
}
FIELDS = {  # fields of a config -> what is said
    "no method": ({"peft_type": None}, "is of the method None"),
    "a method in lower case": ({"peft_type": "dpvr"}, "is of the method 'dpvr', which PEFT does not know"),
    "a method that is a number": ({"peft_type": 3}, "is of the method 3"),
    "a method that is a list": ({"peft_type": ["DPVR"]}, "is of the method"),
    "a misspelt split": ({"split_layers": 2}, "did you mean 'split_layer'"),
    "a misspelt routing": ({"rooting": "late_fusion"}, "did you mean 'routing'"),
    "a misspelt rank": ({"latent_ranks": 8}, "did you mean 'latent_rank'"),
    "a misspelt base": ({"base_model_name_or_pth": "me/x"}, "did you mean 'base_model_name_or_path'"),
    "a base that is a number": (
        {"base_model_name_or_path": 3},
        "base_model_name_or_path=3, and str or null is needed",
    ),
    "a base that is a list": ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path=\['a'\]"),
    "a revision that is a number": ({"revision": 3}, "revision=3, and str or null is needed"),
    "a task that is a number": ({"task_type": 3}, "task_type=3"),
    "inference in words": ({"inference_mode": "no"}, "inference_mode='no', and bool is needed"),
    "a mapping that is a number": ({"auto_mapping": 3}, "auto_mapping=3, and dict or null is needed"),
    "a mapping of nothing": ({"auto_mapping": {}}, "with base_model_class and parent_library as str"),
    "depth in words": ({"num_hidden_layers": "4"}, "num_hidden_layers='4', and int or null is needed"),
    "another depth": ({"num_hidden_layers": 32}, "made for a base of 32 decoder layers"),
    "a million side layers": ({"num_side_layers": 1_000_000}, "num_side_layers is 1000000, but .* needs 1 to 4"),
    "a negative number of side layers": ({"num_side_layers": -1}, "num_side_layers is -1"),
    "no side layer": ({"num_side_layers": 0}, "num_side_layers is 0"),
    "two side layers, and weights of one": ({"num_side_layers": 2}, "9 weights of the adapter do not fit the 18 of 2"),
    "side layers in words": ({"num_side_layers": "one"}, "num_side_layers is 'one'"),
    "true side layers": ({"num_side_layers": True}, "num_side_layers is True"),
    "a split in words": ({"split_layer": "2"}, "split_layer is '2'"),
    "a split that is a list": ({"split_layer": [2]}, r"split_layer is \[2\]"),
    "a split that is null": ({"split_layer": None}, "split_layer is None"),
    "half a split": ({"split_layer": 1.5}, "split_layer is 1.5"),
    "a split below": ({"split_layer": 0}, "split_layer is 0"),
    "a split above": ({"split_layer": 4}, "split_layer is 4"),
    "an unknown routing": ({"routing": "later"}, "routing is 'later': choose one of"),
    "a routing that is a number": ({"routing": 1}, "routing is 1"),
    "a routing that is a list": ({"routing": ["late_fusion"]}, r"routing is \['late_fusion'\]"),
    "the routing none": ({"routing": "none"}, "The routing of this adapter is 'none'"),
    "fusion below the split": ({"fusion_layers": [0]}, r"fusion_layers is \[0\]"),
    "fusion in words": ({"fusion_layers": "3"}, "fusion_layers is '3'"),
    "no fusion": ({"fusion_layers": []}, r"fusion_layers is \[\]"),
    "fusion twice": ({"fusion_layers": [3, 3]}, "list each layer once"),
    "too much fusion": ({"num_fusion_layers": 9}, "num_fusion_layers is 9"),
    "fusion where all read": ({"routing": "kv_substitution", "fusion_layers": [3]}, "fusion_layers is .* every layer"),
    "fusion where none reads": ({"routing": "text_only", "num_fusion_layers": 2}, "num_fusion_layers is 2.* no layer"),
    "an unknown start": ({"side_branch_init": "zeros"}, "side_branch_init is 'zeros'"),
    "an unknown MLP": ({"side_branch_mlp": "none"}, "side_branch_mlp is 'none'"),
    "a latent without a rank": ({"routing": "latent"}, "latent_rank is None"),
    "a latent of rank 0": ({"routing": "latent", "latent_rank": 0}, "latent_rank is 0"),
    "a latent wider than the model": ({"routing": "latent", "latent_rank": 33}, "latent_rank is 33"),
    "a million side layers of a latent": (
        {"routing": "latent", "latent_rank": 4, "latent_side_layers": 10**6},
        "latent_side_layers is 1000000",
    ),
    "a stride of 0": ({"routing": "latent", "latent_rank": 4, "latent_stride": 0}, "latent_stride 0"),
    "a score of all": ({"routing": "latent", "latent_rank": 4, "latent_score": "norm"}, "latent_stride from 2 on"),
    "an unknown score": (
        {"routing": "latent", "latent_rank": 4, "latent_stride": 2, "latent_score": "size"},
        "choose norm or distance",
    ),
    "a latent layer below the split": (
        {"routing": "latent", "latent_rank": 4, "latent_layers": [0]},
        r"latent_layers is \[0\]",
    ),
}


def _set(name: str, value: float) -> Callable:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[next(key for key in weights if name in key)].view(-1)[-1] = value

    return change


def _renamed(old: str, new: str) -> Callable:
    return lambda weights: weights.update({name.replace(old, new): weights.pop(name) for name in list(weights)})


NO_NUMBERS = "1 of .* numbers of the weight .*side_branch.* are NaN or infinite"
WEIGHT_CHANGES = {
    "NaN": (_set("q_proj", float("nan")), NO_NUMBERS),
    "infinite": (_set("down_proj", float("inf")), NO_NUMBERS),
    "negative infinite": (_set("input_layernorm", float("-inf")), NO_NUMBERS),
    "of another branch's name": (_renamed("side_branch", "side_branches"), "weights of the adapter do not fit"),
    "of another layer": (_renamed("side_branch.0", "side_branch.1"), "weights of the adapter do not fit"),
    "without PEFT's prefix": (_renamed("base_model.model.", ""), "weights of the adapter do not fit|do not fit"),
    "none at all": (lambda weights: weights.clear(), "9 weights of the adapter do not fit"),
    "one more": (lambda weights: weights.update(more=torch.ones(1)), "'more': .* None is needed"),
}
FILES = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json|adapter model file not found"),
    "a config that is a folder": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
        "adapter_config.json|adapter model file not found|Is a directory",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "There is no adapter_model.safetensors"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
    "truncated weights": (lambda folder: _cut(folder / WEIGHTS), "is damaged"),
    "weights that are text": (lambda folder: (folder / WEIGHTS).write_text("weights"), "is damaged"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "only adapter_model.bin, a pickle that could run code",
    ),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> LlavaForConditionalGeneration:
    """One for all tests: a refused adapter has to leave it as it was."""
    folder = tmp_path_factory.mktemp("base")
    make_llava(dtype=torch.float32).save_pretrained(folder)
    return LlavaForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(base, DpvrConfig(split_layer=2))
    model.save_pretrained(folder)
    model.unload()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def check_refused(folder: Path, base: LlavaForConditionalGeneration, message: str) -> None:
    doors = {
        "PeftModel": lambda: PeftModel.from_pretrained(base, folder),
        "AutoPeftModel": lambda: AutoPeftModel.from_pretrained(folder),
        "transformers": lambda: base.load_adapter(str(folder)),
    }
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    for name, door in doors.items():
        with pytest.raises((ValueError, OSError), match=message) as error:
            door()
        assert len(str(error.value)) < 1000, name
        assert type(base) is LlavaForConditionalGeneration and not hasattr(base, "peft_config"), name
        assert all(torch.equal(weight, before[key]) for key, weight in base.state_dict().items()), name
    model = get_peft_model(base, DpvrConfig(split_layer=2))
    try:
        for name in ("default", "another"):  # in place of an adapter, and beside it
            with pytest.raises((ValueError, OSError), match=message):
                model.load_adapter(str(folder), name)
            assert list(model.peft_config) == ["default"] and model.peft_config["default"].split_layer == 2
    finally:
        model.unload()


@pytest.mark.parametrize("kind", NO_CONFIGS)
def test_a_config_that_is_none_is_refused_by_every_door(kind, folder, base):
    content, message = NO_CONFIGS[kind]
    (folder / CONFIG).write_bytes(content)
    check_refused(folder, base, message)


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_cannot_be_are_refused_by_every_door(kind, folder, base):
    fields, message = FIELDS[kind]
    edit(folder, **fields)
    check_refused(folder, base, message)


@pytest.mark.parametrize("kind", WEIGHT_CHANGES)
def test_weights_that_are_no_side_branch_are_refused_by_every_door(kind, folder, base):
    change, message = WEIGHT_CHANGES[kind]
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(folder, base, message)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_missing_or_damaged_are_refused_by_every_door(kind, folder, base):
    harm, message = FILES[kind]
    harm(folder)
    check_refused(folder, base, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": "/no/such/folder"},
        {"auto_mapping": {"base_model_class": "NoLlava", "parent_library": "transformers"}},
        {"auto_mapping": {"base_model_class": "NoLlava", "parent_library": "transformers.no_such"}},
    ],
)
def test_a_base_that_cannot_be_loaded_is_said_where_it_is_needed(fields, folder, base):
    edit(folder, **fields)
    with pytest.raises(ValueError, match="The base of the adapter .* cannot be loaded: .* Load the base yourself"):
        AutoPeftModel.from_pretrained(folder)
    PeftModel.from_pretrained(base, folder).unload()


def test_an_adapter_of_another_method_is_read_as_ever(folder, tmp_path):
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    assert PeftConfig.from_pretrained(str(folder)).r == 4
    with pytest.raises(ValueError, match="is of the method 'LORA', not 'DPVR': load it with PeftModel"):
        DpvrConfig.from_pretrained(str(folder))
