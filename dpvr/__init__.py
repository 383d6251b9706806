"""DPVR's toolkit: everything around the model files that lie beside this folder and go to the Hub.

    minibench, data          ground: rows, prompts, pictures
    analysis, inference      where image tokens saturate; answers, one or many
    training                 what `train_sft.py` is made of
    benchmarks, pretraining, lmms_eval
    reports                  tables and figures, made from results/

Imports run downwards only, and into the model files. The names below are loaded when they are asked for.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "DpvrConfig": "adapter_dpvr",
    "DpvrLlavaConfig": "configuration_dpvr",
    "DpvrLlavaForConditionalGeneration": "modeling_dpvr",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'dpvr' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
