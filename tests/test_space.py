"""dpvr/space.py: the chat as a Space, pushed to a Hub on loopback, starts from what was pushed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import metadata_load
from packaging.requirements import Requirement

from dpvr.space import main, parse_args

ROOT = Path(__file__).resolve().parent.parent
LOADED = """
import sys
import app
app.main = lambda args: print("model", args.model == app.ROOT, args.adapter)
exec(open("space.py").read())
import dpvr.inference.page
from dpvr.inference.loading import load
from dpvr.inference.chat import Answerer
from dpvr.inference.controls import Page
page = Page(Answerer(*load(app.ROOT)))
print(page.setting.label, len(page.points), page.answerer.criterion is not None)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


def push(hub: Hub, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command with a client whose Hub this is."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-m", "dpvr.space", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


def test_a_space_is_pushed_in_one_commit_and_starts(hub, tmp_path):
    pushed = push(hub, "me/chat")
    assert pushed.returncode == 0, pushed.stderr
    (files,) = hub.commits["me/chat"]
    assert {"app.py", "space.py", "README.md", "requirements.txt", "model.safetensors"} <= set(files)
    assert not any(name.startswith(("tests/", "docs/", ".")) for name in files)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    result = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["model True None", "Latent: 0.36 of the compute, -1.4 points 4 True"]


def test_a_space_of_another_model_names_it_and_brings_no_weights(hub):
    pushed = push(hub, "me/other", "--model", "Qwen/Qwen3-VL-2B-Instruct", "--adapter", "me/a", "--private")
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files("me/other")
    assert b"['--model', 'Qwen/Qwen3-VL-2B-Instruct', '--adapter', 'me/a']" in files["space.py"]
    assert "model.safetensors" not in files and "me/other" in hub.private


def test_a_push_that_fails_says_what_to_do(hub):
    refused = push(hub, "you/chat")
    assert refused.returncode == 2 and "The Hub does not let you write to 'you/chat'" in refused.stderr


def test_what_a_space_cannot_load_is_refused(tmp_path):
    for arguments, message in [
        (["--adapter", "me/a"], "An adapter needs its base"),
        (["--model", str(tmp_path)], "which others cannot load"),
    ]:
        with pytest.raises(ValueError, match=message):
            main(parse_args(["me/x", *arguments]))


def test_the_pins_are_those_that_zerogpu_and_the_requirements_take():
    front = metadata_load(ROOT / "spaces" / "README.md")
    pins = {}
    for line in (ROOT / "spaces" / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[requirement.name] = str(requirement.specifier)
    assert pins["torch"].removeprefix("==") in ("2.8.0", "2.9.1", "2.10.0", "2.11.0") and "spaces" in pins
    assert front["sdk_version"] == pins["gradio"].removeprefix("==") and front["app_file"] == "space.py"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        allowed = Requirement(re.sub(r"\s+#.*", "", line))
        pinned = pins.get(allowed.name, "")
        if pinned.startswith("=="):
            assert allowed.specifier.contains(pinned[2:]), line
