"""train_sft.py: what it trains, what it leaves alone, what it saves, and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from lines import NEEDS_TRAINING
from peft import PeftModel
from safetensors.torch import load_file
from test_loading import SIDE_BRANCH_KEYS
from transformers import AutoModelForImageTextToText, LlavaProcessor
from trl import SFTTrainer

import adapter_dpvr  # noqa: F401  makes the method known to PEFT
import train_sft
from dpvr.data.templates import with_ended_replies
from dpvr.training import arguments, options, output_folder, trainers
from dpvr.training.models import load_model
from dpvr.training.run import load_rows
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor

SHORT = ["--data", "minibench", "--num_rows", "16", "--per_device_train_batch_size", "4", "--eval_questions", "2"]
SHORT += ["--logging_steps", "1"]


def run(base: str, output_dir, *arguments: str) -> dict:
    arguments = ["--model_name_or_path", base, "--output_dir", str(output_dir), *SHORT, *arguments]
    return train_sft.main(*train_sft.parse_args(arguments))


def make_trainer(*arguments: str) -> SFTTrainer:
    args, training, base = train_sft.parse_args(list(arguments))
    transformers.set_seed(training.seed)
    processor = with_ended_replies(load_processor(base.model_name_or_path))
    rows = load_rows(args, training.seed).rows
    return trainers.make_trainer(load_model(args, base), processor, rows, args, training, base)


@NEEDS_TRAINING
@pytest.mark.parametrize("whole_rows", [False, True], ids=["replies", "whole rows"])
@pytest.mark.parametrize("method", ["dpvr", "lora", "full"])
def test_no_image_token_is_a_label_and_under_a_plan_none_right_after_one(random_mini, method, whole_rows):
    """And the trainer's loss, which it projects by itself, is the mean over the labels that are left."""
    flags = ["--assistant_only_loss", "false"] if whole_rows else []
    trainer = make_trainer("--model_name_or_path", random_mini, *SHORT, "--method", method, *flags)
    batch = next(iter(trainer.get_train_dataloader()))
    marks = batch["input_ids"] == trainer.model.config.image_token_id
    after = torch.nn.functional.pad(marks[:, :-1], (1, 0)) & ~marks
    assert marks.any() and (batch["labels"][marks] == -100).all()
    learnt_after = bool((batch["labels"][after] != -100).any())
    assert learnt_after == (whole_rows and method != "dpvr")
    model, left = trainer.model.eval(), batch["labels"][:, 1:] != -100
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=left.sum())
        logits = model(**inputs).logits[:, :-1][left]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][left]).item())


def losses(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


@NEEDS_TRAINING
def test_a_run_saves_exactly_the_side_branch_and_leaves_the_base_bit_identical(random_mini, tmp_path):
    before = load_file(f"{random_mini}/model.safetensors")
    record = run(random_mini, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == SIDE_BRANCH_KEYS
    after = load_file(f"{random_mini}/model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
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
def test_a_branch_of_more_layers_than_the_repositorys_own_is_trained(random_mini, tmp_path):
    record = run(random_mini, tmp_path / "out", "--num_side_layers", "2", "--side_branch_init", "identity")
    trained = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (trained.config.num_side_layers, trained.config.side_branch_init) == (2, "identity")
    assert record["trainable_parameters"] == sum(p.numel() for p in trained.side_branch.parameters())
    assert all(layer.mlp.down_proj.weight.any() for layer in trained.side_branch)  # they began as zeros


@NEEDS_TRAINING
@pytest.mark.parametrize("routing", ["late_fusion", "kv_substitution"])
def test_the_trainer_optimises_the_loss_of_the_routed_model(random_mini, tmp_path, routing):
    paths = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path)]
    trainer = make_trainer(*paths, "--routing", routing, *SHORT, "--max_steps", "1")
    model = trainer.model
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # as they start, a random model's layers hardly move its loss
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    model.load_state_dict(start)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = model(**batch).loss.item()
        model.set_routing("none")
        vanilla = model(**batch).loss.item()
    assert logged == pytest.approx(loss, abs=1e-5)
    assert abs(vanilla - loss) > 1e-3


@NEEDS_TRAINING
def test_the_loss_is_on_the_replies_and_their_end_tokens_only(random_mini, tmp_path):
    trainer = make_trainer("--model_name_or_path", random_mini, "--output_dir", str(tmp_path), *SHORT)
    processor = trainer.processing_class
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
    with pytest.raises(ValueError, match="no layer reads the side branch, .* nothing to train: use late_fusion"):
        run(random_mini, tmp_path / "out", "--routing", "text_only")
    assert not (tmp_path / "out").exists()


def test_an_older_transformers_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match="needs transformers 5.18 or newer.*this is 4.57.6: pip install"):
        train_sft.parse_args([])


