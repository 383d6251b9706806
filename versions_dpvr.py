"""The transformers releases that this code supports, and what differs between them.

older than 4.57.1    refused
4.57                 loading and generation
5.18 to 5.24         training too; 5.24 is the newest release that the tests have run on
newer                used, with one warning
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import transformers
from packaging.version import Version
from transformers.utils import logging

OLDEST, NEWEST_TESTED = "4.57.1", "5.24"
CACHE_NAMES = ("cache", "past_key_values")  # from 5.24 on more and more classes use the first
LINE_4 = Version(transformers.__version__) < Version("5")


def check_transformers(version: str = transformers.__version__) -> None:
    """Warn once if `version` is newer than the newest release tested.

    Raises:
        ImportError: if it is older than the oldest release supported.
    """
    release = Version(version)
    if release < Version(OLDEST):
        raise ImportError(
            f"DPVR needs transformers {OLDEST} or newer, and {version} is installed: pip install -U transformers."
        )
    if release.release[:2] > Version(NEWEST_TESTED).release[:2]:
        logging.get_logger("transformers.dpvr").warning_once(
            f"DPVR was tested up to transformers {NEWEST_TESTED}, and {version} is installed: if something fails, try "
            f"pip install 'transformers<={NEWEST_TESTED}.99'."
        )


@lru_cache(maxsize=256)
def argument_names(function: Callable) -> tuple[str, ...]:
    """The names of a method's arguments after `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def cache_name(function: Callable) -> str:
    """The name of the argument by which a forward method takes its key-value cache."""
    names = argument_names(function)
    return next(name for name in CACHE_NAMES if name in names)


def cache_in(arguments: dict[str, Any]) -> Any:
    """The key-value cache among the arguments of a call, under any of its names, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
