"""From samples (saturation.py) to curves by layer, transitions and splits, and the figure of them.

    samples --> medians and quartiles --> transitions of the logit lens --> the paper's split and the causal one
                        |
                  saturation.png, .svg      the three panels of the paper's Figure 2, and image removal

Axes: L layers, H heads.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpvr.analysis.saturation import GRAPHS
from minibench.scoring import wilson_interval

PAPERS_MARGIN = 4  # layers from the split to the transition of image tokens: 18 and 22 of 32
ORANGE, BLUE, GREEN, BLACK = "#D55E00", "#0072B2", "#009E73", "#000000"  # Okabe and Ito's, for the colour-blind


def band(rows: list[list[float]]) -> dict[str, list[float]]:
    """The median and the quartiles over samples, per layer."""
    quartiles = torch.tensor(rows, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    return dict(zip(("q25", "median", "q75"), quartiles.tolist(), strict=True))


def summarise(samples: list[dict[str, Any]], tolerance: float, splits: range) -> dict[str, Any]:
    """The curves, the transitions and the recommended splits, as saturation.json has them.

    Args:
        samples: `saturation.Sample`s as dictionaries, each with its "image_tokens" and "text_tokens".
        tolerance: share of answers that the recommended split may change.
        splits: those that the decoder allows.
    """
    curves = {
        name: {kind: band([sample[name][kind] for sample in samples]) for kind in ("image", "text")}
        for name in ("cosine", "logit_lens_kl", "tuned_lens_kl")
        if samples[0][name]["image"]
    }
    mass = torch.tensor([sample["attention_mass"] for sample in samples], dtype=torch.float64)  # (samples, L, H)
    curves["attention_mass"] = band(mass.mean(-1).tolist()) | {"median_by_head": mass.quantile(0.5, dim=0).tolist()}
    curves["withdrawal"] = {  # image removal, under the name that earlier records have
        graph: band([sample["removal_kl"][graph] for sample in samples])
        | {"changed": _shares([sample["removal_changed"][graph] for sample in samples])}
        for graph in GRAPHS
    }
    transition = {kind: _transition(curves["logit_lens_kl"][kind]["median"]) for kind in ("image", "text")}
    changed = curves["withdrawal"]["text_only"]["changed"]
    return {
        **curves,
        "transition": transition,
        "tolerance": tolerance,
        "papers_split": min(max(splits[0], transition["image"] - PAPERS_MARGIN), splits[-1]),
        "recommended_split": next((split for split in splits if changed[split - 1] <= tolerance), None),
        "image_tokens": statistics.median(sample["image_tokens"] for sample in samples),
        "text_tokens": statistics.median(sample["text_tokens"] for sample in samples),
    }


def summarise_routed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A trained model's own graph compared with its base's, over all samples (`saturation.RoutedSample`)."""
    last = [sample["attention_mass"][-1] / sample["vanilla_mass"][-1] for sample in samples]
    return {
        "shared_cosine": {
            kind: torch.tensor([sample["shared_cosine"][kind] for sample in samples]).amin(0).tolist()
            for kind in ("image", "text")
        },
        "identical": all(sample["identical"] for sample in samples),
        "attention_mass": band([sample["attention_mass"] for sample in samples]),
        "vanilla_mass": band([sample["vanilla_mass"] for sample in samples]),
        "last_layer_ratio": {name: value[0] for name, value in band([[ratio] for ratio in last]).items()},
    }


def _shares(flags: list[list[bool]]) -> list[float]:
    return torch.tensor(flags).double().mean(0).tolist()


def _transition(median: list[float]) -> int:
    """The first layer, from the maximum on, after which the lens's KL is less than half of the maximum."""
    farthest = median.index(max(median))
    return next(layer for layer in range(farthest, len(median)) if median[layer] < max(median) / 2)


