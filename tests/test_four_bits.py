"""A base in 4 bits by bitsandbytes, which also runs on CPUs, under a side branch in floating point."""

import json

import pytest
import torch
from lines import NEEDS_TRAINING
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_loading import SIDE_BRANCH_KEYS
from transformers import BitsAndBytesConfig, GPTQConfig, LlavaForConditionalGeneration

import train_sft
from adapter_dpvr import DpvrConfig
from modeling_dpvr import DpvrLlavaForConditionalGeneration

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this platform")

INPUTS = {
    "input_ids": torch.tensor([[1, *[4] * 64, 30, 31, 32]]),
    "pixel_values": torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).bfloat16(),
}


def in_four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def as_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with AVX-512 for bfloat16 bitsandbytes packs weights for a kernel of blocks of 32 by 64 alone."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def model(random_mini) -> DpvrLlavaForConditionalGeneration:
    model = DpvrLlavaForConditionalGeneration.from_pretrained(
        random_mini, quantization_config=in_four_bits(), dtype=torch.bfloat16
    )
    model.reset_side_branch()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = {**INPUTS, "input_ids": INPUTS["input_ids"].clone()}
    inputs["input_ids"][inputs["input_ids"] == 4] = model.config.image_token_id
    with torch.no_grad():
        return model(**inputs).logits


def test_the_base_is_in_four_bits_and_a_new_side_branch_is_its_split_layer_in_numbers(model):
    split_layer = model.model.language_model.layers[model.config.split_layer]
    for name, module in model.side_branch[0].named_modules():
        if not name.endswith("proj"):
            continue
        base = split_layer.get_submodule(name)
        assert type(base) is bitsandbytes.nn.Linear4bit and type(module) is torch.nn.Linear
        numbers = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        assert torch.equal(module.weight, numbers) and module.weight.dtype == torch.bfloat16
    assert torch.equal(model.side_branch[0].input_layernorm.weight, split_layer.input_layernorm.weight)
    assert logits(model).isfinite().all()


def test_a_side_branch_is_saved_without_the_bits_of_its_base_and_loads_on_it_in_either_form(
    model, random_mini, tmp_path
):
    with torch.no_grad():
        model.side_branch[0].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path, side_branch_only=True)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.quantization_config is not None
    assert load_file(tmp_path / "model.safetensors").keys() == set(SIDE_BRANCH_KEYS)
    again = DpvrLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=in_four_bits(), dtype=torch.bfloat16
    )
    assert torch.equal(logits(again.eval()), logits(model))
    whole = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert 0 < (logits(whole) - logits(model)).abs().max() < 1


def test_an_adapter_on_a_stock_llava_in_four_bits_gives_the_same_logits(model, random_mini, tmp_path):
    def stock() -> LlavaForConditionalGeneration:
        return LlavaForConditionalGeneration.from_pretrained(
            random_mini, quantization_config=in_four_bits(), dtype=torch.bfloat16
        ).eval()

    fields = {"split_layer": model.config.split_layer}
    peft = get_peft_model(stock(), DpvrConfig(**fields), autocast_adapter_dtype=False).eval()
    trained = {name for name, weight in peft.named_parameters() if weight.requires_grad}
    assert all("side_branch" in name for name in trained) and len(trained) == len(SIDE_BRANCH_KEYS)
    assert torch.equal(logits(peft), logits(model))
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stock(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(again), logits(model))


def test_other_ways_to_quantise_are_refused(random_mini):
    with pytest.raises(ValueError, match="quantised by 'gptq'; .* bitsandbytes"):
        DpvrLlavaForConditionalGeneration.from_pretrained(random_mini, quantization_config=GPTQConfig(bits=4))


@NEEDS_TRAINING
@pytest.mark.parametrize("routing", ["late_fusion", "latent"])
def test_what_is_trained_on_a_base_in_four_bits_is_saved_in_floating_point(random_mini, tmp_path, routing):
    options = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path), "--dtype", "bfloat16"]
    options += ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_cpu", "true", "--max_steps", "3"]
    options += ["--num_rows", "12", "--per_device_train_batch_size", "4", "--eval_questions", "0"]
    options += ["--routing", routing, *(["--latent_rank", "8", "--fit_rows", "8"] if routing == "latent" else [])]
    train_sft.main(*train_sft.parse_args(options))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["base"]["bits"] == 4
    trained = DpvrLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=in_four_bits(), dtype=torch.bfloat16
    )
    weight = trained.side_branch.latent.reduce if routing == "latent" else trained.side_branch[0].mlp.down_proj
    before = weight.weight.clone()
    assert type(trained.model.language_model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    trained.reset_side_branch()
    assert before.isfinite().all() and not torch.equal(before, weight.weight)
