"""What the chat shows under an answer, as HTML: a line with its details, a comparison, a look inside, and notes.

    Readout, Beside -> "First word after 41 ms; without DPVR 63 ms. 0.39 of the compute, same answer", a table within
    Comparison      -> a sentence, both prefills as bars, a table
    TextToImage     -> the pictures with what was looked at in orange, a line per method over the layers

Colours are Okabe and Ito's, told apart with any kind of colour vision; text takes the page's own colours. Each term
with a dotted line is explained when the pointer or the keyboard's focus is on it.

Axes: L layers, N pictures, V image tokens of all of them.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image

from dpvr.analysis.attention import TextToImage
from dpvr.inference.chat import Beside
from dpvr.inference.comparison import Comparison
from dpvr.inference.runs import Readout
from dpvr.inference.ways import NAMES, VANILLA

MATERIAL = 0.05  # of a token's attention: below it a map would show noise
ORANGE = np.array([230, 90, 0]) / 255
OVERLAY_SIDE, STRIP_SIDE = 256, 64
BLUE, GREEN = "#0072b2", "#009e73"
TERMS = {
    "First word": "Time from sending the question to the first token of the answer, pictures included.",
    "compute": "FLOPs of the language model in its pass over the prompt, by the model's cost formula, as a share of "
    "vanilla's. The vision tower costs the same either way and is left out.",
    "Preparing": "Chat template, tokenizer and picture preprocessing.",
    "Encoding pictures": "Vision tower and projector turn pictures into image tokens. The same with and without DPVR.",
    "Prefill": "The language model's pass over the prompt, up to the first token. This is what DPVR shortens.",
    "Each further token": "Mean time of a token after the first.",
    "Keys and values": "What the language model keeps of the conversation in its cache, at the end of the answer. A "
    "latent is read in every deep layer, so it saves no cache; late fusion does.",
    "Prefill, GFLOPs": "By the model's cost formula, not measured.",
    "Image tokens": "What the pictures become for the language model.",
    "Text tokens": "Question, earlier turns and the chat template.",
    "Tokens of the answer": "Counted with the one that ends it.",
}
ROWS: dict[str, Callable[[Readout], float | None]] = {
    "First word": lambda readout: readout.first_token,
    "Preparing": lambda readout: readout.prepare,
    "Encoding pictures": lambda readout: readout.vision,
    "Prefill": lambda readout: readout.prefill,
    "Each further token": lambda readout: readout.decode_per_token,
    "Keys and values": lambda readout: readout.kv_mib,
    "Prefill, GFLOPs": lambda readout: readout.prefill_gflops,
}
UNITS = {"Keys and values": "MiB", "Prefill, GFLOPs": ""}
COUNTS = {
    "Image tokens": lambda readout: readout.image_tokens,
    "Text tokens": lambda readout: readout.text_tokens,
    "Tokens of the answer": lambda readout: readout.new_tokens,
}


def term(name: str) -> str:
    """A term with its explanation, for a pointer or the keyboard."""
    tip = html.escape(TERMS[name])
    return f"<span class='term' tabindex='0' role='note' aria-label='{name}: {tip}' data-tip='{tip}'>{name}</span>"


def digits(value: float | None, unit: str = "ms") -> str:
    """A number with as many digits as a person wants: 41 ms, 6.3 ms, 0.28."""
    if value is None:
        return "–"
    places = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{value:,.{places}f} {unit}".strip()


def show_note(text: str) -> str:
    """A sentence of the app's own under an answer, such as a warning."""
    return f"<p class='note'>{html.escape(text)}</p>"


def show_pictures(paths: Sequence[str]) -> str:
    """The pictures of a question, whole and side by side; each opens by itself in another tab."""
    images = ""
    for number, path in enumerate(paths, 1):
        address = f"gradio_api/file={quote(path)}"
        image = f"<img src='{address}' alt='Picture {number} of the question'>"
        images += f"<a href='{address}' target='_blank' rel='noopener'>{image}</a>"
    return f"<div class='pictures'>{images}</div>"


def show_line(answer: str, readout: Readout, beside: Beside | None = None, *, varies: bool = False) -> str:
    """Return the line under an answer, which opens on its details.

    Args:
        answer, readout: what was answered, and where its time went.
        beside: the same question without DPVR, if it was asked.
        varies: whether the answer was sampled, so that another answer says nothing.
    """
    if beside is None:
        without = " This is the model without DPVR." if readout.routing == VANILLA else ""
        return _details(f"{term('First word')} after <b>{digits(readout.first_token)}</b>.{without}", readout)
    own, vanilla = beside.own, beside.vanilla
    if varies:
        same = ""
    elif answer == beside.text:
        same = ", same answer"
    else:
        same = f"; without DPVR the answer is “{html.escape(beside.text)}”"
    line = (
        f"{term('First word')} after <b>{digits(own.first_token)}</b>; without DPVR {digits(vanilla.first_token)}. "
        f"<b>{own.prefill_gflops / vanilla.prefill_gflops:.2f}</b> of the {term('compute')}{same}"
    )
    return _details(line, own, vanilla)


