"""train_sft.py in two processes: the loss curve and the files of one process. On CPUs, over gloo."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, debug_launcher
from accelerate.commands.config.config_args import load_config_from_file
from lines import NEEDS_TRAINING
from PIL import Image
from safetensors.torch import load_file
from test_train_rows import talk
from test_train_sft import losses

import train_sft
from dpvr.training import trainers
from modeling_dpvr import DpvrLlavaForConditionalGeneration

CONFIGS = Path(train_sft.__file__).parent / "configs"
# plain gradient descent, unclipped: Adam and clipping would hide a gradient of another scale
LINEAR = ["--optim", "sgd", "--max_grad_norm", "0", "--learning_rate", "10", "--logging_steps", "1"]
TWO_PROCESSES = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO_PROCESSES += ["--main_process_port", "0"]  # any free one
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed and a C++ compiler: pip install deepspeed"
)
# accelerate knows FSDP on GPUs only: its state of several processes on CPUs is made FSDP's here
FSDP_ON_CPUS = """
import runpy, sys
from accelerate import DistributedType, state

class FsdpState(state.AcceleratorState):
    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

import accelerate.accelerator
accelerate.accelerator.AcceleratorState = FsdpState
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""


def launch(*arguments: str, script: Path, config: Path) -> None:
    """`accelerate launch` in two processes; its own --cpu starts one, whatever --num_processes says."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *TWO_PROCESSES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command += [str(script), *arguments, "--use_cpu", "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def fork(*arguments: str) -> None:
    """Two processes that are forked from this one, which has the imports done: each takes 12 seconds for them."""
    debug_launcher(run_alone, (*arguments, "--use_cpu", "true"), num_processes=2)


def run_alone(*arguments: str) -> None:
    train_sft.main(*train_sft.parse_args(list(arguments)))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_same(alone: Path, together: Path, base: str) -> None:
    """Same curve, same files, same names in them, and the same weights, which are far from where they started."""
    assert files_in(together) == files_in(alone)
    records = [json.loads((folder / "training.json").read_text()) for folder in (alone, together)]
    assert [record["recipe"]["processes"] for record in records] == [1, 2]
    curve = losses(records[0])
    assert len(curve) > 2 and losses(records[1]) == pytest.approx(curve, abs=1e-5)
    fresh = DpvrLlavaForConditionalGeneration.from_pretrained(base)
    fresh.reset_side_branch()
    trained = load_file(alone / "model.safetensors")
    assert all((weight - fresh.state_dict()[name]).abs().max() > 1e-4 for name, weight in trained.items())
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        weights = [load_file(folder / name) for folder in (alone, together)]
        assert weights[0].keys() == weights[1].keys()
        for key, weight in weights[0].items():
            assert weights[1][key].dtype == weight.dtype
            torch.testing.assert_close(weights[1][key], weight, rtol=0, atol=1e-5)
    for name in ("config.json", "adapter/adapter_config.json", "chat_template.jinja", "modeling_dpvr.py"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()


@pytest.fixture
def half_text(tmp_path) -> list[str]:
    """Arguments for a stream whose steps of four rows begin with two of a picture and end in two of text alone."""
    (tmp_path / "images").mkdir()
    rows = []
    for number, colour in enumerate(["red", "blue", "green", "black", "white", "yellow"]):
        Image.new("RGB", (96, 96), colour).save(tmp_path / "images" / f"{colour}.png")
        question = "<image>\nWhat colour is the star?" + " Look again." * number
        rows += [{"image": f"{colour}.png", "conversations": talk(question, colour, "Sure?", "yes")}] * 2
        rows += [{"conversations": talk("How many?" * (1 + number), str(number))}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(tmp_path / "rows.jsonl"), "--image_folder", str(tmp_path / "images")]
    return [*data, "--streaming", "--max_steps", "6", *LINEAR]


@NEEDS_TRAINING
def test_two_processes_follow_the_curve_of_one_to_the_same_files_and_weights(random_mini, tmp_path):
    shared = ["--model_name_or_path", random_mini, "--num_rows", "24", "--eval_questions", "2", *LINEAR]
    shared += ["--data", "minibench"]
    size = "--per_device_train_batch_size"
    run_alone(*shared, "--output_dir", str(tmp_path / "alone"), size, "4")
    fork(*shared, "--output_dir", str(tmp_path / "together"), size, "2")
    check_same(tmp_path / "alone", tmp_path / "together", random_mini)
    accuracy = [
        json.loads((tmp_path / name / "training.json").read_text())["accuracy"] for name in ("alone", "together")
    ]
    assert [row["name"] for row in accuracy[1]] == [row["name"] for row in accuracy[0]] and len(accuracy[1]) == 3


@NEEDS_TRAINING
@pytest.mark.parametrize("way", ["ddp", "fsdp", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_a_process_without_pictures_keeps_step_with_one_that_has_them(random_mini, tmp_path, half_text, way):
    shared, script = ["--model_name_or_path", random_mini, *half_text], Path(train_sft.__file__)
    if way == "fsdp":
        driver = FSDP_ON_CPUS.format(folder=str(script.parent), script=str(script))
        script = tmp_path / "fsdp_on_cpus.py"
        script.write_text(driver)
    size = "--per_device_train_batch_size"
    run_alone(*shared, "--output_dir", str(tmp_path / "alone"), size, "4")
    together = ["--output_dir", str(tmp_path / "together"), size, "2"]
    launch(*shared, *together, script=script, config=CONFIGS / f"accelerate_{way}.yaml")
    check_same(tmp_path / "alone", tmp_path / "together", random_mini)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", DistributedType.MULTI_GPU), ("fsdp", DistributedType.FSDP), ("zero3", DistributedType.DEEPSPEED)],
)
def test_accelerate_reads_every_config(name, kind):
    config = load_config_from_file(str(CONFIGS / f"accelerate_{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and not config.use_cpu
    assert config.num_processes == 8 * config.num_machines and config.machine_rank == 0
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if name == "zero3":
        assert config.num_machines == 2
        assert config.deepspeed_config["zero_stage"] == 3 and config.deepspeed_config["zero3_save_16bit_model"] is True


@NEEDS_TRAINING
def test_two_processes_distil_a_latent_as_one_does(random_mini, tmp_path):
    """Each takes the mean over its own rows' text tokens: not quite the mean over all."""
    shared = ["--model_name_or_path", random_mini, "--num_rows", "16", "--eval_questions", "0", *LINEAR]
    shared += ["--routing", "latent", "--latent_rank", "8", "--fit_rows", "8"]
    size = "--per_device_train_batch_size"
    run_alone(*shared, "--output_dir", str(tmp_path / "alone"), size, "4")
    fork(*shared, "--output_dir", str(tmp_path / "together"), size, "2")
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("alone", "together")]
    assert [record["recipe"]["processes"] for record in records] == [1, 2]
    curves = [losses(record) for record in records]
    assert len(curves[0]) > 2 and curves[1] == pytest.approx(curves[0], rel=0.2)
    names = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together")]
    assert all((weight - names[1][name]).abs().max() < 0.1 for name, weight in names[0].items())


@NEEDS_TRAINING
def test_a_sharded_model_is_not_asked_minibenchs_questions(random_mini, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "SHARDED", (DistributedType.NO,))
    arguments = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path), "--num_rows", "4"]
    with pytest.raises(ValueError, match="--eval_questions is 2, but under FSDP and ZeRO-3 .*: use --eval_q.* 0"):
        run_alone(*arguments, "--eval_questions", "2")


@NEEDS_TRAINING
def test_report_to_tensorboard_writes_the_loss_curve(random_mini, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = ["--report_to", "tensorboard", "--num_rows", "8", "--eval_questions", "0", "--logging_steps", "1"]
    arguments = ["--model_name_or_path", random_mini, "--output_dir", str(tmp_path), *report]
    run_alone(*arguments, "--per_device_train_batch_size", "4")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    record = json.loads((tmp_path / "training.json").read_text())
    assert len(logged) == 2 and logged == pytest.approx(losses(record), abs=1e-6)
