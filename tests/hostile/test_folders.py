"""Output folders that cannot be one, are used, or hold what no run wrote: refused first, or left as they are."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from full_disk import full_disk
from lines import NEEDS_TRAINING

pytestmark = NEEDS_TRAINING
ADAPTER = "adapter/adapter_model.safetensors"
OLD = {"model.safetensors": "old", "config.json": "same", ADAPTER: "old", "merges.txt": "x"}
NEW = {"model.safetensors": "new", "config.json": "same", ADAPTER: "new", "vocab.json": "y"}
STEPS_OF_A_MOVE = 16  # 4 old files deleted, 5 folders looked for and files moved, the list, and .saving deleted


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def saved(folder: Path, files: dict[str, str]) -> None:
    """A folder as a run saves it."""
    from dpvr.training.output_folder import finish_list, write_record

    write(folder, files)
    write_record({"files": files}, folder)
    finish_list(folder)


def checkpoint(folder: Path, step: int) -> None:
    from dpvr.training.checkpoints import write_manifest

    write(folder / f"checkpoint-{step}", {"trainer_state.json": "{}", "optimizer.pt": "o"})
    write_manifest(folder / f"checkpoint-{step}", {"seed": 1})


def tree(folder: Path) -> dict[str, str | None]:
    """{name: content, where a link points to, or None for a folder}, of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = path.read_bytes().decode() if path.is_file() else None
    return found


def check(out: Path | str, *, resumed: bool = False, overwrite: bool = False, base: str = "me/base") -> None:
    from dpvr.training.used_folders import check_output_folder

    check_output_folder(str(out), base, resumed=resumed, overwrite=overwrite)


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