def _details(line: str, own: Readout, vanilla: Readout | None = None) -> str:
    return f"<details class='line'><summary>{line}</summary>{_figures(own, vanilla)}</details>"


def _figures(own: Readout, vanilla: Readout | None = None) -> str:
    """A table of the readout, or of both and their ratio; what no method changes stands once, below."""
    columns = [NAMES[readout.routing] for readout in (own, vanilla) if readout is not None]
    heads = [*columns, "ratio"] if vanilla is not None else columns
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    rows = ""
    for name, figure in ROWS.items():
        values = [figure(readout) for readout in (own, vanilla) if readout is not None]
        cells = [digits(value, UNITS.get(name, "ms")) for value in values]
        if vanilla is not None:
            cells.append(f"{values[0] / values[1]:.2f}" if values[0] and values[1] else "–")
        rows += f"<tr><th scope='row'>{term(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    counts = ", ".join(f"{term(name)}: {figure(own):,}" for name, figure in COUNTS.items())
    return f"<table class='figures'><tr><td></td>{head}</tr>{rows}</table><p>{counts}.</p>"


def show_comparison(found: Comparison) -> str:
    """Return what was found about the prefill in words, as two bars, and in figures."""
    vanilla, own = found.medians
    name = NAMES[own.routing]
    rows = "".join(
        f"<tr><th scope='row'>{label}</th><td><div class='bar' style='width: {100 * each.prefill / longest:.1f}%; "
        f"background: {colour}'></div></td><td>{digits(each.prefill)}</td></tr>"
        for longest in [max(vanilla.prefill, own.prefill)]
        for label, each, colour in (("vanilla", vanilla, BLUE), (name, own, GREEN))
    )
    kept = own.kv_mib / vanilla.kv_mib if vanilla.kv_mib else 1.0
    shared = f"{term('Encoding pictures')} took {digits(own.vision)} once, for both. " if own.vision else ""
    return (
        f"<section class='card'><h3>With and without DPVR</h3><p>{verdict(found)}</p><p>{agreement(found)}</p>"
        f"<table class='bars'><caption>{term('Prefill')}, median of {found.repetitions} rounds in turn</caption>{rows}"
        f"</table><p>{shared}{term('Keys and values')}: {digits(own.kv_mib, 'MiB')}, {kept:.2f} of vanilla's.</p>"
        "</section>"
    )


def verdict(found: Comparison) -> str:
    """What the interval of the ratio allows to say."""
    estimate, low, high = found.ratio
    interval = f"{low:.2f} to {high:.2f}, 95% interval of {found.repetitions} rounds"
    if not found.ratio.is_narrow:
        said = "too busy to tell how much DPVR saves" if high < 1 else "too busy to tell"
        return f"The machine is {said}: the ratio of the prefill times lies from {interval}."
    if high < 1:
        return f"DPVR's prefill takes <b>{estimate:.2f}</b> of vanilla's time ({interval})."
    if low > 1:
        return f"DPVR is slower here: its prefill takes <b>{estimate:.2f}</b> of vanilla's time ({interval})."
    return f"There is no difference to see: {estimate:.2f} of vanilla's prefill time ({interval})."


def agreement(found: Comparison) -> str:
    """Whether the answers agree, in words."""
    vanilla, own = (html.escape(text) for text in found.texts)
    if found.is_same_answer:
        return f"Both answer “{own}”."
    return f"The answers differ: vanilla says “{vanilla}”, {NAMES[found.medians[1].routing]} “{own}”."


def ratios(comparison: Comparison) -> dict[str, float | None]:
    """Return DPVR's figure over vanilla's, by the readout's names; None where either is missing or zero."""
    vanilla, dpvr = (vars(readout) for readout in comparison.medians)
    return {
        name: dpvr[name] / vanilla[name] if vanilla[name] and dpvr[name] else None
        for name in vanilla
        if name != "routing"
    }


