"""The block of docs/check.md: what its commands took and gave on dpvr-mini, in new environments (tests/fresh.py)."""

from pathlib import Path

from dpvr.reports.documents import read, table
from dpvr.reports.latents import made_on

GROUP = "minibench_all"
STEPS = {
    "install": "`pip install -r requirements.txt` in a new environment",
    "costs": "cost",
    "fit": "fit, and compare with the base",
    "install lmms-eval": "lmms-eval in an environment of its own",
    "ask the base": "lmms-eval asks the base",
    "ask the latent": "lmms-eval asks the latent",
}


def render_fresh(results: Path) -> str:
    """A row per step with its time, and what was found."""
    document = read(results / "fresh.json")
    seconds, fit = document["seconds"], document["fit"]
    found = {
        "fit": f"of the answers {fit['answers_equal']:.1%} and of their tokens {fit['tokens_equal']:.1%} are the "
        f"base's; KL {fit['kl_to_base']:.3f} nats",
        **{f"ask the {name}": _mean(scores) for name, scores in document["scores"].items()},
    }
    rows = [[text, f"{seconds[step]:.0f} s", found.get(step, "")] for step, text in STEPS.items()]
    note = (
        f"Together {sum(seconds.values()) / 60:.0f} minutes; fitted on {document['samples']} pictures, "
        f"{document['questions']} questions of each task. `{document['command']}`, {made_on(document)}."
    )
    return "\n".join([*table(["step", "time", "found"], rows), "", note]) + "\n"


def _mean(scores: dict[str, float]) -> str:
    """Of lmms-eval's scores, which have the mean under the group's name."""
    return f"{100 * scores[GROUP]:.1f}%, mean of {len(scores) - 1} tasks"
