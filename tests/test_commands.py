"""Every command: its help comes at once, and an error of the user's is one message and exit status 2."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_python import ForkedPython

from versions_dpvr import LINE_4

ROOT = Path(__file__).parent.parent
COMMANDS = [
    "train_sft.py",
    "app.py",
    "-m dpvr.costs",
    "-m dpvr.push",
    "-m dpvr.space",
    "-m dpvr.analysis.probe",
    "-m dpvr.benchmarks.accuracy",
    "-m dpvr.benchmarks.fallback",
    "-m dpvr.benchmarks.fit_time",
    "-m dpvr.benchmarks.grid",
    "-m dpvr.benchmarks.latency",
    "-m dpvr.benchmarks.latents",
    "-m dpvr.benchmarks.limits",
    "-m dpvr.benchmarks.chat",
    "-m dpvr.benchmarks.unlike",
    "-m dpvr.benchmarks.training_step",
    "-m dpvr.lmms_eval.minibench",
    "-m dpvr.pretraining.assemble",
    "-m dpvr.pretraining.train",
    "-m dpvr.reports",
    "-m dpvr.serving.benchmark",
    "-m dpvr.serving.check",
    "-m dpvr.training.fit",
    "-m minibench.export",
]
HELP_SECONDS = 2.0
WRONG = {  # a command line of each kind of error, and what is said
    "train_sft.py --lerning_rate 1": "there is no option --lerning_rate; did you mean --learning_rate?",
    "train_sft.py --method lorra": "invalid choice: 'lorra'",
    "train_sft.py --data gone.json": "There is no JSON file 'gone.json'",
    "train_sft.py --config gone.yaml": "gone.yaml",
    "app.py --modle x": "there is no option --modle; did you mean --model?",
    "app.py --model no/such": "Error: We couldn't connect to",
    "-m dpvr.benchmarks.latency --shape 512x33": "invalid choice: '512x33'",
    "-m dpvr.benchmarks.accuracy --limit many": "invalid integer value: 'many'",
    "-m dpvr.analysis.probe --model gone": "Error: We couldn't connect to",
    "-m dpvr.push gone me/x": "gone",
    "-m dpvr.costs gone --split_layer 4 --image_tokens 9": "gone",
    "-m dpvr.costs x --split_layer 4 --image_tokens 9 --budget 2": "give a number above 0",
    "-m minibench.export --output_dir x --format datasets --split train --size 0": "0",
}


def python(command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[ForkedPython]:
    python = ForkedPython({"HF_HUB_OFFLINE": "1"}, tmp_path_factory.mktemp("output"))
    yield python
    python.close()


def test_every_command_of_the_repository_is_in_the_list():
    files = [*ROOT.glob("*.py"), *ROOT.glob("dpvr/**/*.py"), *ROOT.glob("minibench/**/*.py")]
    scripts = {path.relative_to(ROOT) for path in files if '__name__ == "__main__"' in path.read_text()}
    scripts |= {path.relative_to(ROOT) for path in files if path.name == "__main__.py"}
    names = {
        str(path) if len(path.parts) == 1 else "-m " + ".".join(path.with_suffix("").parts).removesuffix(".__main__")
        for path in scripts
    }
    assert names == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_two_seconds_of_processor_time(command):
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    result = python(f"{command} --help")
    assert result.returncode == 0 and "usage:" in result.stdout and not result.stderr
    assert spent() - before < HELP_SECONDS


@pytest.mark.parametrize("command", WRONG)
def test_an_error_of_the_users_is_one_message_and_exit_status_2(command, forked):
    result = forked.run(*command.split(), cwd=ROOT)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    too_old = LINE_4 and command.startswith("train_sft.py")
    assert ("Training needs transformers 5.18" if too_old else WRONG[command]) in result.stderr
    assert len(lines[-1]) < 600


def test_pythons_development_mode_shows_the_traceback():
    program = "from dpvr.command_line import run\ndef main():\n    raise ValueError('no')\nrun(main)"
    for words, status in ((["-X", "dev"], 1), ([], 2)):
        result = subprocess.run([sys.executable, *words, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == status and ("Traceback" in result.stderr) == (status == 1)


def test_the_help_of_training_shows_our_options_and_names_the_way_to_all(forked):
    shown = python("train_sft.py --help").stdout
    assert len(shown.splitlines()) < 150 and "--help-all" in shown and "python train_sft.py --method lora" in shown
    for title in ("what to train:", "data:", "model:", "recipe:", "output:"):
        assert f"\n{title}\n" in shown
    everything = forked.run("train_sft.py", "--help-all", cwd=ROOT).stdout
    assert all(f"--{name}" in everything for name in ("adam_beta1", "packing", "bnb_4bit_quant_type", "split_layer"))
