"""dpvr/space.py: the chat as a Space, pushed to a Hub on loopback, starts from what was pushed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from hub_server import Hub
from packaging.requirements import Requirement
from test_hub import hub  # noqa: F401

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


def unpacked(hub: Hub, repo_id: str, folder: Path) -> set[str]:  # noqa: F811
    for name, content in hub.files(repo_id).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return set(hub.files(repo_id))


def test_a_space_is_pushed_in_one_commit_and_starts(hub, tmp_path):  # noqa: F811
    main(parse_args(["me/chat"]))
    assert len(hub.commits["me/chat"]) == 1
    names = unpacked(hub, "me/chat", tmp_path)
    assert {"app.py", "space.py", "README.md", "requirements.txt", "model.safetensors", "dpvr/inference/page.css"} <= names
    assert not any(name.startswith(("tests/", "docs/", ".")) for name in names)
    result = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["model True None", "Latent: 0.36 of the compute, -1.4 points 4 True"]


def test_a_space_of_another_model_names_it_and_brings_no_weights(hub):  # noqa: F811
    main(parse_args(["me/other", "--model", "Qwen/Qwen3-VL-2B-Instruct", "--adapter", "me/a", "--private"]))
    files = hub.files("me/other")
    assert b"['--model', 'Qwen/Qwen3-VL-2B-Instruct', '--adapter', 'me/a']" in files["space.py"]
    assert "model.safetensors" not in files and "me/other" in hub.private


def test_what_a_space_cannot_load_is_refused(hub, tmp_path):  # noqa: F811
    for arguments, message in [
        (["--adapter", "me/a"], "An adapter needs its base"),
        (["--model", str(tmp_path)], "which others cannot load"),
    ]:
        with pytest.raises(ValueError, match=message):
            main(parse_args(["me/x", *arguments]))
    assert not hub.commits


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
