"""Bases with layers on the disk, or on the CPU beside the device that runs: they answer, train and save as others.

device_map={..., "layers.2": "disk"}     device_map="auto", max_memory={"cpu": ...}     accelerate.cpu_offload(model)
"""

import pytest
import torch
from accelerate import cpu_offload
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, make_llava
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig
from loading_dpvr import SIDE_BRANCH, is_side_branch
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from side_branch_dpvr import device_of
from versions_dpvr import LINE_4

IMAGE = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE
PARTS = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.norm")
DEEP = {f"model.language_model.layers.{index}": "disk" if index >= 2 else "cpu" for index in range(4)}
LAYERS = {f"model.{part}": "cpu" for part in (*PARTS, "language_model.rotary_emb")} | DEEP | {"lm_head": "cpu"}
MAPS = {
    "layers": {"device_map": LAYERS},
    "layers and branch": {"device_map": {**LAYERS, SIDE_BRANCH: "disk"}},
    "decoder": {"device_map": {"model": "disk", "lm_head": "cpu"}},
    "little memory": {"device_map": "auto", "max_memory": {"cpu": 60_000}},
    "enough memory": {"device_map": "auto"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its side branch alone, all in one repository and as an adapter, with what they answer."""
    folder = tmp_path_factory.mktemp("offloaded")
    make_llava(dtype=torch.float32).save_pretrained(folder / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(folder / "base", split_layer=2).eval()
    torch.save(logits(model), folder / "new.pt")
    with torch.no_grad():
        for weight in model.side_branch.parameters():
            weight.add_(0.1)
    model.save_pretrained(folder / "side", side_branch_only=True)
    model.save_pretrained(folder / "whole")
    adapter = get_peft_model(LlavaForConditionalGeneration.from_pretrained(folder / "base"), DpvrConfig(split_layer=2))
    own = model.state_dict()
    with torch.no_grad():
        for name, weight in adapter.get_base_model().named_parameters():
            if is_side_branch(name):
                weight.copy_(own[name.replace(".default.", ".")])
    adapter.save_pretrained(folder / "adapter")
    torch.save(logits(model), folder / "saved.pt")
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    return model(input_ids=torch.tensor([[1, *IMAGE, 10, 11]]), pixel_values=torch.randn(1, 3, 8, 8)).logits


def load(folders, tmp_path, source: str, **options):
    fields = {"split_layer": 2} if source == "base" else {}
    return DpvrLlavaForConditionalGeneration.from_pretrained(
        folders / source, offload_folder=tmp_path / "offload", **options, **fields
    ).eval()


def expected(folders, source: str) -> torch.Tensor:
    return torch.load(folders / ("new.pt" if source in ("base", "new") else "saved.pt"))


@pytest.mark.parametrize("source", ["base", "side", "whole"])
@pytest.mark.parametrize("where", MAPS)
def test_a_model_answers_as_without_a_device_map_and_its_side_branch_is_in_memory(where, source, folders, tmp_path):
    model = load(folders, tmp_path, source, **MAPS[where])
    assert where == "enough memory" or "disk" in model.hf_device_map.values()
    torch.testing.assert_close(logits(model), expected(folders, source))
    assert all(weight.device.type == "cpu" for weight in model.side_branch.parameters())


def stock(folders, tmp_path, **options) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        folders / "base", offload_folder=tmp_path / "offload", **options
    )


@torch.no_grad()
def test_over_a_name_in_use_it_brings_its_weights_to_an_offloaded_base_too(folders, tmp_path):
    model = get_peft_model(stock(folders, tmp_path, **MAPS["layers"]), DpvrConfig(split_layer=1)).eval()
    model.load_adapter(folders / "adapter", "default")
    torch.testing.assert_close(logits(model), expected(folders, "saved"))
    model.load_adapter(folders / "adapter", "another")
    model.set_adapter("another")
    torch.testing.assert_close(logits(model), expected(folders, "saved"))


def by_load_adapter(folders, tmp_path, **options):
    model = stock(folders, tmp_path, **options)
    model.load_adapter(str(folders / "adapter"))
    return model


DOORS = {
    "new": lambda folders, tmp_path, **options: get_peft_model(
        stock(folders, tmp_path, **options), DpvrConfig(split_layer=2)
    ),
    "PeftModel": lambda folders, tmp_path, **options: PeftModel.from_pretrained(
        stock(folders, tmp_path, **options), folders / "adapter"
    ),
    "AutoPeftModel": lambda folders, tmp_path, **options: AutoPeftModel.from_pretrained(
        folders / "adapter", offload_folder=tmp_path / "offload", **options
    ),
    "load_adapter": by_load_adapter,
}


@pytest.mark.parametrize("where", ["layers", "decoder", "little memory"])
@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_on_an_offloaded_base_answers_as_on_another_and_is_taken_off(door, where, folders, tmp_path):
    if LINE_4 and door == "load_adapter":
        with pytest.raises(ValueError, match="transformers 4 cannot .*: use PeftModel.from_pretrained"):
            DOORS[door](folders, tmp_path, **MAPS[where])
        return
    model = DOORS[door](folders, tmp_path, **MAPS[where]).eval()
    torch.testing.assert_close(logits(model), expected(folders, door))
    if door != "load_adapter":
        vanilla = logits(LlavaForConditionalGeneration.from_pretrained(folders / "base"))
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), vanilla)
        bare = model.unload()
        assert "disk" in bare.hf_device_map.values()
        torch.testing.assert_close(logits(bare), vanilla)


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_on_the_cpu_that_are_lent_to_the_device_that_runs_make_the_same_side_branch(adapter, folders):
    base = cpu_offload(LlavaForConditionalGeneration.from_pretrained(folders / "base"), torch.device("cpu"))
    layer = base.model.language_model.layers[-1]
    assert next(layer.parameters()).device.type == "meta" and device_of(layer).type == "cpu"
    if adapter:
        model = get_peft_model(base, DpvrConfig(split_layer=2))
    else:
        model = DpvrLlavaForConditionalGeneration.from_llava(base, split_layer=2)
    torch.testing.assert_close(logits(model.eval()), expected(folders, "new"))


@pytest.mark.parametrize("where", ["layers", "little memory"])
def test_it_is_trained_and_saved_on_an_offloaded_base(where, folders, tmp_path):
    model = load(folders, tmp_path, "base", **MAPS[where])
    model.freeze_base()
    ids = torch.tensor([[1, *IMAGE, 10, 11]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), labels=ids).loss.backward()
    with torch.no_grad():
        for weight in model.side_branch.parameters():
            assert weight.grad.abs().sum() > 0
            weight.sub_(weight.grad)
    model.save_pretrained(tmp_path / "side", side_branch_only=True)
    want = logits(model)
    if LINE_4:
        with pytest.raises(ValueError, match="transformers 4 cannot save .*: save with side_branch_only=True"):
            model.save_pretrained(tmp_path / "whole")
    else:
        model.save_pretrained(tmp_path / "whole")
    for name in ("side",) if LINE_4 else ("side", "whole"):
        again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(logits(again), want)
