"""Which block stands in which document, and where the figures go.

results/ --> mini, latency, accuracy, families, latents, front: {block: text} --> documents.fill
         --> pareto, latency_figures: pictures
"""

from pathlib import Path

from dpvr.reports import accuracy, chat, latency, latency_figures, latents, mini, pareto
from dpvr.reports.families import render_families
from dpvr.reports.front import render_front
from dpvr.reports.grid_results import Results

RESULTS, DOCS = Path("results"), Path("docs")


def blocks(results: Path) -> dict[str, dict[str, str]]:
    """{document: {block: text}} of the records in a folder."""
    return {
        "README.md": {"front": render_front(results)},
        "docs/minibench.md": {
            "accuracy": mini.render_accuracy(results),
            "pretraining": mini.render_pretraining(results),
        },
        "docs/chat.md": {"demo": chat.render_demo(results), "unlike": chat.render_unlike(results)},
        "docs/families.md": {"families": render_families(results)},
        "docs/latent.md": {
            "fits": latents.render_fits(results),
            "accuracy": latents.render_accuracy(results),
            "adapted": latents.render_adapted(results),
            "shapes": latents.render_shapes(results),
        },
        "docs/training.md": {"training": mini.render_training(results)},
        "docs/performance.md": {name: render(results) for name, render in latency.PERFORMANCE.items()},
        "docs/accuracy.md": accuracy.blocks(Results(results / "minibench")),
    }


def draw(results: Path, docs: Path) -> list[Path]:
    """Draw every figure, and return the files."""
    grid = Results(results / "minibench")
    return [
        *pareto.draw(grid, results / "minibench"),
        *pareto.draw_by_cost(grid, docs),
        *latency_figures.draw(results, docs),
    ]
