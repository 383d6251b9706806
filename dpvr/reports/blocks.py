"""Which block stands in which document, and where the figures go.

results/ --> mini, latency, accuracy, families, latents, limits, frontier, serving, ...: {block: text} --> fill
         --> pareto, frontier, latency_figures, dpvr.analysis: pictures
"""

from pathlib import Path

from dpvr.analysis import curves
from dpvr.analysis.plan_report import draw_frontier
from dpvr.reports import accuracy, chat, frontier, latency, latency_figures, latents, limits, mini, pareto
from dpvr.reports.documents import read
from dpvr.reports.families import render_families
from dpvr.reports.fresh import render_fresh
from dpvr.reports.front import render_front
from dpvr.reports.grid_results import Results
from dpvr.reports.serving import render_benchmark

RESULTS, DOCS = Path("results"), Path("docs")


def blocks(results: Path) -> dict[str, dict[str, str]]:
    """{document: {block: text}} of the records in a folder."""
    return {
        "README.md": {"front": render_front(results)},
        "docs/minibench.md": {
            "accuracy": mini.render_accuracy(results),
            "pretraining": mini.render_pretraining(results),
        },
        "docs/check.md": {"fresh": render_fresh(results)},
        "docs/chat.md": {"demo": chat.render_demo(results), "unlike": chat.render_unlike(results)},
        "docs/families.md": {"families": render_families(results)},
        "docs/latent.md": {
            "fits": latents.render_fits(results),
            "accuracy": latents.render_accuracy(results),
            "adapted": latents.render_adapted(results),
            "adapted_seeds": latents.render_adapted_seeds(results),
            "shapes": latents.render_shapes(results),
            "fit_time": latents.render_fit_time(results),
            **frontier.blocks(results),
        },
        "docs/training.md": {
            "training": mini.render_training(results),
            "training_models": mini.render_family_training(results),
        },
        "docs/limits.md": limits.blocks(results),
        "docs/performance.md": {name: render(results) for name, render in latency.PERFORMANCE.items()},
        "docs/serving.md": {"serving": render_benchmark(results)},
        "docs/accuracy.md": accuracy.blocks(Results(results / "minibench")),
    }


def draw(results: Path, docs: Path) -> list[Path]:
    """Draw every figure, and return the files."""
    grid, saturation = Results(results / "minibench"), results / "saturation"
    curves.draw(read(saturation / "saturation.json"), saturation)
    draw_frontier(read(saturation / "plans.json"), saturation)
    return [
        *pareto.draw(grid, results / "minibench"),
        *frontier.draw(results, docs),
        *latency_figures.draw(results, docs),
        *(saturation / f"{name}.{kind}" for name in ("saturation", "plan_frontier") for kind in ("png", "svg")),
    ]
