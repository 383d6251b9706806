"""The tables of docs/limits.md: plans beside vanilla on what is harder than what was fitted, and the fallback.

results/limits.json      python -m dpvr.benchmarks.limits      --> limits, places
results/fallback.json    python -m dpvr.benchmarks.fallback    --> signals, fallback
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from dpvr.benchmarks.limit_sets import SPLIT
from dpvr.reports.accuracy import points
from dpvr.reports.documents import COVERED, read, table
from dpvr.reports.latents import made_on

PLACES = (0, 4, 8, 16, 24, 1_000)  # of a reply's tokens, that rows are made of


def blocks(results: Path) -> dict[str, str]:
    """{block: text} of docs/limits.md."""
    limits, fallback = read(results / "limits.json"), read(results / "fallback.json")
    return {
        "limits": _limits(limits),
        "places": _places(limits),
        "signals": _signals(fallback),
        "fallback": _fallback(fallback),
    }


def _limits(document: dict[str, Any]) -> str:
    """A row per level: vanilla's score, and of each plan the difference to it and the replies that are equal."""
    models = [model["name"] for model in document["models"] if model["name"] != "vanilla"]
    levels = dict.fromkeys((row["situation"], row["level"]) for row in document["rows"])
    found = {(row["situation"], row["level"], row["model"]): row for row in document["rows"]}
    rows = []
    for situation, level in levels:
        plans = [found[situation, level, model] for model in models]
        cells = [f"{points(row['minus_vanilla'])}; {row['equal']:.0%}" for row in plans]
        rows.append([situation, level, f"{100 * found[situation, level, 'vanilla']['score']:.1f}", *cells])
    costs = {model["name"]: model["prefill_flops"] for model in document["models"]}
    header = ["", "", "vanilla, %", *(f"{name}, {costs[name]:.3f}" for name in models)]
    image, text = (document["prompt"][name] for name in ("image_tokens", "text_tokens"))
    note = (
        f"dpvr-mini, {document['limit']} questions of each level, {SPLIT} split. Of each plan: prefill FLOPs of a "
        f"prompt of {image} image and {text} text tokens as a share of vanilla's, points to vanilla on the same "
        f"questions (95%), and the share of replies that are vanilla's. {COVERED} {_made_by(document)}"
    )
    return "\n".join([*table(header, rows), "", note]) + "\n"


def _places(document: dict[str, Any]) -> str:
    """A row per model: at which share of the places of vanilla's replies it would go on as vanilla does."""
    rows = []
    for model in document["models"]:
        cells = []
        for first, end in pairwise(PLACES):
            found = document["next_token_equal"][model["name"]][first:end]
            cells.append(f"{sum(same for same, _ in found) / sum(of for _, of in found):.1%}" if found else "")
        rows.append([model["name"], *cells])
    names = [f"tokens {first + 1} to {end}" for first, end in pairwise(PLACES[:-1])]
    return "\n".join(table(["", *names, f"from {PLACES[-2] + 1} on"], rows)) + "\n"


def _signals(document: dict[str, Any]) -> str:
    """How well each signal tells the replies that are not vanilla's."""
    rows = [
        [name, *(f"{found[split]:.3f}" for split in ("validation", "test"))]
        for name, found in document["auroc"].items()
    ]
    return "\n".join(table(["signal of the reply's tokens", "AUROC, validation", "AUROC, test"], rows)) + "\n"


def _fallback(document: dict[str, Any]) -> str:
    """The plan alone, with a fallback by its best signal at each tolerated share, and plans of later splits."""
    signal = best_signal(document)
    latent = [
        f"{document['prefill_flops']:.3f}",
        f"{document['differ']['test']:.1%}",
        "",
        _elsewhere(document["differ"]),
    ]
    rows = [["the latent alone", "", *latent]]
    for row in document["fallbacks"]:
        if row["signal"] == signal:
            test, differ = row["on"]["test"], {name: found["differ"] for name, found in row["on"].items()}
            cells = [
                f"{test['prefill_flops']:.3f}",
                f"{test['differ']:.1%}",
                f"{test['again']:.1%}",
                _elsewhere(differ),
            ]
            rows.append(["with the fallback", f"{row['tolerated']:.1%}", *cells])
    for plan in document["plans"]:
        rows.append(
            [f"latent at split {plan['split']}", "", f"{plan['prefill_flops']:.3f}", f"{plan['differ']:.1%}", "", ""]
        )
    header = ["", "tolerated", "prefill FLOPs", "replies that differ", "made again", "differ elsewhere, at worst"]
    questions = document["questions"]
    note = (
        f"dpvr-mini, {questions['test']:,} replies to test questions; thresholds from {questions['validation']:,} to "
        f"validation questions. The signal is the {signal}. *Elsewhere* are the levels of small digits, crowded and "
        f"other pictures above, with the same thresholds. {_made_by(document)}"
    )
    return "\n".join([*table(header, rows), "", note]) + "\n"


def best_signal(document: dict[str, Any]) -> str:
    """The signal that tells differing replies best on validation questions."""
    return max(document["auroc"], key=lambda name: document["auroc"][name]["validation"])


def _elsewhere(differ: dict[str, float]) -> str:
    name = max((name for name in differ if name not in ("validation", "test")), key=differ.__getitem__)
    return f"{differ[name]:.1%} ({name})"


def _made_by(document: dict[str, Any]) -> str:
    return f"`{document['command']}`, {made_on(document)}."