@NEEDS_TRAINING
def test_the_bases_own_folder_is_refused_as_output_before_any_training(random_mini):
    with pytest.raises(ValueError, match="is the folder of the base, .*: save to a new folder"):
        run(random_mini, random_mini)


# -- baselines --------------------------------------------------------------------------------------------------------


@NEEDS_TRAINING
def test_all_methods_see_the_same_rows_in_the_same_order(random_mini, tmp_path):
    batches = {}
    for method in ("dpvr", "lora", "full"):
        paths = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path / method)]
        trainer = make_trainer(*paths, *SHORT, "--method", method)
        batches[method] = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
        assert len(batches[method]) == 4
    for method in ("lora", "full"):
        assert all(map(torch.equal, batches["dpvr"], batches[method]))


@NEEDS_TRAINING
def test_lora_and_full_fine_tuning_train_the_vanilla_model_and_save_what_they_trained(random_mini, tmp_path):
    lora = run(random_mini, tmp_path / "lora", "--method", "lora", "--lora_r", "2", "--max_steps", "2")
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(names) == 4 * len(linears) * 2 and all("language_model" in name and "lora_" in name for name in names)
    assert [row["name"] for row in lora["accuracy"]] == ["vanilla", "lora"]
    assert {row["routing"] for row in lora["accuracy"]} == {"none"} and lora["lora"]["r"] == 2

    full = run(random_mini, tmp_path / "full", "--method", "full", "--max_steps", "2", "--learning_rate", "1e-3")
    assert full["trainable_parameters"] > lora["trainable_parameters"]
    before = DpvrLlavaForConditionalGeneration.from_pretrained(random_mini).state_dict()
    after = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "full").state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("model.")} == {
        "language_model",
        "multi_modal_projector",
    }
    assert "lm_head.weight" in moved


@NEEDS_TRAINING
def test_a_plan_for_a_baseline_is_refused(random_mini, tmp_path):
    with pytest.raises(ValueError, match="--method lora trains the vanilla model, which has no .*: leave"):
        run(random_mini, tmp_path / "out", "--method", "lora", "--split_layer", "1")
    assert not (tmp_path / "out").exists()


# -- stopped and saved ------------------------------------------------------------------------------------------------


@NEEDS_TRAINING
def test_a_killed_run_goes_on_along_the_same_curve_to_the_same_weights(random_mini, tmp_path):
    steps = ["--eval_questions", "0", "--save_strategy", "steps", "--save_steps", "2", "--seed", "3"]
    steps += ["--side_branch_init", "random", "--num_rows", "32"]
    whole = run(random_mini, tmp_path / "whole", *steps)
    paths = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, train_sft.__file__, *paths, *SHORT, *steps], env=environment, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "checkpoint-2" / "checkpoint.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "killed" / "checkpoint-90").mkdir()  # torn: a run that is killed while it writes one leaves such
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert set(load_file(tmp_path / "killed" / "checkpoint-2" / "model.safetensors")) == SIDE_BRANCH_KEYS
    resumed = run(random_mini, tmp_path / "killed", *steps, "--resume_from_checkpoint", "last")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in SIDE_BRANCH_KEYS)


@NEEDS_TRAINING
def test_resuming_without_a_checkpoint_or_under_another_plan_is_refused(random_mini, tmp_path):
    for name in ("last", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="There is no whole checkpoint in .*--save_strategy steps"):
            run(random_mini, tmp_path / "out", "--resume_from_checkpoint", name)
    short = ["--eval_questions", "0", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    run(random_mini, tmp_path / "out", *short)
    with pytest.raises(ValueError, match="The checkpoint has the layer plan .* and this run .*: resume with"):
        run(random_mini, tmp_path / "out", *short, "--split_layer", "1", "--resume_from_checkpoint", "last")


@NEEDS_TRAINING
def test_a_failure_while_saving_leaves_the_previous_adapter_whole(random_mini, tmp_path, monkeypatch):
    short, out = ["--eval_questions", "0", "--max_steps", "3"], tmp_path / "out"
    run(random_mini, out, *short)
    short.append("--overwrite_output_dir")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "save_adapter", fail)
        with pytest.raises(OSError, match="saving could not be written .no space.*nothing half written was left"):
            run(random_mini, out, *short, "--seed", "5")
    assert not (out / ".saving").exists()
    assert all(path.read_bytes() == content for path, content in before.items())
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(output_folder.os, "replace", lambda a, b: fail() if Path(b).parent == out else replace(a, b))
        with pytest.raises(OSError, match="could not be moved .*no space.*The whole save is in .*saving"):
            run(random_mini, out, *short, "--seed", "5", "--split_layer", "1")
    assert not (out / "model.safetensors").exists()  # nothing loads half old, half new
    assert (out / ".saving" / "model.safetensors").exists()
    run(random_mini, out, *short, "--seed", "5")
    assert not (out / ".saving").exists()
    assert (out / "model.safetensors").read_bytes() != before[out / "model.safetensors"]


