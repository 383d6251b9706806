"""Repositories: vanilla, whole, side branch only; in a fresh process, through the Auto classes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, make_llava
from safetensors.torch import load_file, save_file

from loading_dpvr import is_side_branch
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

SIDE_BRANCH_KEYS = {
    f"model.side_branch.0.{name}.weight"
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}
AUTO_CLASSES = ["AutoModelForImageTextToText", "AutoModel"]
AUTO_CLASSES.append(
    "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForMultimodalLM"
)

LOAD_AND_COMPARE = """
import sys, torch, transformers
torch.set_num_threads(1)  # as in the parent process, so that the sums are the same to the bit
repositories, inputs, *auto_classes = sys.argv[1:]
expected = torch.load(inputs)
for repository in repositories.split(":"):
    for auto_class in auto_classes:
        model = getattr(transformers, auto_class).from_pretrained(repository, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(input_ids=expected["input_ids"], pixel_values=expected["pixel_values"]).logits
        assert type(model).__name__ == "DpvrLlavaForConditionalGeneration", type(model)
        assert model.config.routing == "late_fusion" and model.config.split_layer == 3
        assert torch.equal(logits, expected["logits"]), auto_class
    model.save_pretrained(repository + "-saved-again")
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Folders: a vanilla LLaVA, a whole DPVR made from it, and its side branch alone; and inputs with their logits."""
    folder = tmp_path_factory.mktemp("repositories")
    make_llava(depth=6, dtype=torch.float32).save_pretrained(folder / "llava")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(folder / "llava", split_layer=3).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.side_branch.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "side", side_branch_only=True)
    image = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE
    inputs = {"input_ids": torch.tensor([[1, 9, *image, 11, 12]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with torch.no_grad():
        torch.save({**inputs, "logits": model(**inputs).logits}, folder / "expected.pt")
    return folder


def copy(source, target, **config_changes):
    """A copy of a saved repository, with changes to its config."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **config_changes}))
    return target


def load_and_compare(folder, *arguments: str) -> None:
    command = [sys.executable, "-c", LOAD_AND_COMPARE, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "MISSING" not in result.stderr and "newly initialized" not in result.stderr


def test_auto_classes_load_repositories_in_a_fresh_process_from_another_folder(repositories, tmp_path):
    """Of both kinds: all weights, and the side branch alone; then what was loaded and saved again."""
    copies = [str(copy(repositories / kind, tmp_path / kind)) for kind in ("whole", "side")]
    arguments = [str(repositories / "expected.pt"), *AUTO_CLASSES]
    load_and_compare(tmp_path, ":".join(copies), *arguments)
    load_and_compare(tmp_path, ":".join(f"{path}-saved-again" for path in copies), *arguments)


def test_a_vanilla_checkpoint_loads_directly_and_gets_a_copy_of_the_split_layer(repositories):
    keys = load_file(repositories / "llava" / "model.safetensors").keys()
    assert any(key.startswith("language_model.model.layers.") for key in keys)  # as in llava-hf/llava-1.5-7b-hf
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(repositories / "llava")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "llava", split_layer=3)
    for name, weight in llava.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    layer = llava.model.language_model.layers[3].state_dict()
    assert all(torch.equal(weight, layer[name]) for name, weight in model.side_branch[0].state_dict().items())


def test_a_whole_repository_has_the_names_of_published_checkpoints_which_all_versions_read(repositories, tmp_path):
    own = load_file(Path(__file__).parent.parent / "model.safetensors").keys()  # as in llava-hf/llava-1.5-7b-hf
    published = {name for name in own if ".latent." not in name}
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "whole")
    model.save_pretrained(tmp_path)
    for folder in (repositories / "whole", tmp_path):
        names = load_file(folder / "model.safetensors").keys()
        assert {re.sub(r"\d+", "0", name) for name in names} == {re.sub(r"\d+", "0", name) for name in published}
    weights = load_file(tmp_path / "model.safetensors")
    by_version_5 = {name.replace("tower.vision_model", "tower"): weight for name, weight in weights.items()}
    bare = {name.replace("language_model.model", "language_model"): weight for name, weight in by_version_5.items()}
    for named in (weights, by_version_5, bare):
        save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_the_side_branch_file_holds_exactly_the_side_branch(repositories):
    assert set(load_file(repositories / "side" / "model.safetensors")) == SIDE_BRANCH_KEYS
    config = json.loads((repositories / "side" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(repositories / "llava")
    assert json.loads((repositories / "whole" / "config.json").read_text())["base_model_name_or_path"] is None


def test_one_predicate_counts_the_side_branch(repositories):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "whole")
    model.freeze_base()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name in model.state_dict() if is_side_branch(name)} == SIDE_BRANCH_KEYS


