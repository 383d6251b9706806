"""The README: its snippets run, print what it says they print, its commands work, and its table is the results'."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from conftest import make_llava
from huggingface_hub import metadata_load
from packaging.specifiers import SpecifierSet
from transformers import AutoModelForImageTextToText

from app import build, launch, write_examples
from dpvr.inference.chat import Answerer, load
from dpvr.reports.documents import BLOCKS as REPORT
from dpvr.reports.documents import between_marks
from dpvr.reports.latency import PERFORMANCE
from minibench.scenes import make_scene

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [
    (block, BLOCKS[index + 1][1] if BLOCKS[index + 1][0] == "text" else None)
    for index, (language, block) in enumerate(BLOCKS)
    if language == "python"
]
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
IS_V4 = transformers.__version__.startswith("4.")


@pytest.fixture
def python(monkeypatch, capsys) -> Callable[[str], str]:
    """Runs what comes after "python" in a command in this process, which has imported the libraries already."""

    def run(command: str) -> str:
        script, *arguments = shlex.split(command)
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        if script == "-m":
            script, *arguments = arguments
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.delitem(sys.modules, script, raising=False)  # else runpy warns
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Iterator[dict[str, str]]:
    """What a README snippet downloads, reads or writes, and what stands in for it here."""
    folder = tmp_path_factory.mktemp("readme")
    make_llava(depth=20).save_pretrained(folder / "llava")
    make_scene("test", 0, 0).draw().save(folder / "scene.png")
    app = build(Answerer(*load(str(ROOT))), "About.", write_examples(folder))
    launch(app, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    found = {name: str(folder / name) for name in ("my-dpvr", "my-adapter", "scene.png")}
    yield {"llava-hf/llava-1.5-7b-hf": str(folder / "llava"), "http://127.0.0.1:7860": app.local_url, **found}
    app.close()


@pytest.mark.parametrize(("block", "output"), PYTHON, ids=[f"snippet {index}" for index in range(len(PYTHON))])
def test_every_snippet_runs_and_prints_what_the_readme_says(block, output, stand_ins, monkeypatch, capsys):
    """In this process, which has imported the libraries already; a name that a snippet does not import is unknown."""
    monkeypatch.chdir(ROOT)
    for name, folder in stand_ins.items():
        block = block.replace(name, folder)
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    if output is not None:
        assert capsys.readouterr().out == output


def test_the_commands_are_the_ones_that_are_tested():
    """Here, and in test_browser, test_distributed, test_grid, test_lmms, test_probe_saturation and test_sharing."""
    assert COMMANDS == [
        "pip install -r requirements.txt && python train_sft.py",
        "pip install -r requirements-dev.txt && pytest",
        "python app.py",
        "python train_sft.py --config configs/llava_1.5_7b.yaml --data llava_v1_5_mix665k.json --image_folder images",
        "accelerate launch --config_file configs/accelerate_ddp.yaml train_sft.py --config configs/llava_1.5_7b.yaml "
        "--data llava_v1_5_mix665k.json --image_folder images",
        "python train_sft.py --config configs/llava_1.5_7b.yaml --data me/rows --push_to_hub --hub_model_id me/x",
        "python -m dpvr.benchmarks.accuracy",
        "python -m dpvr.benchmarks.grid",
        "python -m dpvr.reports",
        "python -m dpvr.analysis.probe",
        "python -m dpvr.analysis.probe --find_plan 0.55 0.45",
        "python train_sft.py --plan results/saturation/plan_0.45.yaml",
        "python -m minibench.export --output_dir outputs/minibench --format datasets --split train --size 5000",
        "python -m minibench.export --output_dir outputs/minibench-llava --format llava --split train --size 5000",
        "lmms-eval --config configs/lmms_eval.yaml --model_args pretrained=me/x,routing=late_fusion,dtype=bfloat16",
        "python -m dpvr.pretraining.train --output_dir outputs/pretrain",
        "python train_sft.py --model_name_or_path outputs/pretrain/final --split_layer 8 --output_dir outputs/side",
        "python -m dpvr.pretraining.assemble --side_branch outputs/side --output_dir outputs/dpvr-mini",
        "python -m minibench.depth --model_name_or_path outputs/dpvr-mini --output outputs/depth.json",
    ]


def test_the_front_matter_makes_a_space_of_the_repository_and_every_picture_is_there():
    card = metadata_load(ROOT / "README.md")
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py") and (ROOT / card["app_file"]).exists()
    needed = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("gradio"))
    assert SpecifierSet(needed.removeprefix("gradio")).contains(card["sdk_version"])
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_accuracy_command_ends_in_one_json_document(python):
    printed = python("benchmark_accuracy.py --suite minibench --limit 2")
    document = json.loads(printed.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == ["vanilla", "untrained", "late_fusion", "blind"]
    assert all(row.keys() >= {"routing", "tasks", "mean", "six_bench_mean", "n"} for row in document["rows"])


@pytest.mark.parametrize(
    ("form", "files"), [("datasets", ["train-00000-of-00001.parquet"]), ("llava", ["train.json"])]
)
def test_the_export_commands_write_the_split(form, files, python, tmp_path):
    python(f"-m minibench.export --output_dir {tmp_path / form} --format {form} --split train --size 3")
    assert [path.name for path in (tmp_path / form).rglob("train*.*") if path.suffix != ".png"] == files


@pytest.mark.skipif(IS_V4, reason="training is for transformers 5.18 and newer")
def test_the_training_command_runs_on_the_embedded_model_in_a_fresh_process(tmp_path):
    short = "--num_rows 16 --per_device_train_batch_size 4 --eval_questions 4 --output_dir"
    command = [sys.executable, "train_sft.py", *short.split(), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^vanilla +mean.*^untrained branch +mean.*^trained branch +mean", result.stdout, re.DOTALL | re.MULTILINE
    )
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4e6


@pytest.mark.skipif(IS_V4, reason="training is for transformers 5.18 and newer")
def test_the_training_command_runs_on_llavas_json_with_a_recipe(python, random_mini, tmp_path):
    (tmp_path / "images").mkdir()
    make_scene("train", 0, 0).draw().save(tmp_path / "images" / "scene.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a star"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "scene.png", "conversations": talk}] * 2))
    (recipe,) = {line.split()[3] for line in COMMANDS if line.startswith("python train_sft.py --config")}
    base = f"--model_name_or_path {random_mini} --split_layer 2 --use_cpu true --output_dir {tmp_path / 'out'}"
    data = f"--data {tmp_path / 'rows.json'} --image_folder {tmp_path / 'images'} --report_to none"
    python(f"train_sft.py --config {recipe} {base} {data}")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["learning_rate"] == 1e-4


@pytest.mark.skipif(IS_V4, reason="training is for transformers 5.18 and newer")
def test_the_rebuild_commands_make_a_repository_that_loads(python, tmp_path):
    small = "--text_layers 3 --text_width 64 --vision_layers 2 --vision_width 32 --tower_pictures 32 --pictures 32"
    quick = "--further_pictures 16 --texts 8 --aligned_pictures 8 --batch_size 8"
    quick += " --validation_questions 2 --num_workers 0"
    python(f"-m minibench.pretrain --output_dir {tmp_path / 'pretrain'} {small} {quick}")
    sft = f"--model_name_or_path {tmp_path / 'pretrain' / 'final'} --output_dir {tmp_path / 'side'}"
    python(f"train_sft.py {sft} --split_layer 1 --num_rows 8 --eval_questions 0")
    assembled = tmp_path / "dpvr-mini"
    python(f"-m minibench.assemble --side_branch {tmp_path / 'side'} --output_dir {assembled}")
    model = AutoModelForImageTextToText.from_pretrained(assembled, trust_remote_code=True)
    assert model.config.layer_plan().modes == ("joint", "text", "context")
    python(f"-m minibench.depth --model_name_or_path {assembled} --limit 2 --output {tmp_path / 'depth.json'}")
    assert len(json.loads((tmp_path / "depth.json").read_text(encoding="utf-8"))["rows"]) == 3


@pytest.mark.parametrize("name", REPORT)
def test_the_tables_are_made_from_the_results(name):
    assert between_marks(README, name) == REPORT[name](ROOT / "results")


@pytest.mark.parametrize("name", PERFORMANCE)
def test_the_tables_of_performance_are_made_from_the_results(name):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert between_marks(text, name) == PERFORMANCE[name](ROOT / "results")
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / picture).exists(), picture


def test_the_table_of_modes_names_tests_that_exist():
    named = re.findall(r"^\|.*\| `(test_\w+\.py)(?:::(test_\w+))?` \|$", README, flags=re.MULTILINE)
    assert len(named) > 10
    for file, name in named:
        assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_what_is_said_of_saturation_is_what_was_measured():
    found = json.loads((ROOT / "results" / "saturation" / "saturation.json").read_text(encoding="utf-8"))
    mass, papers = found["attention_mass"]["median"], found["papers_split"]
    changed = found["withdrawal"]["text_only"]["changed"]
    routed, plans = found["routed"], json.loads((ROOT / "results" / "saturation" / "plans.json").read_text("utf-8"))
    plan, last = plans["plans"]["0.45"], len(mass) - 1
    cheap = [point for point in plans["frontier"] if point["prefill_flops_ratio"] <= 0.45]
    late, alone = (min(p["changed"] for p in cheap if p["fusion_layers"] == layers) for layers in ([last], []))
    *layers, final = plan["fusion_layers"]
    assert routed["identical"] and f"`{found['command']}`" in README and plans["command"] == found["command"]
    for said in (
        f"gives {routed['attention_mass']['median'][last]:.2f} of its attention to the image where vanilla's gives "
        f"{routed['vanilla_mass']['median'][last]:.2f}, {routed['last_layer_ratio']['median']:.2f} times as much",
        f"shares {plan['split_layer']} of 12 layers, reads in layers {', '.join(map(str, layers))} and {final}, and "
        f"changes {plan['changed']:.1%} of the answers",
        f"Late fusion within that budget changes {late:.1%}, the text alone {alone:.1%} "
        f"({plans['plan_samples'] // 2} questions",
        f"rises from {mass[0]:.2f} to {max(mass):.2f} and is still at {mass[-1]:.2f} in the last layer",
        f"after layer {found['transition']['image']} of 12 and after layer {found['transition']['text']}.",
        f"would split at {papers}, where withdrawing the image changes {changed[papers - 1]:.0%} of the answers",
        f"the causal one, at most {found['tolerance']:.0%}, at {found['recommended_split']}.",
    ):
        assert said in " ".join(README.split()), said