@NEEDS_TRAINING
def test_what_another_method_saved_before_is_gone(random_mini, tmp_path):
    short = ["--eval_questions", "0", "--max_steps", "1"]
    run(random_mini, tmp_path / "out", *short)
    run(random_mini, tmp_path / "out", *short, "--method", "lora", "--lora_r", "2", "--overwrite_output_dir")
    weights = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"} and not list((tmp_path / "out" / "adapter").iterdir())


@NEEDS_TRAINING
def test_half_precision_is_refused_where_it_does_not_train(random_mini, tmp_path):
    with pytest.raises(ValueError, match="--method full needs --dtype float32, as small steps are lost in "):
        run(random_mini, tmp_path / "out", "--method", "full", "--dtype", "bfloat16")


@NEEDS_TRAINING
def test_the_adapter_beside_it_gives_the_same_logits_on_the_base(random_mini, tmp_path):
    run(random_mini, tmp_path / "out", "--eval_questions", "0", "--max_steps", "2")
    trained = DpvrLlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    adapted = PeftModel.from_pretrained(
        DpvrLlavaForConditionalGeneration.from_pretrained(random_mini), tmp_path / "out", subfolder="adapter"
    )
    ids = torch.tensor([[1, *[trained.config.image_token_id] * 64, 30, 31, 32]])
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 96, 96)}
    with torch.no_grad():
        assert torch.equal(trained(**inputs).logits, adapted(**inputs).logits)


@NEEDS_TRAINING
def test_on_a_base_in_bfloat16_the_branch_is_trained_in_float32(random_mini, tmp_path):
    args, _, base = train_sft.parse_args(
        ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path), "--dtype", "bfloat16"]
    )
    model = load_model(args, base)
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name in SIDE_BRANCH_KEYS} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in SIDE_BRANCH_KEYS} == {torch.bfloat16}


@NEEDS_TRAINING
@pytest.mark.parametrize(
    "path", sorted((Path(train_sft.__file__).parent / "configs").glob("llava_*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_in_configs_is_read(path):
    args, training, base = train_sft.parse_args(
        ["--config", str(path), "--use_cpu", "true"]
    )  # bf16 asks for a GPU otherwise
    size, late = ("13b" if "13b" in path.stem else "7b"), not path.stem.endswith(("_pc", "_kv"))
    assert base.model_name_or_path == f"llava-hf/llava-1.5-{size}-hf" and base.dtype == "bfloat16"
    assert args.split_layer == {"7b": 18, "13b": 28}[size] and training.learning_rate == (1e-4 if late else 5e-5)
    assert training.per_device_train_batch_size == 4 and training.num_train_epochs == 1 and training.bf16


@NEEDS_TRAINING
def test_a_misspelt_option_is_answered_in_one_line_on_the_command_line_and_in_a_config(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("warmup_step: 3\n")
    for words, said in (
        (["--lora_dropouts", "0"], "train_sft.py: there is no option --lora_dropouts; did you mean --lora_dropout?\n"),
        (
            ["--config", str(tmp_path / "recipe.yaml")],
            "there is no option --warmup_step; did you mean --warmup_steps?\n",
        ),
        (["fast"], "unexpected argument 'fast'"),
        (["--config"], "--config needs the name of a YAML file"),
        (["--split", "4"], "there is no option --split"),
    ):
        with pytest.raises(SystemExit) as end:
            train_sft.parse_args(words)
        shown = capsys.readouterr().err
        assert end.value.code == 2 and said in shown and shown.count("\n") == 1


def test_what_the_help_names_are_options_of_the_trainer_and_our_defaults_are_the_run_s():
    def defaults(of: type) -> dict:
        return {field.name: field.default for field in dataclasses.fields(of)}

    base, recipe = defaults(arguments.BaseArguments), defaults(arguments.SideBranchSFTConfig)
    assert defaults(options.BaseOptions).items() < base.items()
    assert defaults(options.RecipeOptions).items() < recipe.items()
    named = {name for group in options.TRAINER_OPTIONS.values() for name in group}
    theirs = (base | recipe).keys() - defaults(options.BaseOptions).keys() - defaults(options.RecipeOptions).keys()
    assert named < theirs
