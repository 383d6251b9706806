"""Checkpoints are whole or refused, belong to one run, and the output folder is checked first."""

import pytest

from tests.test_train_sft import NEEDS_TRAINING, run

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
