"""Files that describe no model, no plan and no run: config.json, plan files and the YAML of --config, by kind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llava
from lines import NEEDS_TRAINING

from dpvr.analysis.plan_search import read_plan
from modeling_dpvr import DpvrLlavaForConditionalGeneration

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
NO_OBJECTS = {
    "empty": (b"", "is no JSON"),
    "cut off": (b'{"model_type": "dpvr_llava", ', "is no JSON"),
    "deep": (DEEP.encode(), "is no JSON"),
    "binary": (b"\xff\xfe\x00", "is no JSON"),
    "null": (b"null", "is a NoneType, and a JSON object is needed"),
    "a list": (b"[]", "is a list"),
    "a number": (b"3", "is a int"),
    "a string": (b'"llava"', "is a str"),
    "nothing in it": (b"{}", "is of a model of type None, and a LLaVA is needed"),
}
FIELDS = {
    "another family": ({"model_type": "qwen2_vl"}, "is of a model of type 'qwen2_vl', .* is a PEFT adapter"),
    "a type that is null": ({"model_type": None}, "is of a model of type None"),
    "a type that is a list": ({"model_type": ["llava"]}, "is of a model of type"),
    "no decoder": ({"text_config": None}, "text_config=None, and a JSON object is needed"),
    "a decoder that is a list": ({"text_config": [1]}, r"text_config=\[1\]"),
    "a decoder that is a word": ({"text_config": "llama"}, "text_config='llama'"),
    "a decoder of another kind": ({"text_config": {"model_type": "gpt2"}}, "The decoder is of type 'gpt2'"),
    "no tower": ({"vision_config": None}, "vision_config=None"),
    "a tower that is a list": ({"vision_config": []}, r"vision_config=\[\]"),
    "no image token": ({"image_token_index": None}, "image_token_index is None"),
    "an image token below": ({"image_token_index": -1, "image_token_id": -1}, "image_token_id is -1"),
    "an image token above": ({"image_token_index": 10**6, "image_token_id": 10**6}, "the vocabulary has 40 tokens"),
    "a misspelt split": ({"spilt_layer": 2}, "did you mean 'split_layer'"),
    "a misspelt base": ({"base_model_name_or_pth": "x"}, "did you mean 'base_model_name_or_path'"),
    "a base that is a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3: name the base"),
    "a base that is true": ({"base_model_name_or_path": True}, "base_model_name_or_path is True"),
    "a base that is a list": ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\]"),
    "a base without a name": ({"base_model_name_or_path": " "}, "base_model_name_or_path is ' '"),
    "a base that is gone": ({"base_model_name_or_path": "/no/such"}, "The base '/no/such' of .* cannot be loaded"),
    "a base with a null byte": ({"base_model_name_or_path": "a\0b"}, "The base .* cannot be loaded"),
    "no base": ({"base_model_name_or_path": None}, "is not a full LLaVA: it lacks 82 of the weights"),
    "a million side layers": ({"num_side_layers": 10**6}, "num_side_layers is 1000000"),
    "a million, and no routing": ({"num_side_layers": 10**6, "routing": "none"}, "num_side_layers 1000000"),
    "two side layers": ({"num_side_layers": 2}, "9 weights of the side branch do not fit the 18"),
    "side layers in words": ({"num_side_layers": "1"}, "num_side_layers is '1'"),
    "a split in words": ({"split_layer": "2"}, "split_layer is '2'"),
    "a split in words, and no routing": ({"split_layer": "2", "routing": "none"}, "split_layer is '2'"),
    "a split that is no number": ({"split_layer": float("nan")}, "split_layer is nan"),
    "a split that is a list": ({"split_layer": [2]}, "split_layer is .2"),
    "a routing that is null": ({"routing": None}, "routing is None"),
    "a routing that is a list": ({"routing": ["none"]}, "routing is "),
    "fusion where all read": ({"routing": "persistent_context", "fusion_layers": [3]}, "every layer from the split"),
    "a rank in words": ({"latent_rank": "4"}, "latent_rank is '4'"),
    "a rank above the width": ({"latent_rank": 10**9}, "latent_rank is 1000000000, but the decoder is 32 wide"),
    "a latent without weights": ({"latent_rank": 4}, "weights of the side branch do not fit"),
    "bits of another library": ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
    "bits of no library": ({"quantization_config": {"quant_method": "none"}}, "quantised by 'none'"),
    "bits that are a number": ({"quantization_config": 4}, "quantization_config=4, and a JSON object is needed"),
}
PLANS = {
    "missing": (None, "There is no plan file"),
    "empty": (b"", "holds None"),
    "a list": (b"- 1\n", r"holds \[1\]"),
    "a word": (b"plan\n", "holds 'plan'"),
    "unknown fields": (b"split: 2\n", "holds {'split': 2}"),
    "a misspelt field": (b"spilt_layer: 2\n", "holds {'spilt_layer': 2}"),
    "a key that is a number": (b"3: 2\n", "holds {3: 2}"),
    "a key that is a list": (b"? [a]\n: 2\n", "is no YAML"),
    "no YAML": (b"split_layer: [2\n", "is no YAML"),
    "a tab": (b"\tsplit_layer: 2\n", "is no YAML"),
    "binary": (b"\xff\xfe\x00", "is no YAML"),
    "deep": (b"[" * 10_000, "is no YAML"),
    "two documents": (b"split_layer: 2\n---\nsplit_layer: 3\n", "is no YAML"),
    "code": (b"!!python/object/apply:os.system ['true']\n", "is no YAML"),
    "an alias of itself": (b"&a [*a]\n", "holds "),
}
RUNS = {
    "empty": (b"", "holds None, and name: value lines are needed"),
    "a list": (b"- 1\n", "name: value lines are needed"),
    "a word": (b"run\n", "name: value lines are needed"),
    "no YAML": (b"split_layer: [2\n", "is no YAML"),
    "binary": (b"\xff\xfe\x00", "is no YAML"),
    "code": (b"!!python/object/apply:os.system ['true']\n", "is no YAML"),
    "an unknown option": (b"learning_rat: 0.1\n", "did you mean --learning_rate"),
    "a key that is a number": (b"3: 2\n", "name: value lines are needed"),
    "a rate in words": (b"learning_rate: fast\n", "learning_rate"),
    "a rate that is a list": (b"learning_rate: [1]\n", "learning_rate"),
    "steps in words": (b"max_steps: all\n", "max_steps"),
    "half a step": (b"max_steps: 2.5\n", "max_steps"),
    "a method unknown": (b"method: prefix\n", "method"),
    "rows in words": (b"num_rows: many\n", "num_rows"),
    "a batch of words": (b"per_device_train_batch_size: big\n", "per_device_train_batch_size"),
    "a length in words": (b"max_length: long\n", "max_length"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A base and the side branch alone."""
    folder = tmp_path_factory.mktemp("configs")
    make_llava(dtype=torch.float32).save_pretrained(folder / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(folder / "base", split_layer=2)
    model.save_pretrained(folder / "side", side_branch_only=True)
    return folder / "side"


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def check_refused(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        DpvrLlavaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("kind", NO_OBJECTS)
def test_a_file_that_is_no_config_is_refused(kind, folder):
    content, message = NO_OBJECTS[kind]
    (folder / "config.json").write_bytes(content)
    check_refused(folder, message)


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    check_refused(folder, "There is no config.json in")


@pytest.mark.parametrize("kind", FIELDS)
def test_a_config_of_no_model_is_refused(kind, folder):
    fields, message = FIELDS[kind]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **fields}))
    check_refused(folder, message)


@pytest.mark.parametrize("kind", PLANS)
def test_a_file_that_holds_no_plan_is_refused(kind, tmp_path):
    content, message = PLANS[kind]
    if content is not None:
        (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")


@NEEDS_TRAINING
@pytest.mark.parametrize("kind", RUNS)
def test_a_file_that_describes_no_run_is_refused_in_one_line(kind, tmp_path, capsys):
    from dpvr.training.arguments import parse

    content, message = RUNS[kind]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises((ValueError, SystemExit), match=".") as error:
        parse(["--config", str(path)])
    said = str(error.value) if error.type is not SystemExit else capsys.readouterr().err
    assert message in said and said.strip().count("\n") == 0, said
