"""train_sft.py: what it trains, what it leaves alone, what it saves, and what it refuses."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from test_loading import SIDE_BRANCH_KEYS
from transformers import AutoModelForImageTextToText, LlavaProcessor

import train_sft
from modeling_dpvr import DpvrLlavaForConditionalGeneration

NEEDS_TRAINING = pytest.mark.skipif(
    Version(transformers.__version__) < Version(train_sft.OLDEST_TRANSFORMERS),
    reason="training is for transformers 5.18 and newer",
)
SHORT = ["--num_rows", "16", "--per_device_train_batch_size", "4", "--eval_questions", "2", "--logging_steps", "1"]


def run(base: str, output_dir, *arguments: str) -> dict:
    arguments = ["--model_name_or_path", base, "--output_dir", str(output_dir), *SHORT, *arguments]
    return train_sft.main(*train_sft.parse_args(arguments))


@NEEDS_TRAINING
def test_a_run_saves_exactly_the_side_branch_and_leaves_the_base_bit_identical(random_mini, tmp_path):
    before = load_file(f"{random_mini}/model.safetensors")
    record = run(random_mini, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == SIDE_BRANCH_KEYS
    assert load_file(f"{random_mini}/model.safetensors").keys() == before.keys()
    whole = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini)
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    moved = set()
    for name, weight in trained.state_dict().items():
        if not torch.equal(weight, whole.state_dict()[name]):
            moved.add(name)
    assert moved == SIDE_BRANCH_KEYS
    assert [row["name"] for row in record["accuracy"]] == ["vanilla", "untrained branch", "trained branch"]
    assert [row["routing"] for row in record["accuracy"]] == ["none", "late_fusion", "late_fusion"]
    assert record["trainable_parameters"] == sum(p.numel() for p in whole.side_branch.parameters())
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["accuracy"] == record["accuracy"] and written["versions"]["torch"] == torch.__version__
    assert LlavaProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"


@NEEDS_TRAINING
@pytest.mark.parametrize("routing", ["late_fusion", "kv_substitution"])
def test_the_trainer_optimises_the_loss_of_the_routed_model(random_mini, tmp_path, routing):
    paths = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path)]
    args, training = train_sft.parse_args([*paths, "--routing", routing, *SHORT, "--max_steps", "1"])
    processor = LlavaProcessor.from_pretrained(random_mini)
    model = train_sft.load_model(args)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = train_sft.train(model, processor, args, training)
    logged = trainer.state.log_history[0]["loss"]
    model.load_state_dict(start)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = model(**batch).loss.item()
        model.set_routing("none")
        vanilla = model(**batch).loss.item()
    assert logged == pytest.approx(loss, abs=1e-4)
    assert abs(vanilla - loss) > 1e-3


@NEEDS_TRAINING
def test_the_loss_is_on_the_replies_and_their_end_tokens_only(random_mini, tmp_path):
    args, training = train_sft.parse_args(["--model_name_or_path", random_mini, "--output_dir", str(tmp_path), *SHORT])
    processor = LlavaProcessor.from_pretrained(random_mini)
    trainer = train_sft.train(train_sft.load_model(args), processor, args, training)
    batch, rows = next(iter(trainer.get_train_dataloader())), trainer.train_dataset
    replies = {
        tuple(turn["content"][0]["text"] for turn in row["messages"] if turn["role"] == "assistant") for row in rows
    }
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        kept = labels != -100
        assert torch.equal(ids[kept], labels[kept])
        texts = processor.decode(labels[kept]).split("</s>")
        assert texts[-1] == "" and tuple(text.strip() for text in texts[:-1]) in replies


@NEEDS_TRAINING
def test_one_seed_gives_one_result_and_two_seeds_differ(random_mini, tmp_path):
    losses = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(random_mini, tmp_path / name, "--seed", seed, "--eval_questions", "0")
        losses[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(weight, losses["b"][name]) for name, weight in losses["a"].items())
    assert not all(torch.equal(weight, losses["c"][name]) for name, weight in losses["a"].items())


@NEEDS_TRAINING
def test_a_plan_is_data_that_the_trained_repository_carries(random_mini, tmp_path):
    plan = ["--split_layer", "1", "--fusion_layers", "2"]
    run(random_mini, tmp_path, *plan, "--eval_questions", "0", "--max_steps", "1")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["split_layer"] == 1 and config["fusion_layers"] == [2]
    trained = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert trained.config.layer_plan().modes == ("joint", "text", "context", "text")


@NEEDS_TRAINING
def test_a_routing_with_nothing_to_train_is_refused(random_mini, tmp_path):
    with pytest.raises(ValueError, match="exactly zero gradient"):
        run(random_mini, tmp_path / "out", "--routing", "text_only")
    assert not (tmp_path / "out").exists()


def test_an_older_transformers_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(train_sft.transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match="Expected transformers 5.18 or newer.*got 4.57.6.*Remedy: pip install"):
        train_sft.parse_args([])


@NEEDS_TRAINING
def test_the_bases_own_folder_is_refused_as_output_before_any_training(random_mini):
    with pytest.raises(ValueError, match="Expected another folder than the base's"):
        run(random_mini, random_mini)
