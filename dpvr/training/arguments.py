"""The arguments of train_sft.py as TRL reads them: the project's options on TRL's classes."""

from argparse import ArgumentError
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import transformers
from packaging.version import Version
from trl import ModelConfig, SFTConfig, TrlParser

from dpvr.analysis.plan_search import read_plan
from dpvr.command_line import read_fields, unknown_option
from dpvr.training.options import AUTO, BaseOptions, DpvrArguments, RecipeOptions

OLDEST_TRANSFORMERS = "5.18"


@dataclass
class BaseArguments(BaseOptions, ModelConfig):
    """TRL's ModelConfig; LoRA's targets default to all linear layers of the decoder."""


@dataclass
class SideBranchSFTConfig(RecipeOptions, SFTConfig):
    """TRL's SFTConfig with the paper's recipe as defaults."""


class TrainingParser(TrlParser):
    """TRL's parser, whose errors are one line each."""

    def __init__(self) -> None:
        types = (DpvrArguments, SideBranchSFTConfig, BaseArguments)
        super().__init__(types, prog="train_sft.py", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def check(self, fields: dict[str, Any]) -> None:
        """Check the values of a --config as those of flags are; TRL takes them as they stand."""
        for name, value in fields.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None or value is None or isinstance(value, dict):
                continue
            if isinstance(value, list) and action.nargs not in ("+", "*"):
                self.error(f"argument --{name}: one value is needed, not {value!r}")
            for word in map(str, value if isinstance(value, list) else [value]):
                try:
                    self._check_value(action, self._get_value(action, word))
                except ArgumentError as error:
                    self.error(str(error))


def parse(argv: list[str]) -> tuple[DpvrArguments, SideBranchSFTConfig, BaseArguments]:
    """The arguments of a command line and of the file of its --config.

    Raises:
        ValueError: for options that contradict each other.
        ImportError: if transformers is too old to train with.
        SystemExit: 2, with one line, for an option that is not known or has no such value.
    """
    parser = TrainingParser()
    if "--help-all" in argv:
        parser.print_help()
        raise SystemExit(0)
    require_transformers()
    argv = [word for flag in argv for word in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" in argv[-1:]:
        parser.error("--config needs the name of a YAML file")
    if "--config" in argv:
        parser.check(read_fields(argv[argv.index("--config") + 1]))
    args, training, base, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        parser.error(unknown_option(unknown, parser._option_string_actions))
    return with_plan(args, argv), training, base


def require_transformers() -> None:
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"Training needs transformers {OLDEST_TRANSFORMERS} or newer, for TRL's loss on the replies of rows with "
            f"pictures, and this is {transformers.__version__}: pip install 'transformers>={OLDEST_TRANSFORMERS}'. "
            "Loading and generation work with this version."
        )


def with_plan(args: DpvrArguments, flags: list[str]) -> DpvrArguments:
    """The arguments with the fields of --plan, which a --config may have otherwise and a flag may not."""
    plan = read_plan(args.plan) if args.plan else {}
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if twice := [name for name in plan if name in given]:
        raise ValueError(
            f"--{twice[0]} is given on the command line and in the plan {args.plan!r}: leave the flag out, or edit "
            "the file."
        )
    args = replace(args, **plan)
    if args.split_layer not in (None, AUTO):
        if not str(args.split_layer).isdecimal():
            raise ValueError(
                f"--split_layer takes a number of layers, such as 18, or {AUTO}, not {args.split_layer!r}."
            )
        args.split_layer = int(args.split_layer)
    return args
