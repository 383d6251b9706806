"""adapter_dpvr.py: adapters and bases that do not fit are refused before anything is touched."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import SAVED_KEYS, logits, save_trained
from conftest import make_llava
from peft import PeftModel, get_peft_model
from reference import Prompts
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

from adapter_dpvr import DpvrConfig, DpvrLayer


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three rows, padded on the left: an image in the middle, two images, none."""
    return Prompts([[1, 2], [2, 0, 1], [3]], padding_side="left").inputs


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter at split 2 whose side branch is far from where it started."""
    save_trained(tmp_path / "adapter", seed=1)
    return tmp_path / "adapter"


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def change_keys(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")

    return run


def change_config(**fields: object) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return run


FIRST_KEY = min(SAVED_KEYS)
DAMAGES = {
    "truncated": (truncate, "damaged"),
    "pickle": (pickled, "only adapter_model.bin, a pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "missing key": (change_keys(lambda weights: weights.pop(FIRST_KEY)), "its shape is None"),
    "unknown key": (change_keys(lambda weights: weights.update(lora=torch.ones(1))), "'lora': .* None is needed"),
    "other number of layers": (change_config(num_side_layers=2), "2 side layers"),
    "split beyond depth": (change_config(split_layer=4), "split_layer"),
    "no routing": (change_config(routing="none"), "late_fusion"),
}


def assert_refused(llava: LlavaForConditionalGeneration, folder: Path, match: str) -> None:
    before = {name: weight.clone() for name, weight in llava.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(llava, folder)
    assert type(llava.model) is LlavaModel
    after = llava.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_before_the_base_is_touched(llava, saved, damage):
    spoil, match = DAMAGES[damage]
    spoil(saved)
    assert_refused(llava, saved, match)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"hidden_size": 64}, r"its shape is \(.*32.*\), and \(.*64.*\) is needed. Load it on the base"),
        ({"intermediate_size": 56}, r"its shape is \(.*48.*\), and \(.*56.*\) is needed. Load it on the base"),
        ({"depth": 6}, "made for a base of 4 decoder layers, and this one has 6: load it on"),
    ],
)
def test_another_base_is_refused_before_it_is_touched(saved, other, match):
    assert_refused(make_llava(**other), saved, match)


def test_a_refused_second_adapter_leaves_the_first_as_it_was(saved, tmp_path, prompts):
    save_trained(tmp_path / "second", seed=2)
    model = PeftModel.from_pretrained(make_llava(), saved)
    before, names = logits(model, prompts), set(model.state_dict())
    change_config(num_side_layers=2)(tmp_path / "second")
    with pytest.raises(ValueError, match="2 side layers"):
        model.load_adapter(tmp_path / "second", adapter_name="second")
    assert set(model.peft_config) == {"default"} and set(model.state_dict()) == names
    assert torch.equal(logits(model, prompts), before)
    assert isinstance(model.base_model.model.model.side_branch, DpvrLayer)


def test_a_model_that_is_no_llava_is_refused():
    with pytest.raises(ValueError, match="needs a vision-language model with its head, and this is a LlamaModel"):
        get_peft_model(make_llava().model.language_model, DpvrConfig(split_layer=2))


@pytest.mark.parametrize("name", ["a.b", "keys", "model", "self_attn", "0"])
def test_a_name_that_would_be_mistaken_for_a_part_of_the_model_is_refused(llava, name):
    with pytest.raises(ValueError, match="cannot have the name .*: choose another"):
        get_peft_model(llava, DpvrConfig(split_layer=2), adapter_name=name)
    assert type(llava.model) is LlavaModel


def test_weights_that_do_not_fit_are_refused_on_every_way_they_come(saved, llava):
    change_keys(lambda weights: weights.pop(FIRST_KEY))(saved)
    with pytest.raises(ValueError, match="1 weights of the adapter do not fit"):
        PeftModel.from_pretrained(llava, saved, config=DpvrConfig(split_layer=2))
    model = get_peft_model(make_llava(), DpvrConfig(split_layer=2))
    with pytest.raises(ValueError, match="1 weights of the adapter do not fit"):
        model.load_adapter(saved, adapter_name="default")


def test_one_config_may_be_used_on_bases_of_two_depths():
    config = DpvrConfig(split_layer=2)
    for depth in (4, 6):
        get_peft_model(make_llava(depth), config)
        assert config.num_hidden_layers == depth


def test_a_batch_without_pictures_gives_the_side_branch_a_gradient_of_zero(llava, prompts):
    model = get_peft_model(llava, DpvrConfig(split_layer=2))
    text = Prompts([[3], [5]]).inputs
    model(**text, labels=text["input_ids"]).loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert len(gradients) == len(SAVED_KEYS) and not any(gradient.any() for gradient in gradients)
    assert torch.equal(logits(model, text), logits(make_llava(), text))
