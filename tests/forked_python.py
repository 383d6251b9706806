"""Python processes with an environment of their own that start at once: forked from one that has its imports done.

Importing torch, transformers, PEFT and TRL takes ten seconds, which a test of what comes then need not wait for.

    ForkedPython(environment) --one line of JSON per program--> this file, run --fork--> the program
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ForkedPython:
    """A Python that has imported the training code with all it needs, and forks.

    Args:
        environment: variables that are read while importing, such as HF_ENDPOINT.
        output: folder for what the programs print.
    """

    def __init__(self, environment: dict[str, str], output: Path) -> None:
        self.output = output
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
        """Run `python *command`, a script, -m or -c, in a folder; stopped by SIGALRM after `timeout` seconds."""
        streams = [str(self.output / name) for name in ("stdout", "stderr")]
        print(json.dumps([command, str(cwd), environment, timeout, *streams]), file=self.parent.stdin, flush=True)
        code = self.parent.stdout.readline()
        assert code, "the process that forks has ended"
        printed = [Path(path).read_text(encoding="utf-8") for path in streams]
        return subprocess.CompletedProcess(command, int(code), *printed)

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait(timeout=60)
        self.parent.stdout.close()


def run_forked(command: list[str], cwd: str, environment: dict[str, str], timeout: int, *streams: str) -> None:
    """In the child: what `python *command` does after its start."""
    signal.alarm(timeout)
    for number, path in zip((0, 1, 2), (os.devnull, *streams), strict=True):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(cwd)
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path[0] = ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = list(command[1:])
        sys.path[0] = cwd
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


def serve() -> None:
    import dpvr.training.run  # noqa: F401

    gc.freeze()  # what is here is not copied by a child's garbage collection
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 0
            try:
                run_forked(*json.loads(line))
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):
                    print(code, file=sys.stderr)
                    code = 1
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # taking down the interpreter takes seconds
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