def test_fields_given_to_from_pretrained_change_the_plan(repositories):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "whole", split_layer=2, fusion_layers=[4])
    assert model.config.layer_plan().modes == ("joint", "joint", "text", "text", "context", "text")


def test_a_truncated_side_branch_is_refused(repositories, tmp_path):
    repository = copy(repositories / "side", tmp_path / "broken")
    weights = (repository / "model.safetensors").read_bytes()
    (repository / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is damaged .* download it or save it again"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repository)


def test_a_pickled_side_branch_is_not_read(repositories, tmp_path):
    repository = copy(repositories / "side", tmp_path / "pickled")
    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repository)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_side_branch_that_does_not_fit_is_refused_before_anything_is_changed(repositories, change):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "whole")
    weights = {name: weight + 1 for name, weight in load_file(repositories / "side" / "model.safetensors").items()}
    name = "model.side_branch.0.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["model.side_branch.1.mlp.up_proj.weight"] = weights[name]
    else:
        weights[name] = weights[name][:, :8]
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not fit .* such as 'model\.side_branch\.[01]\.mlp\.up_proj\.weight'"):
        model.load_side_branch(weights)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_a_base_that_holds_only_a_side_branch_is_refused(repositories, tmp_path):
    repository = copy(repositories / "side", tmp_path / "nested", base_model_name_or_path=str(repositories / "side"))
    with pytest.raises(ValueError, match=r"is not a full LLaVA: it lacks \d+ of the weights"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repository)


def test_a_whole_repository_that_claims_a_base_is_refused(repositories, tmp_path):
    repository = copy(repositories / "whole", tmp_path / "both", base_model_name_or_path=str(repositories / "llava"))
    with pytest.raises(ValueError, match="names a base, so its weights should be the side branch alone"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repository)


def test_another_number_of_side_layers_than_the_repository_holds_is_refused(repositories):
    with pytest.raises(ValueError, match="weights of 2 side layers"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "whole", num_side_layers=2)


@pytest.mark.parametrize("kind", ["llava", "whole", "side"])
def test_a_new_side_branch_on_a_repositorys_base_is_the_one_that_its_llava_gets(repositories, kind):
    fields = {"num_side_layers": 2, "split_layer": 1, "side_branch_init": "identity"}
    got = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / kind, new_side_branch=True, **fields)
    llava = make_llava(depth=6, dtype=torch.float32)
    want = DpvrLlavaForConditionalGeneration.from_llava(llava, **fields).state_dict()
    assert got.state_dict().keys() == want.keys()
    assert all(torch.equal(weight, want[name]) for name, weight in got.state_dict().items())


@pytest.mark.parametrize("kind", ["llava", "whole"])
def test_the_side_branch_alone_is_never_saved_over_the_base_it_needs(repositories, tmp_path, kind):
    repository = copy(repositories / kind, tmp_path / kind)
    before = (repository / "model.safetensors").read_bytes()
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repository, split_layer=3)
    with pytest.raises(ValueError, match="is the folder of the base.* save to a new folder"):
        model.save_pretrained(repository, side_branch_only=True)
    assert (repository / "model.safetensors").read_bytes() == before


def test_a_model_that_does_not_know_its_base_cannot_save_the_side_branch_alone(tmp_path):
    model = DpvrLlavaForConditionalGeneration.from_llava(make_llava(), split_layer=2)
    with pytest.raises(ValueError, match="set config.base_model_name_or_path to a Hub id or a path"):
        model.save_pretrained(tmp_path / "side", side_branch_only=True)
    assert not (tmp_path / "side").exists()


@pytest.mark.parametrize("side_branch_only", [False, True])
def test_saving_changes_nothing_in_the_model_that_another_thread_may_use(
    repositories, tmp_path, monkeypatch, side_branch_only
):
    model = DpvrLlavaForConditionalGeneration.from_pretrained(repositories / "side")
    before, config, seen = dict(vars(model)), model.config.to_dict(), []
    save = transformers.PreTrainedModel.save_pretrained

    def watch(*args, **kwargs):
        save(*args, **kwargs)
        seen.append(dict(vars(model)))

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", watch)
    model.save_pretrained(tmp_path, side_branch_only=side_branch_only)
    for now in (*seen, vars(model)):
        assert now.keys() == before.keys() and all(now[name] is before[name] for name in before)
    assert len(seen) == 1 and model.config.to_dict() == config
    saved = json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"]
    assert saved == (str(repositories / "llava") if side_branch_only else None)


