"""Checkpoints that are damaged, are none, or are another run's: the next older whole one, or one sentence."""

import copy
import json
import os
from pathlib import Path

import pytest
from lines import NEEDS_TRAINING

pytestmark = NEEDS_TRAINING
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
RUN = {
    "method": "dpvr",
    "base": {"name": "me/base", "revision": "main", "dtype": "float32", "bits": None},
    "lora": None,
    "recipe": {"learning_rate": 0.003, "max_steps": 4, "seed": 1},
    "data": {"name": "minibench", "fingerprint": [8, 7, 1], "bad_rows": {}},
    "seed": 1,
}


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


HARMS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "one bit changed": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "a folder": _as_folder,
    "a dangling link": _as_dangling_link,
}
NO_MANIFESTS = {
    "binary": b"\xff\xfe\x00",
    "half": b'{"run": {}, "fi',
    "a number": b"3",
    "null": b"null",
    "a list": b"[]",
    "empty": b"{}",
    "no run": b'{"files": {"trainer_state.json": [1, "a"]}}',
    "no files": b'{"run": {}}',
    "files a list": b'{"run": {}, "files": ["trainer_state.json"]}',
    "files of nothing": b'{"run": {}, "files": {}}',
    "run a word": b'{"run": "me", "files": {"trainer_state.json": [1, "a"]}}',
    "no size": b'{"run": {}, "files": {"trainer_state.json": ["a"]}}',
    "size a word": b'{"run": {}, "files": {"trainer_state.json": ["1", "a"]}}',
    "size true": b'{"run": {}, "files": {"trainer_state.json": [true, "a"]}}',
    "digest a number": b'{"run": {}, "files": {"trainer_state.json": [1, 2]}}',
    "entry null": b'{"run": {}, "files": {"trainer_state.json": null}}',
    "another folder's file": b'{"run": {}, "files": {"trainer_state.json": [1, "a"], "../x": [1, "a"]}}',
    "nested": b"[" * 100000,
}
OTHERS = {
    "method": "lora",
    "base": {**RUN["base"], "name": "me/other"},
    "base.dtype": "bfloat16",
    "base.bits": 4,
    "lora": {"r": 8},
    "recipe.learning_rate": 0.1,
    "recipe.max_steps": 5,
    "recipe.weight_decay": 0.1,
    "recipe": {},
    "data.name": "rows.json",
    "data.fingerprint": [9, 7, 1],
    "data.bad_rows": {"3": "empty"},
    "seed": 2,
}


@pytest.fixture
def folder(tmp_path):
    from dpvr.training.checkpoints import write_manifest

    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in FILES:
            (path / name).write_bytes(f"{name} of step {step}".encode())
        write_manifest(path, RUN)
    return tmp_path


def check_older_is_taken(folder: Path, capsys, reason: str) -> None:
    from dpvr.training.checkpoints import find_checkpoint

    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-1")
    assert f"checkpoint-2 is not whole: {reason}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="There is no whole checkpoint in .*checkpoint-2 is not whole.*start anew"):
        find_checkpoint(str(folder / "checkpoint-2"), str(folder))


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_harmed_file_is_passed_over(folder, capsys, name, harm):
    HARMS[harm](folder / "checkpoint-2" / name)
    check_older_is_taken(folder, capsys, name)


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_checkpoint_with_another_manifest_is_passed_over(folder, capsys, content):
    (folder / "checkpoint-2" / "checkpoint.json").write_bytes(NO_MANIFESTS[content])
    check_older_is_taken(folder, capsys, "its checkpoint.json cannot be read")


@pytest.mark.parametrize("harm", ["missing", "a folder", "a dangling link"])
def test_a_checkpoint_without_a_manifest_is_passed_over(folder, capsys, harm):
    HARMS[harm](folder / "checkpoint-2" / "checkpoint.json")
    check_older_is_taken(folder, capsys, "its checkpoint.json" if harm == "a folder" else "it has no checkpoint.json")


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-9x", "checkpoint--9", "checkpoint-last", "mine"])
def test_a_folder_with_another_name_is_no_checkpoint(folder, capsys, name):
    from dpvr.training.checkpoints import find_checkpoint

    (folder / name).mkdir()
    assert find_checkpoint("last", str(folder)).endswith("checkpoint-2") and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["", ".", "nowhere", "checkpoint-2/model.safetensors", "last/", "a\0b", "x" * 300])
def test_a_checkpoint_that_is_none_is_refused_by_its_name(folder, name, monkeypatch):
    from dpvr.training.checkpoints import find_checkpoint

    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="There is no whole checkpoint in .* is not whole: .*start anew"):
        find_checkpoint(name, "out")


@pytest.mark.parametrize("field", OTHERS)
def test_another_runs_checkpoint_is_refused_with_what_differs(folder, field):
    from dpvr.training.checkpoints import refuse_another_run

    checkpoint = str(folder / "checkpoint-2")
    refuse_another_run(checkpoint, RUN)
    run = copy.deepcopy(RUN)
    *path, last = field.split(".")
    inner = run[path[0]] if path else run
    inner[last] = OTHERS[field]
    with pytest.raises(ValueError, match=rf"checkpoint-2 was saved by another run: .*{field}.* was .* and is "):
        refuse_another_run(checkpoint, run)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "whole with a note", "torn", "damaged"])
def test_what_lies_where_a_checkpoint_goes_is_set_aside_unless_a_run_wrote_it(folder, tmp_path, kind):
    from dpvr.training.checkpoints import make_room

    place = folder / "checkpoint-2"
    if kind in ("file", "folder", "link"):
        place.rename(tmp_path / "elsewhere")
        {"file": place.touch, "folder": place.mkdir, "link": lambda: place.symlink_to("elsewhere")}[kind]()
        if kind == "folder":
            (place / "note.txt").write_text("mine")
    elif kind == "whole with a note":
        (place / "note.txt").write_text("mine")
    elif kind == "torn":
        os.replace(place / "checkpoint.json", place / "checkpoint.json.part")
    else:
        (place / "optimizer.pt").unlink()
    make_room(place)
    assert not os.path.lexists(place)
    aside = folder / "checkpoint-2.kept-1"
    assert os.path.lexists(aside) == (kind not in ("torn", "damaged"))
    if kind in ("folder", "whole with a note"):
        assert [path.name for path in aside.iterdir()] == ["note.txt"]
    assert json.loads((folder / "checkpoint-1" / "checkpoint.json").read_text())["run"] == RUN
