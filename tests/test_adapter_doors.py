"""adapter_dpvr.py: PEFT's and transformers' own ways to load an adapter, and LoRA beside a side branch."""

import json
from pathlib import Path

import pytest
import torch
from adapters import logits, save_trained, shaken, without_prefix
from conftest import make_llava
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from reference import Prompts
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig
from hub_dpvr import save_adapter
from modeling_dpvr import DpvrLlavaForConditionalGeneration


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three rows, padded on the left: an image in the middle, two images, none."""
    return Prompts([[1, 2], [2, 0, 1], [3]], padding_side="left").inputs


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter at split 2 whose side branch is far from where it started."""
    save_trained(tmp_path / "adapter", seed=1)
    return tmp_path / "adapter"


@pytest.fixture
def base_folder(tmp_path) -> str:
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def base_of(folder: str) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(params=["side layers", "a latent"])
def method(request) -> dict[str, object]:
    return {"split_layer": 2, **({"routing": "latent", "latent_rank": 8} if request.param == "a latent" else {})}


@pytest.fixture(params=["by PEFT", "by save_adapter"])
def adapter_folder(request, base_folder, method, tmp_path) -> str:
    """Saved by PEFT, or from a DPVR-LLaVA, which has side layers and a latent."""
    folder = tmp_path / "adapter"
    if request.param == "by PEFT":
        shaken(get_peft_model(base_of(base_folder), DpvrConfig(**method)), seed=3).save_pretrained(folder)
    else:
        dpvr = DpvrLlavaForConditionalGeneration.from_pretrained(base_folder, **{"latent_rank": 8, **method})
        dpvr.freeze_base()
        save_adapter(shaken(dpvr, seed=3), folder)
    return str(folder)


def by_load_adapter(base: str, adapter: str) -> torch.nn.Module:
    llava = base_of(base)
    llava.load_adapter(adapter)
    return llava


DOORS = {
    "model.load_adapter": by_load_adapter,
    "AutoPeftModel": lambda base, adapter: AutoPeftModel.from_pretrained(adapter),
    "AutoModelForImageTextToText": lambda base, adapter: AutoModelForImageTextToText.from_pretrained(adapter),
    "LlavaForConditionalGeneration": lambda base, adapter: LlavaForConditionalGeneration.from_pretrained(adapter),
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(base_of(base), adapter),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_of_peft_and_transformers_gives_the_saved_model(door, base_folder, method, adapter_folder, prompts):
    inputs = {**prompts, "pixel_values": prompts["pixel_values"].float()}
    layers = 0 if "latent_rank" in method else 1
    expected = DpvrLlavaForConditionalGeneration.from_pretrained(base_folder, **method, num_side_layers=layers)
    expected.load_side_branch(without_prefix(Path(adapter_folder)))
    got = logits(DOORS[door](base_folder, adapter_folder).eval(), inputs)
    torch.testing.assert_close(got, logits(expected.eval(), inputs), atol=1e-5, rtol=0)
    assert not torch.allclose(got, logits(base_of(base_folder), inputs), atol=1e-2)


def test_its_type_behaves_as_a_member_of_pefts_enumeration():
    kind, lora = DpvrConfig().peft_type, LoraConfig().peft_type
    assert (kind.value, kind.name) == ("DPVR", "DPVR") and (lora.value, lora.name) == ("LORA", "LORA")
    assert str(kind) == "PeftType.DPVR" and str(lora) == "PeftType.LORA"
    assert kind == "DPVR" and hash(kind) == hash("DPVR") and json.dumps(kind) == '"DPVR"'


def test_a_mixed_model_refuses_it_by_name(llava):
    mixed = get_peft_model(llava, LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="cannot hold a side branch.*call inject_adapter_in_model"):
        mixed.add_adapter("branch", DpvrConfig(split_layer=2))


LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|k_proj|v_proj|down_proj)", "init_lora_weights": False}


def with_lora(seed: int = 1, **fields: object) -> LlavaForConditionalGeneration:
    llava = make_llava()
    torch.manual_seed(seed)
    return inject_adapter_in_model(LoraConfig(**LORA, **fields), llava).eval()


def merged_lora() -> LlavaForConditionalGeneration:
    llava = make_llava()
    torch.manual_seed(1)
    return get_peft_model(llava, LoraConfig(**LORA)).merge_and_unload().eval()


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("init", ["split_layer", "identity"])
def test_a_side_branch_on_a_base_with_lora_starts_from_what_its_layers_do(init, name, prompts):
    fields = {"split_layer": 2, "side_branch_init": init}
    expected = logits(DpvrLlavaForConditionalGeneration.from_llava(merged_lora(), **fields), prompts)
    base = with_lora(lora_dropout=0.5)
    before = logits(base, prompts)
    adapted = get_peft_model(base, DpvrConfig(**fields), adapter_name=name).eval()
    assert (logits(adapted, prompts) - expected).abs().max() < 1e-4
    assert all(p.requires_grad for key, p in adapted.named_parameters() if ".side_branch." in key)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, prompts), before)  # LoRA belongs to the base
    dpvr = DpvrLlavaForConditionalGeneration.from_llava(with_lora(), **fields)
    assert (logits(dpvr, prompts) - expected).abs().max() < 1e-4


def test_lora_goes_on_after_a_side_branch_too(prompts):
    """The branch is then of the plain layers, and the layers that run are LoRA's."""
    adapted = get_peft_model(make_llava(), DpvrConfig(split_layer=2))
    branch = {key.replace(".default.", "."): v for key, v in adapted.state_dict().items() if "side_branch" in key}
    torch.manual_seed(1)
    both = get_peft_model(adapted, LoraConfig(**LORA)).eval()
    expected = DpvrLlavaForConditionalGeneration.from_llava(merged_lora(), split_layer=2)
    expected.load_side_branch({key.removeprefix("base_model.model."): value for key, value in branch.items()})
    assert (logits(both, prompts) - logits(expected, prompts)).abs().max() < 1e-4


def test_an_adapter_over_a_name_in_use_brings_its_plan(saved, tmp_path, prompts):
    other = {"split_layer": 1, "num_fusion_layers": 2}
    save_trained(tmp_path / "second", seed=2, **other)
    expected = logits(PeftModel.from_pretrained(make_llava(), tmp_path / "second"), prompts)
    for model in (
        PeftModel.from_pretrained(make_llava(), saved),
        get_peft_model(make_llava(), DpvrConfig(split_layer=3)),
    ):
        model.load_adapter(tmp_path / "second", adapter_name="default")
        assert torch.equal(logits(model, prompts), expected)
        assert {name: vars(model.peft_config["default"])[name] for name in other} == other
    half = PeftModel.from_pretrained(make_llava(dtype=torch.bfloat16), saved)
    half.load_adapter(tmp_path / "second", adapter_name="default")
    assert {p.dtype for key, p in half.named_parameters() if "side_branch" in key} == {torch.float32}
    own = PeftModel.from_pretrained(make_llava(), saved, config=DpvrConfig(split_layer=2, routing="kv_substitution"))
    assert own.peft_config["default"].routing == "kv_substitution"  # a config that is given stays
