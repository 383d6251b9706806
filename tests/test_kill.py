"""kill.py: a few kills of runs on a very small model; `python -m tests.kill` is the long version."""

import json
import subprocess
import sys
from pathlib import Path

from lines import NEEDS_TRAINING

from tests.kill import STEPS, WINDOWS, compare


@NEEDS_TRAINING
def test_runs_that_are_killed_running_saving_and_moving_end_bit_equal_to_one_that_is_not(random_mini, tmp_path):
    command = [sys.executable, "-m", "tests.kill", "--kills", "3", "--base", random_mini]
    command += ["--output", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["kills"]
    assert [kill["window"] for kill in found["each_kill"]] == list(WINDOWS)
    assert found["each_kill"][2]["left"] == "files moved in part"
    assert found["runs_that_ended_bit_equal"] == found["runs"] and not any(
        one["different"] for one in found["each_run"]
    )


def test_a_difference_in_any_file_or_in_the_curve_is_found(tmp_path):
    def write(name: str) -> Path:
        last = tmp_path / name / f"checkpoint-{STEPS}"
        last.mkdir(parents=True)
        for path in (tmp_path / name / "model.safetensors", last / "optimizer.pt"):
            path.write_bytes(b"abc")
        (tmp_path / name / "training.json").write_text(json.dumps({"log": [{"loss": 1.0}], "time": name}))
        (last / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0}]}))
        return tmp_path / name

    whole, killed = write("whole"), write("killed")
    assert compare(whole, killed) == []
    (killed / f"checkpoint-{STEPS}" / "optimizer.pt").write_bytes(b"abd")
    (killed / "training.json").write_text(json.dumps({"log": [{"loss": 1.5}]}))
    (killed / "more.txt").write_text("")
    assert compare(whole, killed) == ["more.txt", f"checkpoint-{STEPS}/optimizer.pt", "training.json: log"]