NO_FOLDERS = {
    "a file": lambda path: path.write_text("mine"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to a file": lambda path: (path.with_name("f").write_text("mine"), path.symlink_to("f")),
    "a link to itself": a_link_to_itself,
    "a named pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_what_is_no_folder_is_refused_and_left(tmp_path, kind, inside):
    NO_FOLDERS[kind](tmp_path / "out")
    before = os.lstat(tmp_path / "out")
    with pytest.raises(ValueError, match="--output_dir .*out.* cannot be written to .*: name a folder that can"):
        check(tmp_path / "out" / "deeper" if inside else tmp_path / "out")
    assert os.lstat(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "ok/" + "x" * 300, "/proc/out", "/proc", "/sys/out"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--output_dir .* cannot be written to .*: name a folder that can"):
        check(name)
    assert tree(tmp_path) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to .Permission denied"):
        check(tmp_path / "out")


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_noticed_first(tmp_path, there):
    out = tmp_path if there else tmp_path / "out"
    with pytest.raises(ValueError, match="cannot be written to .File too large.*free space"), full_disk():
        check(out)
    assert tree(tmp_path) == {}


def test_a_module_that_is_first_imported_on_a_full_disk_leaves_no_bytecode_in_part(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text(f"TEXT = {'x' * 5000!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with full_disk():
        import imported_late
    assert len(imported_late.TEXT) == 5000 and not list(tmp_path.rglob("*.pyc"))
    assert not sys.dont_write_bytecode


@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_the_base_is_refused(tmp_path, linked):
    saved(tmp_path / "base", OLD)
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(ValueError, match="is the folder of the base"):
        check(tmp_path / ("link" if linked else "base"), overwrite=True, base=str(tmp_path / "base"))


USED = {
    "a saved model": lambda out: saved(out, OLD),
    "a checkpoint": lambda out: checkpoint(out, 2),
    "a torn checkpoint": lambda out: write(out, {"checkpoint-2/checkpoint.json.part": "", "checkpoint-2/x": "x"}),
    "a whole save": lambda out: saved(out / ".saving", NEW),
    "a torn save": lambda out: write(out, {".saving/saved.sha256.part": "", ".saving/x": "x"}),
}


@pytest.mark.parametrize("kind", USED)
def test_a_used_folder_is_refused_to_a_new_run_and_not_to_one_that_goes_on_or_overwrites(tmp_path, kind):
    USED[kind](tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="is used: .*--resume_from_checkpoint last.* give --overwrite_output_dir"):
        check(tmp_path)
    check(tmp_path, resumed=True)
    check(tmp_path, overwrite=True)
    assert tree(tmp_path) == before


IN_THE_WAY = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "training.json",
    "saved.sha256",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "modeling_dpvr.py",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    ".saving/mine.txt",
]


@pytest.mark.parametrize("mode", ["new", "resumed", "overwrite"])
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_file_of_somebody_else_that_is_in_the_way_is_refused_and_left(tmp_path, name, mode):
    write(tmp_path, {name: "mine"})
    with pytest.raises(ValueError, match=r"(was not written by|is not the list) .*: move it away, or name another"):
        check(tmp_path, **{} if mode == "new" else {mode: True})
    assert tree(tmp_path).items() >= {name: "mine"}.items()


OTHER_KINDS = {
    "a folder": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("mine.txt"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "saved.sha256", "config.json"])
def test_a_folder_or_link_in_the_way_is_refused(tmp_path, name, kind):
    write(tmp_path, {"mine.txt": "mine"})
    OTHER_KINDS[kind](tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="move it away"):
        check(tmp_path, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "a link"])
@pytest.mark.parametrize("name", ["adapter", ".saving", "checkpoint-3"])
def test_a_file_or_link_where_a_folder_is_to_be_is_refused(tmp_path, name, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / name).write_text("x") if kind == "a file" else (tmp_path / name).symlink_to("mine")
    with pytest.raises(ValueError, match=f"{name} was not written by a training run"):
        check(tmp_path)


def test_a_checkpoint_that_no_run_wrote_is_refused(tmp_path):
    write(tmp_path, {"checkpoint-3/mine.txt": "mine"})
    with pytest.raises(ValueError, match="checkpoint-3 was not written by a training run"):
        check(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter/adapter_model.safetensors"])
def test_a_saved_file_that_has_changed_since_is_refused(tmp_path, name):
    saved(tmp_path, OLD)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} has changed since a run saved it"):
        check(tmp_path, overwrite=True)


SHA = "0" * 64
NO_LISTS = ["mine", f"{SHA} config.json", f"{SHA[1:]}  config.json", f"{SHA}  ../x", f"{SHA}  /etc/passwd", "\udcff\n"]


@pytest.mark.parametrize("text", NO_LISTS)
def test_a_list_that_no_run_wrote_is_refused(tmp_path, text):
    (tmp_path / "saved.sha256").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="saved.sha256 is not the list of saved files that a training run writes"):
        check(tmp_path, overwrite=True)


NOT_IN_THE_WAY = {
    "README.md": "mine",
    "notes.txt": "mine",
    "other.safetensors": "mine",
    "other.index.json": "mine",
    "pytorch_model.bin": "mine",
    "adapter/notes.txt": "mine",
    "runs/log": "mine",
    "checkpoint-best/model.safetensors": "mine",
    "checkpoint-3x/model.safetensors": "mine",
    "checkpoint-2/notes.txt": "mine",
    "data.py": "mine",
    ".git/config": "mine",
}


@pytest.mark.parametrize("name", NOT_IN_THE_WAY)
def test_a_file_of_somebody_else_that_is_not_in_the_way_is_there_after_a_new_run(tmp_path, name):
    from dpvr.training.output_folder import finish_move
    from dpvr.training.used_folders import delete_checkpoints

    saved(tmp_path, OLD)
    checkpoint(tmp_path, 2)
    write(tmp_path, {name: NOT_IN_THE_WAY[name]})
    check(tmp_path, overwrite=True)
    delete_checkpoints(str(tmp_path))
    saved(tmp_path / ".saving", NEW)
    assert finish_move(tmp_path)
    left = {path: text for path, text in tree(tmp_path).items() if text is not None}
    assert left.pop(name) == "mine" and left.keys() == {*NEW, "training.json", "saved.sha256"}
    assert {path: left[path] for path in NEW} == NEW


class Killed(BaseException):
    pass


def kill_before(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make a number of steps that change a folder, and end before the next."""
    done = 0

    def counted(change):
        def one(*args, **kwargs):
            nonlocal done
            if done == step:
                raise Killed
            done += 1
            return change(*args, **kwargs)

        return one

    for of, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")):
        patch.setattr(of, name, counted(getattr(of, name)))


def half_moved(out: Path) -> Path:
    """A folder with an earlier run's model and a new one's whole save."""
    saved(out, OLD)
    write(out, {"notes.txt": "mine"})
    saved(out / ".saving", NEW)
    return out


@pytest.mark.parametrize("step", range(STEPS_OF_A_MOVE))
def test_a_move_that_is_killed_before_any_of_its_steps_ends_in_the_same_folder(tmp_path, monkeypatch, step):
    from dpvr.training.output_folder import finish_move

    finish_move(half_moved(tmp_path / "whole"))
    whole, out = tree(tmp_path / "whole"), half_moved(tmp_path / "out")
    assert whole["model.safetensors"] == "new" and "merges.txt" not in whole and "vocab.json" in whole
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(step, patch)
        finish_move(out)
    left = tree(out)
    assert left.get("model.safetensors") != "new" or left["vocab.json"] == "y", "weights came before the rest"
    check(out, resumed=True)
    finish_move(out)
    assert tree(out) == whole


def test_a_move_has_no_other_steps(tmp_path, monkeypatch):
    from dpvr.training.output_folder import finish_move

    out = half_moved(tmp_path)
    with monkeypatch.context() as patch:
        kill_before(STEPS_OF_A_MOVE, patch)
        assert finish_move(out)


def test_what_comes_in_the_way_during_a_run_stops_the_move_and_nothing_is_lost(tmp_path):
    from dpvr.training.output_folder import finish_move

    saved(tmp_path / ".saving", NEW)
    write(tmp_path, {"vocab.json": "mine"})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="vocab.json was not written by a training run"):
        finish_move(tmp_path)
    assert tree(tmp_path) == before
    (tmp_path / "vocab.json").unlink()
    assert finish_move(tmp_path) and tree(tmp_path)["vocab.json"] == "y"


@pytest.mark.parametrize("writer", ["write", "safetensors", "torch"])
def test_on_a_full_disk_no_half_folder_is_left_and_its_path_is_said(tmp_path, writer):
    import torch
    from safetensors.torch import save_file

    from dpvr.training.manifests import begin, whole_or_nothing

    weights, folder = {"a": torch.zeros(1000)}, tmp_path / "checkpoint-3"
    ways = {
        "write": lambda: (folder / "a").write_bytes(b"x" * 2000),
        "safetensors": lambda: save_file(weights, folder / "a"),
        "torch": lambda: torch.save(weights, folder / "a"),
    }
    with pytest.raises(OSError, match="checkpoint-3 could not be written .*nothing half written.*Make room"):
        with full_disk(), whole_or_nothing(folder):
            begin(folder, "checkpoint.json")
            ways[writer]()
    assert tree(tmp_path) == {}
