"""The README's table of dpvr-mini's accuracy, made from the JSON files in `results/dpvr_mini/`.

results/dpvr_mini/{accuracy,blind,training}.json  ->  README.md, between the marks <!-- accuracy -->

python -m minibench.report
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path("results/dpvr_mini")
MARKS = ("<!-- accuracy -->\n", "<!-- /accuracy -->\n")


def render(results: Path = RESULTS) -> str:
    """The table and the records under it, as Markdown."""
    accuracy, blind, training = (_read(results / f"{name}.json") for name in ("accuracy", "blind", "training"))
    rows = [*accuracy["rows"], *blind["rows"]]
    kinds = list(rows[0]["kinds"])
    lines = [
        "| " + " | ".join(["on test pictures", *kinds, "mean", "95% interval, all questions"]) + " |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for row in rows:
        cells = [f"{row['kinds'][kind]['accuracy']:.1%}" for kind in kinds]
        lines.append("| " + " | ".join([row["name"], *cells, f"{row['mean']:.1%}", _interval(row)]) + " |")
    chance = [f"{rows[0]['kinds'][kind]['chance']:.1%}" for kind in kinds]
    lines.append("| " + " | ".join(["most frequent answer", *chance, f"{rows[0]['chance']:.1%}", ""]) + " |")
    plan = " ".join(f"{name}={value!r}" for name, value in training["dpvr"].items() if value is not None)
    lines += [
        "",
        f"{rows[0]['kinds'][kinds[0]]['n']} questions of each kind. `{plan}`; {training['trainable_parameters']:,} "
        f"parameters trained for {training['train_seconds']:.0f} s.",
        f"Made by `{accuracy['command']}`, `{blind['command']}` and `{training['command']}`",
        f"on {accuracy['hardware']}, torch {accuracy['versions']['torch']}, "
        f"transformers {accuracy['versions']['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.1%} to {row['high']:.1%}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def between_marks(readme: str) -> str:
    """What stands in the README between the marks."""
    return readme.split(MARKS[0])[1].split(MARKS[1])[0]


def main() -> None:
    path = Path("README.md")
    readme = path.read_text(encoding="utf-8")
    path.write_text(readme.replace(between_marks(readme), render()), encoding="utf-8")


if __name__ == "__main__":
    main()
