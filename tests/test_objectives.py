"""What a plan is trained for beside replies: the base's keys and values, and its answers, without labels."""

import json

import pytest
import torch
from families import FAMILIES, PRESENT, make_prompts
from family_checks import plans, text_of, with_adapter
from family_processors import KINDS, can_be_made, save_family
from lines import NEEDS_TRAINING
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train_sft
from decoders_dpvr import decoder_of
from dpvr.data.prompts import TEACHER
from dpvr.models import as_base, plan_of
from dpvr.training.collators import ReplyCollator
from dpvr.training.latent_fit import Target, collect, fit_latent
from dpvr.training.objectives import base_and_plan_logits, distil_loss, head_of, match_loss
from processors_dpvr import load_processor

LAYOUT = [[3, 4], [2, 3, 4], [5]]  # one image, two images, none
READING = {"late_fusion", "kv_substitution", "persistent_context", "latent"}
SHORT = ["--num_rows", "16", "--per_device_train_batch_size", "4", "--eval_questions", "2", "--logging_steps", "1"]
LATENT = ["--routing", "latent", "--latent_rank", "8", "--latent_split_layer", "1", "--fit_rows", "8"]


def cases() -> list:
    return [(name, fields) for name in PRESENT for fields in plans(name) if fields["routing"] in READING]


def with_teacher(name: str, model: nn.Module, inputs: dict) -> dict:
    """The inputs, with other pictures of the same sizes for the base."""
    other, _ = make_prompts(name, head_of(model), LAYOUT, seed=1)
    pixels = {key: -value for key, value in other.items() if key.startswith("pixel_values")}
    return {**inputs, **{TEACHER + key: value for key, value in pixels.items()}}


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields"), cases(), ids=lambda value: str(value)[:60])
def test_base_and_plan_run_side_by_side_as_each_by_itself(name, fields):
    model = with_adapter(name, **fields)
    inputs, _ = make_prompts(name, head_of(model), LAYOUT)
    texts = text_of(head_of(model), inputs)
    for given in (inputs, with_teacher(name, model, inputs)):
        shown = {**inputs, **{key.removeprefix(TEACHER): given[key] for key in given if key.startswith(TEACHER)}}
        with as_base(model):
            want_base = model(**shown).logits
        want_plan = model(**inputs).logits
        base, plan = base_and_plan_logits(model, given)
        assert (base - want_base)[texts].abs().max() < 1e-9 and (plan - want_plan)[texts].abs().max() < 1e-9


