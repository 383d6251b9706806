"""What the app shows: readouts and comparisons as HTML, attention as pictures and curves.

    Readout -> bar of stages, table of figures        Comparison -> two answers, two columns and their ratio
    TextToImage -> the picture with what was looked at in orange, a row per layer for the curve

Colours are Okabe and Ito's, told apart with any kind of colour vision; text takes the page's own colours.

Axes: V image tokens of a picture.
"""

import html
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpvr.analysis.attention import TextToImage
from dpvr.inference.chat import Comparison, Readout

STAGES = {
    "prepare": ("Preparing", "#999999"),
    "vision": ("Vision encoding", "#56b4e9"),
    "prefill": ("Prefill", "#e69f00"),
    "decode": ("Decoding", "#009e73"),
}
FIGURES = {
    "first_token": ("Time to first token, ms", "{:.1f}"),
    "prepare": ("Preparing, ms", "{:.1f}"),
    "vision": ("Vision encoding, ms", "{:.1f}"),
    "prefill": ("Prefill, ms", "{:.1f}"),
    "decode_per_token": ("Per decoded token, ms", "{:.1f}"),
    "tokens_per_second": ("Decoded tokens/s", "{:.1f}"),
    "kv_mib": ("K/V cache, MiB", "{:.2f}"),
    "prefill_gflops": ("Prefill by formula, GFLOPs", "{:.2f}"),
    "image_tokens": ("Image tokens", "{}"),
    "text_tokens": ("Text tokens", "{}"),
    "new_tokens": ("Answered tokens", "{}"),
}
ORANGE = np.array([230, 90, 0]) / 255
OVERLAY_SIDE = 384
CSS = """
.stages {display: flex; height: 1.25rem; border-radius: 4px; overflow: hidden; margin: .25rem 0}
.legend {display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .25rem 0; list-style: none}
.legend span {display: inline-block; width: .75rem; height: .75rem; margin-right: .35rem; border-radius: 2px}
.figures {width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums}
.figures tr, .figures th, .figures td {border: 0 !important; text-align: right; font-weight: normal}
.figures th, .figures td {border-bottom: 1px solid var(--border-color-primary) !important; padding: .15rem .35rem}
.figures th[scope=row] {text-align: left}
.figures td {white-space: nowrap}
.answer {white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem; border-radius: 4px;
         background: var(--background-fill-secondary)}
.answers {display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .75rem; margin: .5rem 0}
"""


def show_readout(readout: Readout) -> str:
    """Return the bar of stages and the table of figures."""
    rows = "".join(
        f"<tr><th scope='row'>{label}</th><td>{_figure(readout, name)}</td></tr>"
        for name, (label, _) in FIGURES.items()
    )
    return f"{show_stages(readout)}<table class='figures'>{rows}</table>"


def show_stages(readout: Readout) -> str:
    """Return a bar of where the time went, with a legend that says the same in words."""
    times = {name: vars(readout)[name] for name in STAGES}
    total = sum(times.values())
    words = {name: f"{STAGES[name][0]} {time:.1f} ms, {time / total:.0%}" for name, time in times.items()}
    parts = "".join(
        f"<div style='width: {100 * time / total:.2f}%; background: {STAGES[name][1]}' title='{words[name]}'></div>"
        for name, time in times.items()
    )
    legend = "".join(f"<li><span style='background: {STAGES[name][1]}'></span>{words[name]}</li>" for name in STAGES)
    label = "; ".join(words.values())
    return f"<div class='stages' role='img' aria-label='{label}'>{parts}</div><ul class='legend'>{legend}</ul>"


def _figure(readout: Readout, name: str) -> str:
    value = vars(readout)[name]
    return "–" if value is None else FIGURES[name][1].format(value)


def show_comparison(comparison: Comparison) -> str:
    """Return both answers beside each other, both bars, and a table with the ratio of the medians."""
    names = ("Vanilla", f"DPVR, {comparison.medians[1].routing}")
    answers = "".join(
        f"<section><h3>{name}</h3><div class='answer'>{html.escape(text)}</div>{show_stages(readout)}</section>"
        for name, text, readout in zip(names, comparison.texts, comparison.medians, strict=True)
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("vanilla", "DPVR", "ratio"))
    rows = "".join(
        f"<tr><th scope='row'>{label}</th>"
        + "".join(f"<td>{_figure(readout, name)}</td>" for readout in comparison.medians)
        + f"<td>{_ratio(comparison, name)}</td></tr>"
        for name, (label, _) in FIGURES.items()
    )
    return (
        f"<div class='answers'>{answers}</div><table class='figures'><tr><td></td>{head}</tr>{rows}</table>"
        f"<p>Medians of {comparison.repetitions} warm repetitions of each, in turn, on the same weights. The ratio is "
        "DPVR's to vanilla's.</p>"
    )


def _ratio(comparison: Comparison, name: str) -> str:
    ratio = ratios(comparison)[name]
    return "–" if ratio is None else f"{ratio:.2f}"


def ratios(comparison: Comparison) -> dict[str, float | None]:
    """Return DPVR's median over vanilla's for every figure, None where either is missing or zero."""
    vanilla, dpvr = (vars(readout) for readout in comparison.medians)
    return {name: dpvr[name] / vanilla[name] if vanilla[name] and dpvr[name] else None for name in FIGURES}


def overlay(picture: torch.Tensor, heat: torch.Tensor) -> Image.Image:
    """Return a picture, float[3, height, width] from 0 to 1, in grey, with the patches' heat, float[V], in orange.

    The warmest patch is full orange: heat is relative to it.
    """
    side = round(len(heat) ** 0.5)
    size = (OVERLAY_SIDE, OVERLAY_SIDE)
    seen = Image.fromarray((255 * picture.permute(1, 2, 0).numpy()).round().astype(np.uint8)).resize(size)
    warmth = (heat / heat.max().clamp(min=1e-12)).reshape(side, side).float().numpy()
    warmth = Image.fromarray((255 * warmth).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    strength = 0.8 * np.asarray(warmth, dtype=np.float32)[..., None] / 255
    grey = np.asarray(seen.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray((255 * (grey * (1 - strength) + ORANGE * strength)).round().astype(np.uint8))


def curve(attention: dict[str, TextToImage]) -> dict[str, list[Any]]:
    """Return the columns layer, share and routing of the text's attention to the picture."""
    rows = [(layer, mass, name) for name, found in attention.items() for layer, mass in enumerate(found.mass)]
    return dict(zip(("layer", "share", "routing"), map(list, zip(*rows, strict=True)), strict=True))
