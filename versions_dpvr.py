"""The transformers releases that this code is for, and what differs between them.

    4.57 (loading and generation) … 5.24, the newest that the tests have run on

A newer release is tried, with one warning; an older one is refused. What the project needs to know of a release beyond
its public classes stands here and nowhere else.

Every file of the project that goes to the Hub imports its neighbours twice: `from .x import y` is how the Hub's loader
finds them, `from x import y` how a script in this folder does.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import transformers
from packaging.version import Version
from transformers.utils import logging

OLDEST, NEWEST_TESTED = "4.57.1", "5.24"
CACHE_NAMES = ("cache", "past_key_values")  # from 5.24 on one class after the other takes the first
LINE_4 = Version(transformers.__version__) < Version("5")  # crops a cache to a length; its layers may return tuples


def check_transformers(version: str = transformers.__version__) -> None:
    """Warn of a release newer than the newest tested one, once.

    Raises:
        ImportError: for a release older than the oldest supported one.
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
    """What a forward method calls its key-value cache."""
    names = argument_names(function)
    return next(name for name in CACHE_NAMES if name in names)


def cache_in(arguments: dict[str, Any]) -> Any:
    """The key-value cache among the arguments of a call, under either name, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