def test_layers_below_the_split_and_the_tower_run_once_and_those_past_it_for_each():
    model = with_adapter("llava", routing="late_fusion", split_layer=3)
    owner, calls = head_of(model).model, []
    for index, layer in enumerate(decoder_of(owner)[1].layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    owner.vision_tower.register_forward_pre_hook(lambda *_: calls.append("tower"))
    inputs, _ = make_prompts("llava", head_of(model), LAYOUT)
    base_and_plan_logits(model, inputs)
    assert calls == ["tower", 0, 1, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("routing", sorted(READING))
def test_the_loss_is_the_divergence_at_text_tokens_and_trains_what_the_plan_reads(routing):
    fields = {"latent_rank": 8, "latent_side_layers": 1} if routing == "latent" else {}
    model = with_adapter("llava", routing=routing, split_layer=2, **fields)
    inputs, _ = make_prompts("llava", head_of(model), LAYOUT)
    texts = text_of(head_of(model), inputs)
    with torch.no_grad(), as_base(model):
        base = model(**inputs).logits[texts].softmax(-1)
    plan = model(**inputs).logits[texts].softmax(-1)
    want = (base * (base / plan).log()).sum(-1).mean()
    loss = distil_loss(model, {**inputs, "labels": inputs["input_ids"]})
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and loss > 1e-4
    grads = [torch.autograd.grad(each, trained(model), allow_unused=True) for each in (loss, want)]
    pairs = [(a, b) for a, b in zip(*grads, strict=True) if b is not None]
    assert pairs and all((a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-12 for a, b in pairs)


def trained(model: nn.Module) -> list[nn.Parameter]:
    found = [weight for weight in model.parameters() if weight.requires_grad]
    assert found and all("side_branch" in name for name, weight in model.named_parameters() if weight.requires_grad)
    return found


@torch.no_grad()
@pytest.mark.parametrize("routing", ["late_fusion", "kv_substitution", "latent"])
def test_the_distance_to_match_is_that_of_keys_and_values_of_hooked_layers(routing):
    fields = {"latent_rank": 8} if routing == "latent" else {}
    model = with_adapter("qwen2_vl", routing=routing, split_layer=2, **fields)
    inputs, _ = make_prompts("qwen2_vl", head_of(model), LAYOUT)
    owner, taken = head_of(model).model, {}
    layers = decoder_of(owner)[1].layers
    readers = [index for index, mode in enumerate(plan_of(model).modes) if mode == "context"]
    hooks = [
        getattr(layers[index].self_attn, name).register_forward_hook(
            lambda module, args, out, key=(index, name): taken.__setitem__(key, out)
        )
        for index in readers
        for name in ("k_proj", "v_proj")
    ]
    with as_base(model):
        states = model(**inputs, output_hidden_states=True).hidden_states[2]
    for hook in hooks:
        hook.remove()
    image = torch.isin(inputs["input_ids"], torch.tensor([60, 61]))
    branch, losses = owner.branch, []
    if routing == "latent":
        z = states[image]
        z = z / z.pow(2).mean(-1, keepdim=True).sqrt()
        made = {}
        for index in readers:
            made[index, "k_proj"] = branch.latent.keys[str(index)](branch.latent.reduce(z))
            made[index, "v_proj"] = branch.latent.values[str(index)](branch.latent.reduce(z))
    else:
        read, _ = Target.of(model).run(inputs)
        made = {
            (index, name): getattr(layers[index].self_attn, name)(layers[index].input_layernorm(read))
            for index in readers
            for name in ("k_proj", "v_proj")
        }
    deviations = {}
    for (index, name), value in made.items():
        wanted = taken[index, name][image]
        deviation = 1.5 + index
        deviations[index, "keys" if name == "k_proj" else "values"] = deviation
        losses.append((value - wanted).pow(2).sum(-1).mean() / deviation**2)
    assert match_loss(model, inputs, deviations).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_a_batch_without_pictures_costs_nothing_and_has_a_gradient():
    model = with_adapter("llava", routing="late_fusion", split_layer=2)
    ids = torch.tensor([[5, 6, 7]])
    for loss in (distil_loss(model, {"input_ids": ids}), match_loss(model, {"input_ids": ids}, {})):
        loss.backward()
        assert loss.item() == 0 and all(weight.grad is not None for weight in trained(model))


def test_a_teacher_with_other_tokens_is_refused():
    model = with_adapter("llava", routing="late_fusion", split_layer=2)
    inputs, _ = make_prompts("llava", head_of(model), LAYOUT)
    with pytest.raises(ValueError, match="give pairs of pictures of the same size"):
        distil_loss(model, {**inputs, f"{TEACHER}input_ids": inputs["input_ids"][:, 1:]})


@torch.no_grad()
def test_a_latent_fitted_to_a_teacher_reads_its_pictures_out_of_others():
    model = with_adapter("llava", routing="latent", latent_split_layer=0, latent_rank=32, split_layer=1)
    own, pairs = [], []
    for seed in range(40):
        inputs, _ = make_prompts("llava", head_of(model), [[2, 3]] * 4, seed=seed)
        own.append({**inputs, "pixel_values": -inputs["pixel_values"]})
        pairs.append({**own[-1], f"{TEACHER}pixel_values": inputs["pixel_values"]})
    held_out = collect(Target.of(model), pairs[30:])
    explained = [
        sum((found := fit_latent(model, batches[:30]).explained(held_out, 32)).values()) / len(found)
        for batches in (own, pairs)
    ]
    assert explained[0] < 0 and explained[1] > 0.1


# -- through train_sft.py ---------------------------------------------------------------------------------------------


def run(base: str, output_dir, *arguments: str) -> dict:
    arguments = ["--model_name_or_path", base, "--output_dir", str(output_dir), *SHORT, *arguments]
    return train_sft.main(*train_sft.parse_args(arguments))


def losses(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


@NEEDS_TRAINING
def test_the_main_job_adapts_a_latent_and_ends_with_one_table_and_a_sentence(random_mini, tmp_path, capsys):
    record = run(random_mini, tmp_path / "out", *LATENT, "--compare", "late_fusion", "lora", "--lora_r", "2")
    names = ["vanilla", "trained latent", "trained late fusion", "trained lora"]
    assert [row["name"] for row in record["table"]] == names and record["objective"] == "distil"
    asked = [(row["name"], row["pictures"]) for row in record["accuracy"]]
    both = ("swapped", "ordinary")
    wanted = [("vanilla", kind) for kind in both] + [("fitted latent", "swapped")]
    assert asked == wanted + [(name, kind) for name in names[1:] for kind in both]
    vanilla, latent, late, lora = record["table"]
    assert vanilla["prefill_flops"] == lora["prefill_flops"] == 1 and late["prefill_flops"] < 1
    assert latent["prefill_flops"] < 1 and latent["trained_parameters"] == record["trainable_parameters"]
    assert late["objective"] == "distil" and lora["objective"] == "sft" and lora["trained_parameters"] > 0
    saved = [row["saved_activation_bytes"] for row in (latent, late, lora)]
    assert vanilla["saved_activation_bytes"] is None and 0 < min(saved) and saved[1] < saved[2]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "Without it the base is as it was." in printed
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["table"] == record["table"]
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "out", tmp_path / "out"))
    assert {name for name in before if ".latent." in name} and after.keys() == before.keys()


@NEEDS_TRAINING
@pytest.mark.parametrize("objective", ["match", "distil", "sft"])
@pytest.mark.parametrize("plan", [LATENT + ["--latent_side_layers", "1"], ["--routing", "kv_substitution"]])
def test_a_killed_run_of_any_objective_goes_on_to_the_same_weights(random_mini, tmp_path, objective, plan):
    steps = [*plan, "--objective", objective, "--eval_questions", "0", "--seed", "3", "--max_grad_norm", "100"]
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    whole = run(random_mini, tmp_path / "whole", *steps, *saving)
    assert whole["accuracy"] == [] and whole["objective"] == objective
    copy = tmp_path / "killed"
    copy.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(copy / "checkpoint-2")
    resumed = run(random_mini, copy, *steps, *saving, "--resume_from_checkpoint", "last")
    assert resumed["resumed_from"] == "checkpoint-2" and losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", copy)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@NEEDS_TRAINING
def test_a_checkpoint_of_another_objective_or_fit_is_not_gone_on_from(random_mini, tmp_path):
    steps = [*LATENT, "--eval_questions", "0", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    run(random_mini, tmp_path / "out", *steps)
    for words, said in (
        (["--objective", "sft"], "objective was 'distil' and is 'sft'"),
        (["--fit_rows", "4"], "fit_rows was 8 and is 4"),
    ):
        with pytest.raises(ValueError, match=said):
            run(random_mini, tmp_path / "out", *steps, *words, "--resume_from_checkpoint", "last")


@NEEDS_TRAINING
def test_an_objective_lowers_its_own_loss(random_mini, tmp_path):
    many = ["--num_rows", "48", "--num_train_epochs", "3", "--eval_questions", "0", "--learning_rate", "1e-2"]
    for number, objective in enumerate(("match", "distil")):
        plan = ["--routing", "kv_substitution", "--split_layer", "1", "--side_branch_init", "random"]
        found = losses(run(random_mini, tmp_path / str(number), *many, *plan, "--objective", objective))
        assert sum(found[-3:]) < 0.9 * sum(found[:3]), objective


@NEEDS_TRAINING
def test_the_first_stage_has_a_low_learning_rate(random_mini, tmp_path):
    stage = ["--first_stage_steps", "0.5", "--first_stage_learning_rate", "1e-5", "--lr_scheduler_type", "constant"]
    record = run(random_mini, tmp_path / "out", *stage, "--eval_questions", "0", "--learning_rate", "1e-3")
    rates = [entry["learning_rate"] for entry in record["log"] if "learning_rate" in entry]
    assert rates == pytest.approx([1e-5, 1e-5, 1e-3, 1e-3]) and len(rates) == 4


@NEEDS_TRAINING
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lora", "--objective", "distil"], "has the base as teacher, and --method lora changes"),
        (["--compare", "fastv"], "--compare takes late_fusion, .*, not 'fastv'"),
        (["--first_stage_steps", "3"], "--first_stage_steps is 3.*first_stage_learning_rate"),
        (["--objective", "match", "--fit_rows", "0"], "--fit_rows is 0"),
        (["--routing", "latent"], "latent_rank is None"),
    ],
)
def test_what_cannot_be_trained_for_is_refused_before_anything_is_read(random_mini, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        run(random_mini, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


# -- any family -------------------------------------------------------------------------------------------------------


TRAINABLE = [name for name in PRESENT if name in KINDS and can_be_made(name)]


@NEEDS_TRAINING
@pytest.mark.parametrize("name", [name for name in TRAINABLE if name != "paligemma"])
def test_a_side_branch_of_any_family_is_trained_on_minibench_and_resumed(name, tmp_path):
    save_family(name, tmp_path / "base")
    plan = ["--routing", "kv_substitution", "--split_layer", str(FAMILIES[name].split), "--data", "minibench"]
    steps = ["--save_strategy", "steps", "--save_steps", "4", "--num_train_epochs", "3", "--eval_questions", "0"]
    flags = [*plan, *steps, "--learning_rate", "3e-2", "--lr_scheduler_type", "constant"]
    whole = run(str(tmp_path / "base"), tmp_path / "whole", *flags)
    found = losses(whole)
    assert len(found) == 12 and sum(found[8:]) < sum(found[:4])  # of the same rows
    saved = "model.safetensors" if name == "llava" else "adapter_model.safetensors"
    weights = load_file(tmp_path / "whole" / saved)
    assert weights and all("side_branch" in key for key in weights)
    copy = tmp_path / "killed"
    copy.mkdir()
    (tmp_path / "whole" / "checkpoint-8").rename(copy / "checkpoint-8")
    resumed = run(str(tmp_path / "base"), copy, *flags, "--resume_from_checkpoint", "last")
    assert losses(resumed) == pytest.approx(found, rel=1e-5)
    again = load_file(copy / saved)
    assert all(torch.equal(weight, again[key]) for key, weight in weights.items())


@NEEDS_TRAINING
def test_a_processor_that_writes_after_the_prompt_is_refused(tmp_path):
    """PaliGemma's ends every text with a line break, so an answered prompt is not the prompt that is asked."""
    save_family("paligemma", tmp_path / "base")
    with pytest.raises(ValueError, match="another prompt than it is asked"):
        run(
            str(tmp_path / "base"),
            tmp_path / "out",
            "--split_layer",
            "2",
            "--data",
            "minibench",
            "--eval_questions",
            "0",
        )


@NEEDS_TRAINING
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("objective", ["match", "distil"])
def test_a_latent_of_another_family_is_fitted_and_trained_without_labels(name, objective, tmp_path):
    save_family(name, tmp_path / "base")
    plan = [*LATENT, "--latent_side_layers", "1", "--objective", objective]
    record = run(str(tmp_path / "base"), tmp_path / "out", *plan, "--compare", "kv_substitution", "--split_layer", "2")
    assert [row["name"] for row in record["table"]] == ["vanilla", "trained latent", "trained kv substitution"]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert weights and all(".latent." in key for key in weights)


@NEEDS_TRAINING
def test_the_reply_is_found_behind_pictures_that_grow_by_any_number_of_characters(tmp_path):
    """SmolVLM's processor writes rows, columns and marks for a picture; pictures may stand between replies."""
    save_family("smolvlm", tmp_path / "base")
    processor = load_processor(str(tmp_path / "base"))
    sizes, turns = [(24, 24), (64, 16), (16, 70)], []
    for number in range(3):
        picture = [{"type": "image"}] * (number + 1 if number < 2 else 0)
        turns.append({"role": "user", "content": [*picture, {"type": "text", "text": f"What is {number}?"}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": f"red {number}"}]})
    row = {"images": [Image.new("RGB", size) for size in sizes], "messages": turns}
    batch = ReplyCollator(processor, None, True)([row, {"images": [], "messages": turns[4:]}])
    for labels, replies in zip(batch["labels"], (["red 0", "red 1", "red 2"], ["red 2"]), strict=True):
        text = processor.decode(labels[labels != -100])
        end = processor.tokenizer.eos_token
        assert [part.strip() for part in text.split(end)] == [*replies, ""]
