"""dpvr/models.py: no command runs the code of a repository unasked, and one that needs its code says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from app import parse_args as app_args
from dpvr.analysis.probe import main as probe
from dpvr.analysis.probe import parse_args as probe_args
from dpvr.benchmarks.accuracy import main as accuracy
from dpvr.benchmarks.accuracy import parse_args as accuracy_args
from dpvr.inference.loading import load
from dpvr.models import load_model
from dpvr.training.arguments import parse
from hub_dpvr import save_adapter
from modeling_dpvr import DpvrLlavaForConditionalGeneration
from processors_dpvr import load_processor
from train_sft import main as train
from versions_dpvr import LINE_4

AUTO = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
NEEDS_CODE = "needs the code in its repository, .* add --trust_remote_code"


def plant(folder: Path) -> Path:
    """Put code wherever a loader might look for some into a repository; the file that it would write."""
    marker = folder / "it_ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass X: pass\ndef generate(model, **_): pass\n"
    (folder / "custom_generate").mkdir()
    names = {path.name for path in folder.glob("*.py")} | {"stranger.py", "custom_generate/generate.py"}
    for name in names:
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        tokenizer = {"AutoTokenizer": ["stranger.X", "stranger.X"]}
        values["auto_map"] = {**dict.fromkeys(AUTO, "stranger.X"), **tokenizer}
        for part in ("text_config", "vision_config"):
            if part in values:
                values[part]["auto_map"] = dict.fromkeys(AUTO, "stranger.X")
        if values.keys() != {"auto_map"}:
            path.write_text(json.dumps(values))
    return marker


@pytest.fixture
def stranger(random_mini, tmp_path) -> str:
    """A DPVR repository with code of a stranger's."""
    return str(shutil.copytree(random_mini, tmp_path / "stranger"))


def stock_from(folder: str, to: Path) -> str:
    LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(to)
    load_processor(folder).save_pretrained(to)
    return str(to)


def run_app(name: str, monkeypatch) -> None:
    import app

    monkeypatch.setattr("dpvr.inference.page.launch", lambda *_: None)
    app.main(app_args(["--model", name]))


def run_training(name: str, monkeypatch) -> None:
    out = Path(name).parent / "out"
    size = "--num_rows 2 --max_steps 1 --eval_questions 2 --split_layer 2"
    train(*parse(f"--model_name_or_path {name} --output_dir {out} {size}".split()))


def run_probe(name: str, monkeypatch) -> None:
    probe(probe_args(["--model", name, "--num_samples", "1", "--output_dir", str(Path(name).parent / "probe")]))


def run_accuracy(name: str, monkeypatch) -> None:
    accuracy(accuracy_args(["--model_name_or_path", name, "--limit", "8"]))


def run_lmms_eval(name: str, monkeypatch) -> None:
    pytest.importorskip("lmms_eval")
    from dpvr.lmms_eval.model import DpvrLlava

    DpvrLlava(name, device="cpu")


COMMANDS = [run_app, run_probe, run_accuracy, run_training, run_lmms_eval]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_no_command_runs_the_code_of_a_dpvr_repository(stranger, monkeypatch, command: Callable):
    if LINE_4 and command in (run_training, run_probe):
        pytest.skip("these commands need transformers 5")
    marker = plant(Path(stranger))
    command(stranger, monkeypatch)
    assert not marker.exists()


def test_a_model_is_loaded_with_the_class_that_is_installed_here(stranger, tmp_path):
    stock = stock_from(stranger, tmp_path / "stock")
    marker = plant(Path(stranger))
    assert type(load_model(stranger)) is DpvrLlavaForConditionalGeneration
    assert type(load(stranger)[0]) is DpvrLlavaForConditionalGeneration
    assert type(load_model(stock)) is LlavaForConditionalGeneration
    planted = plant(Path(stock))
    if LINE_4:
        with pytest.raises(ValueError, match="brings its own generate in custom_generate/generate.py"):
            load_model(stock)
    else:
        assert type(load_model(stock)) is LlavaForConditionalGeneration
    assert not marker.exists() and not planted.exists()


def test_an_adapter_and_its_base_run_no_code(random_mini, tmp_path):
    stock = stock_from(random_mini, tmp_path / "stock")
    model = DpvrLlavaForConditionalGeneration.from_pretrained(stock, split_layer=2)
    save_adapter(model, tmp_path / "adapter")
    markers = [plant(Path(stock)), plant(tmp_path / "adapter")]
    if LINE_4:
        with pytest.raises(ValueError, match="brings its own generate"):
            load(str(tmp_path / "adapter"), stock)
    else:
        load(str(tmp_path / "adapter"), stock)
    assert not any(marker.exists() for marker in markers)


@pytest.mark.parametrize("command", [run_app, run_probe, run_lmms_eval], ids=lambda command: command.__name__)
def test_a_repository_that_needs_its_code_says_so(stranger, monkeypatch, command: Callable):
    if LINE_4 and command is run_probe:
        pytest.skip("the command needs transformers 5")
    marker = plant(Path(stranger))
    config = Path(stranger, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "stranger"}))
    with pytest.raises(ValueError, match=NEEDS_CODE) as caught:
        command(stranger, monkeypatch)
    assert "\n" not in str(caught.value) and not marker.exists()


def test_a_type_that_no_code_loads_is_refused_by_name(stranger):
    Path(stranger, "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="of type 'bert', .* neither a DPVR model nor a vision-language model"):
        load_model(stranger)


def test_the_code_runs_when_it_is_asked_for(stranger):
    """In a process of its own: where a test before has registered the local class, transformers prefers that."""
    for path in Path(stranger).glob("modeling_dpvr.py"):
        path.write_text(path.read_text() + f"\nopen({str(Path(stranger, 'it_ran'))!r}, 'w').close()\n")
    program = (
        "import sys; from dpvr.inference.loading import load; "
        "print(type(load(sys.argv[1], trust_remote_code=True)[0]).__module__)"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", program, stranger], cwd=root, capture_output=True, text=True)
    assert found.stdout.startswith("transformers_modules"), found.stderr
    assert Path(stranger, "it_ran").exists()
    assert app_args(["--trust_remote_code"]).trust_remote_code and not app_args([]).trust_remote_code
    assert probe_args(["--trust_remote_code"]).trust_remote_code and not probe_args([]).trust_remote_code