def draw(found: dict[str, Any], folder: Path) -> None:
    """The paper's three panels and the image removal curve, as saturation.png and .svg."""
    figure = Figure(figsize=(10, 7), facecolor="white", layout="constrained")
    cosine, attention, lens, removal = figure.subplots(2, 2).flatten()
    for kind, colour, style in (("image", ORANGE, "-"), ("text", BLUE, "--")):
        _curve(cosine, found["cosine"][kind], f"{kind} tokens", colour, style)
        _curve(lens, found["logit_lens_kl"][kind], f"{kind} tokens", colour, style)
        if "tuned_lens_kl" in found:
            _curve(lens, found["tuned_lens_kl"][kind], f"{kind} tokens, tuned lens", colour, ":")
    _curve(attention, found["attention_mass"], "vanilla", ORANGE, "-")
    if "routed" in found:
        _curve(attention, found["routed"]["attention_mass"], found["routed"]["routing"], GREEN, "--")
    _removal_curves(removal, found)
    cosine.set(title="Cosine of a layer's input and output", ylabel="cosine", xlabel="layer")
    attention.set(title="Text-to-image attention", ylabel="share of attention, mean over heads", xlabel="layer")
    lens.set(title="Lens: distance to the final prediction", ylabel="KL to the final layer, nats", xlabel="layer")
    removal.set(title="Image removal", ylabel="share of answers that change", xlabel="layers that see the image")
    for axis in (cosine, attention, lens, removal):
        axis.set(xlim=(-0.5, len(found["attention_mass"]["median"]) - 0.5))
        axis.grid(alpha=0.3)
        if found["recommended_split"] is not None:
            axis.axvline(found["recommended_split"], color="0.3", linestyle=":", label="recommended split")
        axis.legend(fontsize="small")
    save(figure, folder / "saturation")


def _removal_curves(axis: Axes, found: dict[str, Any]) -> None:
    """The share of answers that change at each split, with its 95% interval."""
    names = {"text_only": "text only past the split", "late_fusion": "last layer reads the image"}
    for graph, colour, style in (("text_only", ORANGE, "-"), ("late_fusion", GREEN, "--")):
        shares = found["withdrawal"][graph]["changed"]
        splits = range(1, len(shares) + 1)
        axis.plot(splits, shares, style, color=colour, label=names[graph], marker="o", ms=3)
        edges = [wilson_interval(share * found["num_samples"], found["num_samples"]) for share in shares]
        axis.fill_between(splits, *zip(*edges, strict=True), color=colour, alpha=0.2)
    axis.axhline(found["tolerance"], color="0.5", linewidth=1, label="tolerance")


def layer_table(found: dict[str, Any]) -> str:
    """The medians of each layer, and the share of answers that change when the image is removed after it."""
    lines = [
        f"{'':>5}{'cosine':>16}{'attention':>11}{'lens KL, nats':>16}{'answers changed':>18}",
        f"{'layer':>5}{'image':>8}{'text':>8}{'to image':>11}{'image':>8}{'text':>8}{'by image removal':>18}",
    ]
    changed = [f"{share:.1%}" for share in found["withdrawal"]["text_only"]["changed"]]
    for layer, after in enumerate([*changed, "-"]):
        cosine, lens = (
            "".join(f"{found[name][kind]['median'][layer]:>8.3f}" for kind in ("image", "text"))
            for name in ("cosine", "logit_lens_kl")
        )
        lines.append(f"{layer:>5}{cosine}{found['attention_mass']['median'][layer]:>11.3f}{lens}{after:>18}")
    return "\n".join(lines)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as .png and .svg, the same bytes for the same figure."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _curve(axis: Axes, curve: dict[str, list[float]], name: str, colour: str, style: str) -> None:
    x = range(len(curve["median"]))
    axis.plot(x, curve["median"], style, color=colour, label=name, marker="o", markersize=3)
    axis.fill_between(x, curve["q25"], curve["q75"], color=colour, alpha=0.2, linewidth=0)
