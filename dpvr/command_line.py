"""What the project's commands share: an error of the user's is one message and exit status 2, never a traceback.

    parse_args --Parser: a misspelt option is answered with the nearest one--> main --run: user errors-->

Nothing heavy is imported here or at the top of a command, so `--help` comes at once.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn

USER_ERRORS = (ValueError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a module: its docstring is what `--help` shows, and what is wrong is said in one line."""

    def __init__(self, doc: str | None = None, **options: Any) -> None:
        options = {"prog": program(), "allow_abbrev": False, "formatter_class": HelpFormatter, **options}
        super().__init__(description=doc, **options)

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(unknown_option(unknown, options))
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def program() -> str:
    """How this process was started, for usage and errors: "app.py", "python -m dpvr.reports"."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A docstring as it stands, and the default behind each option's help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=max(80, min(119, get_terminal_size().columns)))

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or action.default is False or "default" in shown:
            return shown
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{shown} (default: {default})".strip()


def at_least(bound: int) -> Callable[[str], int]:
    """The type of an option that is an integer and not below `bound`."""

    def integer(text: str) -> int:
        if int(text) < bound:
            raise argparse.ArgumentTypeError(f"{text} is too small: give {bound} or more")
        return int(text)

    return integer


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields in a YAML file, which a person may have written.

    Raises:
        ValueError: if there is no such file, or it is no YAML of one mapping from names to values.
    """
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"There is no file {str(path)!r}: give the name of a YAML file.")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is no YAML ({' '.join(str(error).split())}): write name: value lines."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(
            f"{str(path)!r} holds {found!r}, and name: value lines are needed: write one for each option."
        )
    return found


def unknown_option(unknown: list[str], known: Iterable[str]) -> str:
    """One line about the first word that is no option: the nearest option, if one is near."""
    first = unknown[0].split("=")[0]
    if not first.startswith("-"):
        return f"unexpected argument {first!r}; --help lists the options"
    nearest = get_close_matches(first, list(known), n=1)
    return f"there is no option {first}; " + (f"did you mean {nearest[0]}?" if nearest else "--help lists the options")


def run(main: Callable[..., Any], *args: Any) -> Any:
    """Run a command and end it at an error of the user's with one message and exit status 2.

    `python -X dev` shows the traceback.
    """
    try:
        return main(*args)
    except USER_ERRORS as error:
        if sys.flags.dev_mode:
            raise
        message = re.sub(r"\s*\n\s*\n\s*", "\n", str(error)).strip()
        print(f"Error: {message or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None
