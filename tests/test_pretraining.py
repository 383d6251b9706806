"""dpvr/pretraining: the training of the small LLaVA, resumed, logged and saved; its command, batches and optimizer."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from dpvr.pretraining import stages, tower
from dpvr.pretraining.collator import MAX_LENGTH, RowCollator
from dpvr.pretraining.model import make_model
from dpvr.pretraining.optimizer import Muon, MuonWithAdamW
from dpvr.pretraining.rows import PretrainingRows
from dpvr.pretraining.train import main, parse_args
from generation_dpvr import IGNORED_LABEL
from minibench.scenes import PLACES, Shape, make_scene
from minibench.tasks import TASKS


@pytest.fixture
def tiny_run(tmp_path, monkeypatch, minibench_processor):
    """Pretrains a tiny model in a folder and returns the log lines of the call."""
    monkeypatch.setattr(stages, "make_processor", lambda: minibench_processor)
    sizes = "--text_layers 2 --text_width 64 --vision_layers 2 --vision_width 32 --batch_size 2 --num_workers 0"
    data = "--tower_pictures 2 --texts 4 --aligned_pictures 2 --questions_per_row 2"
    data += " --further_pictures 2"
    steps = "--logging_steps 1 --save_steps 2 --validation_questions 2"

    def run(name: str, pictures: int) -> list[dict]:
        log = tmp_path / name / "log.jsonl"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        command = f"--output_dir {tmp_path / name} --pictures {pictures} {sizes} {data} {steps}"
        main(parse_args(command.split()))
        return [json.loads(line) for line in log.read_text().splitlines()[before:]]

    return run


# Batches


def test_patch_labels_name_the_object_that_lies_on_top_at_each_patch():
    patch, side = 12, 8
    scene_places = [PLACES[:3], PLACES[3:6], PLACES[6:]]
    for index in range(100):
        scene = make_scene("train", 0, index)
        labels = tower.patch_labels(scene, patch).view(side, side, len(tower.NAMES)).tolist()
        for row in range(side):
            for column in range(side):
                x, y = (position * patch + patch / 2 for position in (column, row))
                on_top = None
                for thing in scene.from_back_to_front:
                    if max(abs(thing.centre[0] - x), abs(thing.centre[1] - y)) <= thing.size / 2:
                        on_top = thing
                expected = ["none"] * 4
                if isinstance(on_top, Shape):
                    expected = [on_top.colour, on_top.shape, "none", on_top.place]
                elif on_top is not None:
                    expected = ["none", "none", str(on_top.digit), on_top.place]
                words = [names[label] for names, label in zip(tower.NAMES, labels[row][column], strict=True)]
                assert words[:4] == expected
                # The middle of a third of the picture lies in the second, the fifth or the seventh of eight patches.
                is_middle = row in (1, 4, 6) and column in (1, 4, 6)
                place = scene_places[(1, 4, 6).index(row)][(1, 4, 6).index(column)] if is_middle else None
                assert words[4] == ("thing" if place in scene.by_place else "none")


def test_the_labels_of_a_batch_are_the_replies_of_its_rows_and_their_end_tokens(minibench_processor):
    rows = list(PretrainingRows("train", 40, 4, caption_share=0.2, auxiliary_share=0.5, text_only_share=0.5))
    assert 10 < sum("loss_mask" in row for row in rows) < 30
    assert {len(row["images"]) for row in rows} == {0, 1, 2}
    collate = RowCollator(minibench_processor, max_length=2000)
    batch = collate(rows)
    assert len(batch["pixel_values"]) == sum(len(row["images"]) for row in rows)
    assert "pixel_values" not in collate([row for row in rows if not row["images"]])
    cut = RowCollator(minibench_processor)(rows)["labels"]
    assert cut.shape[1] == MAX_LENGTH < batch["labels"].shape[1]
    assert torch.equal(cut, batch["labels"][:, :MAX_LENGTH])
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        kept = labels != IGNORED_LABEL
        answers = [message["content"][0]["text"] for message in row["messages"][1::2]]
        if "loss_mask" in row:
            pairs = zip(answers, row["loss_mask"], strict=True)
            answers = [
                " ".join(word for word, in_loss in zip(text.split(), mask, strict=True) if in_loss)
                for text, mask in pairs
            ]
        assert minibench_processor.tokenizer.decode(labels[kept]) == "".join(f" {answer}</s>" for answer in answers)
        assert torch.equal(ids[kept], labels[kept])


# The command


def test_a_run_ends_with_where_the_model_is_and_a_table_of_its_last_validation(tiny_run, tmp_path, capsys):
    log = tiny_run("run", pictures=2)
    *_, saved = capsys.readouterr().out.partition("Written to")
    assert str(tmp_path / "run" / "final") in saved
    last = [entry for entry in log if "validation" in entry][-1]
    rows = [line.split() for line in saved.splitlines()[1:]]
    assert rows == [[task, f"{score:.1%}"] for task, score in {**last["validation"], "mean": last["mean"]}.items()]


# A run


def test_pretraining_goes_on_from_its_last_checkpoint_as_if_it_had_never_stopped(tiny_run, tmp_path):
    def losses(log: list[dict]) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in log if entry["stage"] == "llava" and "loss" in entry}

    straight = losses(tiny_run("run", pictures=12))
    shutil.rmtree(tmp_path / "run" / "llava" / "checkpoint-6")
    (tmp_path / "run" / "llava.safetensors").unlink()
    resumed = losses(tiny_run("run", pictures=12))
    assert list(straight) == [1, 2, 3, 4, 5, 6] and list(resumed) == [5, 6]
    assert resumed == pytest.approx({step: straight[step] for step in (5, 6)}, rel=1e-4)


def test_the_log_holds_the_command_losses_and_validation_scores(tiny_run):
    log = tiny_run("run", pictures=2)
    assert {"stage", "command", "hardware", "versions"} <= log[0].keys()
    assert {"stage", "step", "seconds", "loss", "learning_rate"} <= log[1].keys()
    validation, further = [entry for entry in log if "validation" in entry]
    assert (validation["stage"], further["stage"]) == ("llava", "further")
    assert set(validation["validation"]) == set(TASKS)
    assert validation["mean"] == pytest.approx(sum(validation["validation"].values()) / len(TASKS), abs=1e-3)


@pytest.mark.parametrize(
    ("stage", "before", "trained"),
    [
        ("language", "tower", {"language_model", "lm_head"}),
        ("projector", "language", {"multi_modal_projector"}),
        ("llava", "projector", {"multi_modal_projector", "language_model", "lm_head"}),
        ("further", "llava", {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_each_stage_trains_its_part_and_leaves_the_others(tiny_run, tmp_path, stage, before, trained):
    tiny_run("run", pictures=4)
    weights, earlier = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in (stage, before))
    changed = {name for name, weight in weights.items() if not torch.equal(weight, earlier[name])}
    assert {name.removeprefix("model.").split(".")[0] for name in changed} == trained


def test_a_stage_that_is_done_is_not_run_again(tiny_run, tmp_path):
    tiny_run("run", pictures=4)
    for stage in ("language", "llava"):
        (tmp_path / "run" / f"{stage}.safetensors").unlink()
        shutil.rmtree(tmp_path / "run" / stage)
    assert {entry["stage"] for entry in tiny_run("run", pictures=4)} == {"start", "language", "llava"}


def test_a_perfect_projector_has_no_loss(minibench_processor, monkeypatch):
    args = parse_args(["--output_dir", "x", "--text_layers", "2", "--vision_layers", "2"])
    model = make_model(minibench_processor, args)
    aligner = tower.Aligner(model.model, tower.word_ids(minibench_processor.tokenizer))
    scenes = [make_scene("train", 0, index) for index in range(4)]
    labels = torch.stack([tower.patch_labels(scene, 12) for scene in scenes])
    embeddings = model.get_input_embeddings().weight.detach()
    tokens = minibench_processor.tokenizer
    words = [word for names in tower.NAMES for word in names if word != "none"]
    ids = {word: tokens.encode(f" {word}", add_special_tokens=False) for word in words}
    mean = embeddings[sorted({token for several in ids.values() for token in several})].mean(0)

    def meant(patch: list[int]) -> torch.Tensor:
        named = [names[label] for names, label in zip(tower.NAMES, patch, strict=True)]
        return sum((embeddings[token] - mean for word in named for token in ids.get(word, [])), torch.zeros(192))

    exact = torch.stack([torch.stack([meant(patch) for patch in picture]) for picture in labels.tolist()])
    monkeypatch.setattr(aligner.projector, "forward", lambda states: exact)
    pixels = torch.zeros(4, 3, 96, 96)
    assert aligner(pixels, labels)["loss"] < 1e-9
    monkeypatch.setattr(aligner.projector, "forward", lambda states: exact + 1)
    assert aligner(pixels, labels)["loss"] == pytest.approx(192, rel=1e-4)


def test_the_trained_model_is_saved_in_half_and_loads_in_full_precision(tiny_run, tmp_path):
    tiny_run("run", pictures=2)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final")
    assert model.dtype == torch.float32
    bytes_on_disk = (tmp_path / "run" / "final" / "model.safetensors").stat().st_size
    assert bytes_on_disk < 2.5 * model.num_parameters()
    assert "use_cache" not in json.loads((tmp_path / "run" / "final" / "config.json").read_text())


def test_the_saved_weights_bear_the_names_of_published_llava_checkpoints(tiny_run, tmp_path):
    tiny_run("run", pictures=2)
    with safe_open(tmp_path / "run" / "final" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in {name.removeprefix("model.") for name in names}
    assert not any("vision_tower.encoder" in name for name in names)


# Optimizer


def test_hidden_matrices_go_to_muon_and_everything_else_to_adamw(minibench_processor):
    args = parse_args(["--output_dir", "x", "--text_layers", "2", "--vision_layers", "2"])
    model = make_model(minibench_processor, args)
    optimizer = MuonWithAdamW(model, 0.02, 0.002)
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon = {names[id(weight)] for weight in optimizer.parts[0].param_groups[0]["params"]}
    assert any("q_proj" in name for name in muon) and any("multi_modal_projector" in name for name in muon)
    assert not any("embed" in name or "lm_head" in name or "norm" in name or "bias" in name for name in muon)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_frozen_parameters_are_left_to_no_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = MuonWithAdamW(model, 0.02, 0.002)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in model[1].parameters()}


def test_a_restored_optimizer_takes_the_steps_of_the_saved_one():
    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        model(torch.ones(1, 4)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.weight.detach().clone()

    torch.manual_seed(0)
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer, restored = (MuonWithAdamW(m, 0.02, 0.002) for m in (model, other))
    step(model, optimizer)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(step(model, optimizer), step(other, restored))


def test_muon_steps_as_pytorchs_does_but_for_its_bfloat16():
    shapes = [(8, 8), (12, 8), (8, 12), (12, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizers = Muon(ours, lr=0.02, weight_decay=0.01), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    start = [weight.detach().clone() for weight in ours]
    for _ in range(3):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, other, first in zip(ours, theirs, start, strict=True):
        moved, expected = weight - first, other - first
        assert (moved - expected).norm() < 0.02 * expected.norm() and expected.norm() > 0.1