def test_half_precision_and_tied_embeddings_survive_a_round_trip(tmp_path):
    llava = make_llava(dtype=torch.bfloat16, tie_word_embeddings=True)
    llava.config.tie_word_embeddings = True
    llava.tie_weights()
    model = DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2)
    model.save_pretrained(tmp_path)
    loaded = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_a_damaged_whole_repository_does_not_load(repositories, tmp_path):
    repository = copy(repositories / "whole", tmp_path / "holes")
    weights = load_file(repository / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, repository / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it lacks 1 of the weights, such as.*multi_modal_projector.linear_1"):
        DpvrLlavaForConditionalGeneration.from_pretrained(repository)


@pytest.fixture
def processor_folder(random_mini, tmp_path):
    """A repository with a processor, and code beside it that ends the process when it is imported."""
    folder = copy(Path(random_mini), tmp_path / "strange")
    (folder / "strange.py").write_text("raise SystemExit('code of a stranger ran')\n")
    return folder


def change_json(file, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None}))


def test_a_processor_is_loaded_without_running_the_code_beside_it(processor_folder):
    change_json(processor_folder / "config.json", auto_map={"AutoConfig": "strange.Config"})
    change_json(processor_folder / "processor_config.json", auto_map={"AutoProcessor": "strange.Processor"})
    change_json(processor_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]})
    processor = load_processor(str(processor_folder))
    assert type(processor) is transformers.LlavaProcessor
    assert processor.tokenizer("a")["input_ids"] and processor.image_processor is not None


def test_a_dpvr_repository_that_names_no_class_of_processor_has_llavas(processor_folder):
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        change_json(processor_folder / name, processor_class=None)
    assert type(load_processor(str(processor_folder))) is transformers.LlavaProcessor


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "latent", "latent_rank": 6, "latent_split_layer": 1},
        {"routing": "latent", "latent_rank": 8, "latent_split_layer": 0, "latent_stride": 2},
        {"routing": "latent", "latent_rank": 8, "latent_split_layer": 1, "latent_side_layers": 1},
        {"routing": "late_fusion", "latent_rank": None, "num_side_layers": 2},
        {"routing": "late_fusion", "latent_rank": 6, "latent_split_layer": 1},
    ],
    ids=["rank", "split", "side layers", "none", "beside"],
)
def test_a_side_branch_is_loaded_on_a_base_that_has_another_latent(random_mini, fields, tmp_path):
    latent = {"routing": "latent", "latent_rank": 8, "latent_split_layer": 1}
    base = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini, **latent)
    base.save_pretrained(tmp_path / "base")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "base", new_side_branch=True, **fields)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_side_branch(name):
                weight.normal_()
    model.save_pretrained(tmp_path / "side", side_branch_only=True)
    again = [DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "side")]
    again.append(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "side", trust_remote_code=True))
    for one in again:
        state = one.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
        assert str(one.model.plan) == str(model.model.plan) and one.config.plan_fields == model.config.plan_fields


@pytest.mark.parametrize("whole", [True, False])
def test_fields_of_another_latent_give_a_new_one_and_the_same_base(random_mini, tmp_path, whole):
    """A rank, split or reading layers of another latent: its weights do not fit, so it is to be fitted anew."""
    fields = {"routing": "latent", "latent_rank": 8, "latent_split_layer": 1}
    model = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini, **fields)
    with torch.no_grad():
        model.side_branch.latent.reduce.weight.normal_()
    model.save_pretrained(tmp_path, side_branch_only=not whole)
    same = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, latent_stride=2)
    assert torch.equal(same.side_branch.latent.reduce.weight, model.side_branch.latent.reduce.weight)
    others = [{"latent_rank": 6}, {"latent_split_layer": 0}, {"latent_side_layers": 1}, {"latent_layers": [2]}]
    for other in others:
        new = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, **other)
        assert str(new.model.plan) == str(new.config.layer_plan("latent")) and new.config.routing == "latent"
        assert all(getattr(new.config, name) == value for name, value in other.items())
        assert not new.side_branch.latent.reduce.weight.any()
        base = {name: weight for name, weight in new.state_dict().items() if ".latent." not in name}
        assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items() if name in base)
    without = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, latent_rank=None, routing="late_fusion")
    assert not without.side_branch.has_latent and without.config.latent_rank is None
    without.save_pretrained(tmp_path / "without")
    assert not any(".latent." in name for name in load_file(tmp_path / "without" / "model.safetensors"))
    with pytest.raises(ValueError, match="latent_split_layer|latent's split is 9"):
        DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path, latent_split_layer=9)
