"""What is saved is loadable, and what is loaded is what was saved: files of adapters and side branches."""

import json
import shutil

import pytest
import torch
from conftest import make_llava
from peft import LoraConfig, PeftModel, get_peft_model
from reference import Prompts, make_dpvr
from safetensors.torch import load_file, save_file

from adapter_dpvr import DpvrConfig
from modeling_dpvr import DpvrLlavaForConditionalGeneration

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
BAD_CONFIGS = {  # what is done to a config's text -> what is said
    "missing": (None, "There is no adapter_config.json in"),
    "empty": (lambda text: "", "is no JSON"),
    "cut off": (lambda text: text[:-20], "is no JSON"),
    "deep": (lambda text: DEEP, "is no JSON"),
    "binary": (lambda text: "\x00\x01", "is no JSON"),
    "null": (lambda text: "null", "is a NoneType, and a JSON object is needed"),
    "a list": (lambda text: "[]", "is a list"),
    "a number": (lambda text: "3", "is a int"),
    "a string": (lambda text: '"DPVR"', "is a str"),
    "no method": (lambda text: edited(text, peft_type=None), "is of the method None"),
    "LoRA's": (lambda text: edited(text, peft_type="LORA"), "is of the method 'LORA', not 'DPVR'"),
    "a method in lower case": (lambda text: edited(text, peft_type="dpvr"), "is of the method 'dpvr'"),
    "a misspelt split": (lambda text: edited(text, split_layers=2), "did you mean 'split_layer'"),
    "a misspelt routing": (lambda text: edited(text, rooting="late_fusion"), "did you mean 'routing'"),
    "a misspelt rank": (lambda text: edited(text, latent_ranks=8), "did you mean 'latent_rank'"),
}
BAD_FIELDS = {
    "a million side layers": ({"num_side_layers": 1_000_000}, "num_side_layers is 1000000, but .* needs 1 to 4"),
    "a negative number of side layers": ({"num_side_layers": -1}, "num_side_layers is -1"),
    "no side layer": ({"num_side_layers": 0}, "num_side_layers is 0"),
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
    "the routing none": ({"routing": "none"}, "The routing of this adapter is 'none'"),
    "fusion below the split": ({"fusion_layers": [0]}, r"fusion_layers is \[0\]"),
    "fusion in words": ({"fusion_layers": "3"}, "fusion_layers is '3'"),
    "no fusion": ({"fusion_layers": []}, r"fusion_layers is \[\]"),
    "fusion twice": ({"fusion_layers": [3, 3]}, "list each layer once"),
    "too much fusion": ({"num_fusion_layers": 9}, "num_fusion_layers is 9"),
    "an unknown start": ({"side_branch_init": "zeros"}, "side_branch_init is 'zeros'"),
    "a latent without a rank": ({"routing": "latent"}, "latent_rank is None"),
    "a latent of rank 0": ({"routing": "latent", "latent_rank": 0}, "latent_rank is 0"),
    "a latent wider than the model": ({"routing": "latent", "latent_rank": 33}, "latent_rank is 33"),
    "a million side layers of a latent": (
        {"routing": "latent", "latent_rank": 4, "latent_side_layers": 10**6},
        "latent_side_layers is 1000000",
    ),
    "a stride of 0": ({"routing": "latent", "latent_rank": 4, "latent_stride": 0}, "latent_stride 0"),
    "a latent layer below the split": (
        {"routing": "latent", "latent_rank": 4, "latent_layers": [0]},
        r"latent_layers is \[0\]",
    ),
    "another depth": ({"num_hidden_layers": 32}, "made for a base of 32 decoder layers"),
}
NO_NUMBERS = {"NaN": float("nan"), "infinite": float("inf"), "negative infinite": float("-inf")}


