"""Figures of cost, made from the JSON files of dpvr.benchmarks.latency: docs/latency_*.png."""

from pathlib import Path

from matplotlib.figure import Figure

from dpvr.reports.documents import read
from dpvr.reports.latency import NAMES

COLOURS = {  # Okabe and Ito; vanilla is grey, which shows on any background
    "vanilla": "#888888",
    "late_fusion": "#0072B2",
    "early_reading_4": "#009E73",
    "kv_substitution": "#CC79A7",
    "text_only": "#56B4E9",
    "fastv": "#D55E00",
    "random_pruning": "#E69F00",
}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw every figure as a PNG in `folder`, and return the files."""
    paths = []
    for name, plot in (("latency_text", _plot_text), ("latency_kv", _plot_kv), ("latency_roofline", _plot_roofline)):
        figure = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
        plot(figure, results)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _plot_text(figure: Figure, results: Path) -> None:
    """Latency and FLOPs against the length of the text, as ratios to vanilla."""
    record = read(results / "latency" / "text" / "512x32.json")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(
        axes,
        ("prefill_without_tower_ms", "prefill_flops"),
        ("latency on a CPU, language model", "FLOPs, counted"),
        strict=True,
    ):
        for method in dict.fromkeys(row["method"] for row in record["rows"] if row["prefill_ms"] is not None):
            rows = [row for row in record["rows"] if row["method"] == method]
            x, y = [row["text_tokens"] for row in rows], [row["ratio_to_vanilla"][name] for row in rows]
            axis.plot(x, y, color=COLOURS[method], marker="o", label=NAMES[method])
        axis.set(
            title=f"{title}, 512x32",
            xlabel="text tokens",
            ylabel="ratio to vanilla",
            xscale="log",
            ylim=(0, 1.1),
        )
        axis.set_xticks(x, map(str, x))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")


def _plot_kv(figure: Figure, results: Path) -> None:
    """Bytes of keys and values after the prompt, counted for 7B."""
    record = read(results / "latency" / "llava-1.5-7b.json")
    rows = [row for row in record["rows"] if row["method"] != "vanilla_flash"][::-1]
    axis = figure.subplots()
    groups = {"vanilla": "vanilla", "fastv": "fastv", "random_pruning": "fastv"}
    colours = [COLOURS[groups.get(row["method"], "late_fusion")] for row in rows]
    bars = axis.barh([NAMES[row["method"]] for row in rows], [row["kv_bytes"] / 1e6 for row in rows], color=colours)
    axis.bar_label(bars, [f"{row['ratio_to_vanilla']['kv_bytes']:.3f}" for row in rows], padding=3)
    axis.set(
        xlabel="keys and values, MB (figures at the bars: ratio to vanilla)",
        title="LLaVA-1.5-7B, 576 + 128 tokens, bfloat16",
    )
    axis.margins(x=0.1)
    axis.grid(alpha=0.3, axis="x")


def _plot_roofline(figure: Figure, results: Path) -> None:
    """FLOPs a second that each method reached, under what the machine reaches in large products."""
    record = read(results / "latency" / "512x32.json")
    axis, speed = figure.subplots(), record["machine_speed"]
    roof = [0.1, speed["flops_per_second"] / speed["bytes_per_second"], 3000]
    axis.plot(roof, [min(speed["flops_per_second"], x * speed["bytes_per_second"]) / 1e9 for x in roof], color="0.5")
    for row in record["rows"]:
        if row["method"] not in COLOURS or row["prefill_ms"] is None:
            continue
        times = {"prefill": row["prefill_without_tower_ms"], "decode": row["decode_ms_per_token"]}
        for name, marker in (("prefill", "o"), ("decode", "s")):
            flops, label = row[f"{name}_flops"], NAMES[row["method"]] if name == "prefill" else None
            place = (flops / row[f"{name}_bytes"], flops / times[name] / 1e6)
            axis.scatter(*place, color=COLOURS[row["method"]], marker=marker, label=label, zorder=3)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte of weights, keys and values", ylabel="GFLOP/s")
    axis.set_title("512x32 on a CPU: squares are decoded tokens, circles prefills, the line what the machine reaches")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
