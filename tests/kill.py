"""Kill training runs at random, go on with each, and compare with the run that nobody killed.

    python -m tests.kill --kills 20

A run is a fork of this process, which has the imports done: what `python train_sft.py` does after its own. It starts
in a folder that holds another run's model. Each is killed by SIGKILL

    running   at a moment anywhere in it
    saving    in the instants in which a checkpoint is written
    moving    between two of the steps in which the saved files are put in place of the other run's

then continued with --resume_from_checkpoint last (begun again, if no checkpoint was whole), perhaps killed once more,
and in the end compared: every file, the last checkpoint's optimizer and random state included, and the loss curve, bit
by bit. Written to the section "kills" of results/reliability.json. 20 kills take 5 to 8 minutes on one core.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpvr.command_line import Parser, at_least, run

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = ("running", "saving", "moving")
STEPS, SAVE_STEPS = 7, 2
OPTIONS = ["--data", "minibench", "--num_rows", "32", "--per_device_train_batch_size", "4", "--eval_questions", "0"]
OPTIONS += ["--use_cpu", "true", "--max_steps", str(STEPS), "--logging_steps", "3", "--save_strategy", "steps"]
OPTIONS += ["--save_steps", str(SAVE_STEPS), "--save_total_limit", "2", "--side_branch_init", "random"]
# of the process and not of what was trained: paths and times are in them
OF_THE_PROCESS = ("training_args.bin", "checkpoint.json", "training.json", "trainer_state.json", "saved.sha256")


def parse_args(argv: list[str] | None = None) -> Any:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=at_least(1), default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--base", default=str(ROOT), help="what is trained; default: dpvr-mini")
    parser.add_argument("--output", default=str(ROOT / "results" / "reliability.json"))
    return parser.parse_args(argv)


def main(args: Any) -> dict[str, Any]:
    """Returns the section.

    Raises:
        ValueError: if a run did not end as the one that nobody killed.
    """
    import torch

    import dpvr.training.run  # noqa: F401  before the forks
    from dpvr.record import publish_section, run_record

    torch.set_num_threads(1)  # sums in one order
    with tempfile.TemporaryDirectory() as folder:
        kills, runs = _kill_all(args, Path(folder))
    different = [one["different"] for one in runs if one["different"]]
    found = {
        **run_record("-m tests.kill"),
        "kills": len(kills),
        "runs": len(runs),
        "runs_that_ended_bit_equal": len(runs) - len(different),
        "steps": STEPS,
        "save_steps": SAVE_STEPS,
        "each_kill": kills,
        "each_run": runs,
    }
    publish_section("kills", found, args.output)
    if different:
        raise ValueError(f"{len(different)} runs did not end as the one that nobody killed: {different}")
    print(f"{len(kills)} kills in {len(runs)} runs; every run ended bit-equal to the one that nobody killed.")
    return found


def _kill_all(args: Any, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    moments, kills, runs = random.Random(args.seed), [], []
    earlier, whole = folder / "earlier", folder / "whole"
    _finish(_start(args.base, earlier, ["--seed", "5", "--save_strategy", "no"]), earlier)
    shutil.copytree(earlier, whole)
    begun = time.perf_counter()
    _finish(_start(args.base, whole, ["--overwrite_output_dir"]), whole)
    seconds = time.perf_counter() - begun
    progress = tqdm(total=args.kills, desc="kills")
    while len(kills) < args.kills:
        killed = folder / f"run-{len(runs)}"
        shutil.copytree(earlier, killed)
        here = 0
        while len(kills) < args.kills and (here == 0 or moments.random() < 0.5):
            window = WINDOWS[len(kills) % len(WINDOWS)]
            kill = _kill_once(args.base, killed, window, seconds, moments)
            if kill is None:
                break
            kills.append({"run": len(runs), **kill})
            here += 1
            progress.update()
        _finish(_start(args.base, killed, _how_to_go_on(killed)), killed)
        runs.append({"kills": here, "different": compare(whole, killed)})
        shutil.rmtree(killed)
    return kills, runs


def _how_to_go_on(folder: Path) -> list[str]:
    if list(folder.glob("checkpoint-*/checkpoint.json")):
        return ["--resume_from_checkpoint", "last"]
    return ["--overwrite_output_dir"]


def _kill_once(base: str, folder: Path, window: str, seconds: float, moments: random.Random) -> dict[str, Any] | None:
    """Start or continue a run and kill it; returns where, and what it left, None if it had ended before."""
    how = _how_to_go_on(folder)
    saved = len([path for path in folder.iterdir() if path.is_file()])
    kill_at_move = moments.randint(1, saved) if window == "moving" else None
    child = _start(base, folder, how, kill_at_move)
    if window == "running":
        time.sleep(moments.uniform(0, seconds))
    elif window == "saving":
        before = set(folder.glob("checkpoint-*/checkpoint.json"))
        step = moments.choice(range(SAVE_STEPS, STEPS + 1, SAVE_STEPS))
        after = [folder / f"checkpoint-{later}" for later in range(step, STEPS + 1)]
        while not any(path.exists() and path / "checkpoint.json" not in before for path in after) and _runs(child):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.03))
    if window != "moving" and _runs(child):
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        _check(status, folder)
        return None
    return {"window": window, "started_with": how[0], "left": _what_is_left(folder)}


def _runs(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _what_is_left(folder: Path) -> str:
    if (folder / ".saving" / "saved.sha256").exists():
        return "files moved in part"
    if (folder / ".saving").exists():
        return "a save in part"
    if list(folder.glob("checkpoint-*/checkpoint.json.part")):
        return "a checkpoint in part"
    return "whole checkpoints" if list(folder.glob("checkpoint-*")) else "no checkpoint"


def _start(base: str, folder: Path, options: list[str], kill_at_move: int | None = None) -> int:
    """Fork a run; it kills itself before the move of the file of that number. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_at_move is not None:
            _kill_at_move(folder, kill_at_move)
        sys.argv = ["train_sft.py", "--model_name_or_path", base, "--output_dir", str(folder), *OPTIONS, *options]
        import train_sft

        train_sft.main(*train_sft.parse_args())
        code = 0
    except BaseException:  # a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_at_move(folder: Path, number: int) -> None:
    moved = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal moved
        if event == "os.rename" and Path(arguments[0]).is_relative_to(folder / ".saving"):
            moved += not Path(arguments[1]).is_relative_to(folder / ".saving")
            if moved == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _finish(child: int, folder: Path) -> None:
    _check(os.waitpid(child, 0)[1], folder)


def _check(status: int, folder: Path) -> None:
    if status != 0:
        raise ValueError(f"A run failed that nobody killed: {folder.with_suffix('.log').read_text()[-2000:]}")


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two folders of runs: names of files, and of the parts of their records."""
    files = [{path.relative_to(one).as_posix(): path for path in one.rglob("*")} for one in (whole, killed)]
    different = sorted(files[0].keys() ^ files[1].keys())
    for name in sorted(files[0].keys() & files[1].keys()):
        paths = [one[name] for one in files]
        if paths[0].is_file() and paths[0].name not in OF_THE_PROCESS:
            different += [name] * (paths[0].read_bytes() != paths[1].read_bytes())
    for name, part in (("training.json", "log"), (f"checkpoint-{STEPS}/trainer_state.json", "log_history")):
        logs = [json.loads((one / name).read_text(encoding="utf-8"))[part] for one in (whole, killed)]
        different += [f"{name}: {part}"] * (logs[0] != logs[1] or not logs[0])
    return different


if __name__ == "__main__":
    run(lambda: main(parse_args()))