def edited(text: str, **fields) -> str:
    return json.dumps({**json.loads(text), **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(make_llava(), DpvrConfig(split_layer=2)).save_pretrained(folder)
    return folder


def copy_of(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_that_is_no_adapters_is_refused_with_one_sentence(kind, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    change, message = BAD_CONFIGS[kind]
    if change is None:
        (folder / CONFIG).unlink()
    else:
        (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))
    with pytest.raises(ValueError, match=message):
        DpvrConfig.from_pretrained(str(folder))


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_fields_that_fit_no_base_are_refused_before_it_is_changed(kind, saved, tmp_path):
    folder, llava = copy_of(saved, tmp_path), make_llava()
    fields, message = BAD_FIELDS[kind]
    (folder / CONFIG).write_text(edited((folder / CONFIG).read_text(), **fields))
    before = {name: weight.clone() for name, weight in llava.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(llava, str(folder))
    assert llava.state_dict().keys() == before.keys() and type(llava).__name__ == "LlavaForConditionalGeneration"
    assert all(torch.equal(weight, before[name]) for name, weight in llava.state_dict().items())


@pytest.mark.parametrize("way", ["new", "in place of another"])
@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_weights_that_are_no_numbers_are_refused_by_name(kind, way, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "q_proj" in name)
    weights[name][0, 0] = NO_NUMBERS[kind]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of \d+ numbers of the weight .*q_proj.* are NaN or infinite"):
        if way == "new":
            PeftModel.from_pretrained(make_llava(), str(folder))
        else:
            get_peft_model(make_llava(), DpvrConfig(split_layer=2)).load_adapter(str(folder), "default")


@pytest.mark.parametrize("whole", [True, False])
def test_a_side_branch_that_holds_no_numbers_is_refused_by_name(whole, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    with torch.no_grad():
        model.side_branch[0].self_attn.o_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "saved", side_branch_only=not whole)
    with pytest.raises(ValueError, match="side_branch.0.self_attn.o_proj.weight' are NaN or infinite"):
        DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")


def train(model: torch.nn.Module, weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


@pytest.mark.parametrize("changed", ["projector", "decoder layer", "tower", "frozen again", "embeddings resized"])
def test_a_side_branch_is_not_saved_alone_if_what_it_stands_on_was_changed(changed, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    if changed == "embeddings resized":
        model.resize_token_embeddings(48)
    else:
        part = {"decoder layer": model.model.language_model.layers[1], "tower": model.model.vision_tower}
        train(model, next(part.get(changed, model.model.multi_modal_projector).parameters()))
        model.requires_grad_(changed != "frozen again")
    with pytest.raises(ValueError, match="of the base were changed since it was loaded, such as 'model"):
        model.save_pretrained(tmp_path / "side", side_branch_only=True)
    assert not (tmp_path / "side").exists()
    model.save_pretrained(tmp_path / "whole")
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_a_trained_side_branch_is_saved_alone_also_after_a_move_to_another_dtype(tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2).to(torch.bfloat16)
    train(model, model.side_branch[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path / "side", side_branch_only=True)
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "side", dtype=torch.bfloat16)
    trained = model.side_branch[0].self_attn.q_proj.weight
    assert torch.equal(again.side_branch[0].self_attn.q_proj.weight, trained)


@pytest.mark.parametrize("option", [{"max_shard_size": "1KB"}, {"variant": "fp16"}])
def test_an_option_with_which_a_side_branch_could_not_be_loaded_is_refused_by_name(option, tmp_path):
    make_llava(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", split_layer=2)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* does not go with side_branch_only=True"):
        model.save_pretrained(tmp_path / "side", side_branch_only=True, **option)
    assert not (tmp_path / "side").exists()


@pytest.mark.parametrize("option", [{"max_shard_size": "10KB"}, {"variant": "fp16"}])
def test_a_whole_model_is_loaded_from_shards_and_variants(option, tmp_path):
    model = make_dpvr(dtype=torch.float32)
    model.save_pretrained(tmp_path, **option)
    where = {"variant": option["variant"]} if "variant" in option else {}
    again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, **where).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_embeddings_that_peft_saved_with_an_adapter_are_loaded_with_it(tmp_path):
    model = get_peft_model(make_llava(), DpvrConfig(split_layer=2))
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = 7.0
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(make_llava(), str(tmp_path))
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_an_adapter_of_lora_is_no_side_branch(tmp_path):
    get_peft_model(make_llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of the method 'LORA'"):
        DpvrConfig.from_pretrained(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
def test_beams_may_start_from_embeddings_and_pictures(adapter):
    model = make_dpvr()
    if adapter:
        model = get_peft_model(make_llava(), DpvrConfig(split_layer=2)).eval()
        model.generation_config.eos_token_id = None
    batch = Prompts([[3, 1, 2], [2, 2]])
    ids = batch.inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    search = {"num_beams": 3, "do_sample": False, "max_new_tokens": 3}
    want = model.generate(**batch.inputs, **search)[:, ids.shape[1] :]
    others = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **others, **search), want)
