"""Checkpoints are whole or refused, belong to one run, and the output folder is checked first."""

from pathlib import Path

import pytest
from full_disk import full_disk
from lines import NEEDS_TRAINING

from tests.test_train_sft import run

SHORT = ["--eval_questions", "0", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]


@pytest.fixture
def folder(tmp_path):
    from dpvr.training.checkpoints import write_manifest

    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
            (path / name).write_bytes(b"0123456789")
        write_manifest(path, {"seed": 1})
    return tmp_path


@NEEDS_TRAINING
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "changed"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "checkpoint.json"]
)
def test_the_next_older_checkpoint_is_taken_where_the_newest_is_damaged(folder, capsys, name, harm):
    from dpvr.training.checkpoints import find_checkpoint

    assert find_checkpoint("last", str(folder)).endswith("checkpoint-2")
    path = folder / "checkpoint-2" / name
    content = path.read_bytes()
    harmed = {"empty": b"", "truncated": content[:5], "changed": b"X" + content[1:]}
    path.unlink() if harm == "missing" else path.write_bytes(harmed[harm])
    assert find_checkpoint("last", str(folder)).endswith("checkpoint-1")
    assert "checkpoint-2 is not whole: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"checkpoint-2 is not whole: .*{name}.*start anew"):
        find_checkpoint(str(folder / "checkpoint-2"), str(folder))


@NEEDS_TRAINING
@pytest.mark.parametrize("method", ["dpvr", "lora", "full"])
def test_every_method_goes_on_from_the_older_whole_checkpoint_and_not_from_another_runs(random_mini, tmp_path, method):
    options = [*SHORT, "--method", method]
    first = run(random_mini, tmp_path / "out", *options)
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text("")
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    again = run(random_mini, tmp_path / "out", *options, "--resume_from_checkpoint", "last")
    assert again["resumed_from"] == "checkpoint-1"
    assert again["log"] == first["log"]
    for other, what in (["--seed", "7"], "seed was"), (["--learning_rate", "0.5"], "recipe.learning_rate was"):
        with pytest.raises(ValueError, match=f"another run: .*{what}"):
            run(random_mini, tmp_path / "out", *options, *other, "--resume_from_checkpoint", "last")


@NEEDS_TRAINING
@pytest.mark.parametrize("inside", [False, True])
def test_an_output_folder_that_cannot_be_one_is_refused_before_anything_is_read(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out" if inside else tmp_path / "file"
    with pytest.raises(ValueError, match="--output_dir .*file.* cannot be written to"):
        run("no/such-base", out)
    assert (tmp_path / "file").read_text() == "mine"


@NEEDS_TRAINING
@pytest.mark.parametrize("method", ["dpvr", "lora", "full"])
def test_a_run_that_had_trained_all_its_steps_is_saved_without_another_step(random_mini, tmp_path, method):
    """As after a kill in the last save: there are more rows than steps."""
    out, options = tmp_path / "out", [*SHORT, "--method", method]
    first = run(random_mini, out, *options)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    for path in before:
        if path.parent == out:
            path.unlink()
    again = run(random_mini, out, *options, "--resume_from_checkpoint", "last")
    assert again["resumed_from"] == "checkpoint-3" and again["log"] == first["log"] and len(first["log"]) == 3
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before


@NEEDS_TRAINING
def test_another_run_is_refused_before_rows_are_read_and_other_rows_before_anything_is_scored(
    random_mini, tmp_path, monkeypatch
):
    from dpvr.training import run as training
    from dpvr.training import scores

    resumed = ["--resume_from_checkpoint", "last"]
    run(random_mini, tmp_path / "out", *SHORT)

    def read(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(scores, "evaluate", read)
    with pytest.raises(ValueError, match="another run: data.fingerprint was"):
        run(random_mini, tmp_path / "out", *SHORT, *resumed, "--num_rows", "20", "--eval_questions", "2")
    for name in ("load_processor", "load_rows", "load_model"):
        monkeypatch.setattr(training, name, read)
    others = (["--seed", "7"], ["--max_steps", "5"], ["--method", "lora"], ["--optim", "sgd"], ["--max_length", "90"])
    for other in others:
        with pytest.raises(ValueError, match="was saved by another run: "):
            run(random_mini, tmp_path / "out", *SHORT, *other, *resumed)
    with pytest.raises(ValueError, match="The checkpoint has the layer plan"):
        run(random_mini, tmp_path / "out", *SHORT, "--split_layer", "1", *resumed)


@NEEDS_TRAINING
@pytest.mark.parametrize("method", ["dpvr", "lora", "full"])
@pytest.mark.parametrize(("saving", "where"), [("steps", "checkpoint-1"), ("no", ".saving")])
def test_on_a_full_disk_a_run_says_where_and_leaves_nothing_half_written(random_mini, tmp_path, method, saving, where):
    options, out = [*SHORT, "--save_strategy", saving, "--method", method, "--lora_r", "64"], tmp_path / "out"
    with pytest.raises(OSError, match=f"{where} could not be written .*too large.*nothing half written was left"):
        with full_disk(100_000):  # bytes of a file, less than the weights have
            run(random_mini, out, *options)
    assert list(out.iterdir()) == []
    assert Path(run(random_mini, out, *options) and out / "training.json").exists()


@NEEDS_TRAINING
@pytest.mark.parametrize("method", ["dpvr", "lora", "full"])
def test_every_file_that_a_run_saves_is_refused_where_no_run_has_written_it(random_mini, tmp_path, method):
    from dpvr.training.used_folders import IN_THE_WAY, check_output_folder

    out = tmp_path / "out"
    run(random_mini, out, *SHORT, "--method", method, "--save_strategy", "no")
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) > 5 and IN_THE_WAY
    for name in files:
        other = tmp_path / name.as_posix().replace("/", "-")
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text("mine")
        with pytest.raises(ValueError, match="move it away"):
            check_output_folder(str(other), "me/base", resumed=False, overwrite=False)