def overlay(picture: torch.Tensor, heat: torch.Tensor, warmest: torch.Tensor | None = None) -> Image.Image:
    """Return a picture, float[3, height, width] from 0 to 1, in grey, with the patches' heat, float[V / N], in orange.

    The warmest patch is full orange, or heat of `warmest`.
    """
    side = round(len(heat) ** 0.5)
    size = (OVERLAY_SIDE, OVERLAY_SIDE)
    seen = Image.fromarray((255 * picture.permute(1, 2, 0).numpy()).round().astype(np.uint8)).resize(size)
    warmth = (heat / (heat.max() if warmest is None else warmest)).reshape(side, side).float().numpy()
    warmth = Image.fromarray((255 * warmth).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    strength = 0.8 * np.asarray(warmth, dtype=np.float32)[..., None] / 255
    grey = np.asarray(seen.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray((255 * (grey * (1 - strength) + ORANGE * strength)).round().astype(np.uint8))


def show_inside(found: dict[str, TextToImage], pictures: torch.Tensor) -> str:
    """Return the pictures under each method, with the layer in which vanilla looks most, and the curve over layers.

    Args:
        found: by routing, vanilla's first.
        pictures: float[N, 3, height, width] from 0 to 1.
    """
    masses = {routing: one.maps.sum((1, 2)) for routing, one in found.items()}  # (L)
    first = next(iter(masses.values()))
    layer = int((first.round(decimals=2) == first.round(decimals=2).max()).nonzero().max())  # the deepest of equals
    figures = "".join(
        _figure(NAMES[routing], masses[routing][layer].item(), one.maps[layer], pictures)
        for routing, one in found.items()
    )
    curves = {NAMES[routing]: mass.tolist() for routing, mass in masses.items()}
    return (
        "<section class='card'><h3>Where the answer's first word looks</h3>"
        f"<p>In layer {layer}, counted from 0, it gives the picture most of its attention without DPVR.</p>"
        f"<div class='looks'>{figures}</div>{_curve(curves)}{_layers(found, masses, pictures)}</section>"
    )


def _figure(name: str, mass: float, maps: torch.Tensor, pictures: torch.Tensor) -> str:
    """The pictures with one method's maps, float[N, V / N]; those that are hardly looked at have none."""
    shares = [heat.sum().item() for heat in maps]
    images = "".join(
        _image(overlay(picture, heat), f"{name}: picture {number}, {share:.0%} of the attention, in orange")
        for number, (picture, heat, share) in enumerate(zip(pictures, maps, shares, strict=True), 1)
        if share >= MATERIAL
    )
    caption = f"<b>{name}</b>: {mass:.0%} of its attention is on the picture"
    if len(maps) > 1:
        said = ", ".join(f"{number}: {share:.0%}" for number, share in enumerate(shares, 1))
        caption = f"<b>{name}</b>: {mass:.0%} of its attention is on the pictures ({said})"
    if min(shares) < MATERIAL:
        what = "no map, as" if max(shares) < MATERIAL else "no map for the others, as"
        caption += f"; {what} less than {MATERIAL:.0%} is too little to show"
    return f"<figure>{images}<figcaption>{caption}.</figcaption></figure>"


def _layers(found: dict[str, TextToImage], masses: dict[str, torch.Tensor], pictures: torch.Tensor) -> str:
    """A table that opens: per layer and method the share, and the maps of all pictures where it is material."""
    head = "".join(f"<th scope='col'>{NAMES[routing]}</th>" for routing in found)
    rows = ""
    for layer in range(len(next(iter(masses.values())))):
        cells = ""
        for routing, one in found.items():
            mass = masses[routing][layer].item()
            strip = _strip(one.maps[layer], pictures, f"{NAMES[routing]}, layer {layer}") if mass >= MATERIAL else ""
            cells += f"<td>{strip}{mass:.0%}</td>"
        rows += f"<tr><th scope='row'>{layer}</th>{cells}</tr>"
    table = f"<table class='layers'><tr><th scope='col'>layer</th>{head}</tr>{rows}</table>"
    return f"<details><summary>Every layer</summary>{table}</details>"


def _strip(maps: torch.Tensor, pictures: torch.Tensor, name: str) -> str:
    """All pictures side by side; the warmest patch of them all is full orange."""
    strip = Image.new("RGB", (STRIP_SIDE * len(maps), STRIP_SIDE))
    for number, (picture, heat) in enumerate(zip(pictures, maps, strict=True)):
        tile = overlay(picture, heat, warmest=maps.max()).resize((STRIP_SIDE, STRIP_SIDE))
        strip.paste(tile, (STRIP_SIDE * number, 0))
    return _image(strip, f"{name}: where it looks, in orange")


def _image(picture: Image.Image, alt: str) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"<img alt='{alt}' src='data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _curve(curves: dict[str, Sequence[float]]) -> str:
    """A line per method over the layers; its label says the same numbers."""
    said = "; ".join(f"{name}: {', '.join(f'{share:.0%}' for share in shares)}" for name, shares in curves.items())
    lines, legend = "", ""
    for (name, shares), colour, dash in zip(curves.items(), (BLUE, GREEN), ("", "6 4"), strict=False):
        step = 290 / max(1, len(shares) - 1)
        points = " ".join(f"{40 + step * index:.1f},{10 + 90 * (1 - share):.1f}" for index, share in enumerate(shares))
        style = f"fill='none' stroke='{colour}' stroke-width='2.5' stroke-dasharray='{dash}'"
        lines += f"<polyline points='{points}' {style}/>"
        legend += f"<li><span style='background: {colour}'></span>{name}</li>"
    last = len(next(iter(curves.values()))) - 1
    return (
        f"<svg class='curve' viewBox='0 0 340 130' role='img' aria-label='Attention on the picture by layer. {said}'>"
        "<path d='M40 10V100H330' fill='none' stroke='currentColor' opacity='.5'/>"
        "<text x='34' y='14' text-anchor='end'>100%</text><text x='34' y='103' text-anchor='end'>0%</text>"
        f"<text x='40' y='118' text-anchor='middle'>0</text><text x='330' y='118' text-anchor='middle'>{last}</text>"
        f"<text x='185' y='122' text-anchor='middle'>layer</text>{lines}</svg><ul class='legend'>{legend}</ul>"
        "<p>Share of the attention of the token that predicts the answer's first word, on the picture, by layer.</p>"
    )
