"""The README's table of dpvr-mini's accuracy, made from the JSON files in `results/dpvr_mini/`.

training.json   from train_sft.py: vanilla, the untrained and the trained side branch
accuracy.json   from minibench.evaluate: the weights in this repository, seeing and blind
    |
README.md, between the marks <!-- accuracy -->

python -m minibench.report
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path("results/dpvr_mini")
MARKS = ("<!-- accuracy -->\n", "<!-- /accuracy -->\n")
NAMES = {"none": "vanilla LLaVA", "late_fusion": "late fusion, trained side branch"}


def render(results: Path = RESULTS) -> str:
    """The table and the records under it, as Markdown."""
    training, accuracy = (_read(results / f"{name}.json") for name in ("training", "accuracy"))
    untrained = next(row for row in training["accuracy"] if row["name"] == "untrained branch")
    kinds = list(untrained["kinds"])
    seeing, blind = ([row for row in accuracy["rows"] if row["blind"] == is_blind] for is_blind in (False, True))
    rows = [(NAMES[row["routing"]], row) for row in seeing]
    rows.insert(1, ("late fusion, untrained side branch", untrained))
    rows += [(f"{NAMES[row['routing']]}, blind", row) for row in blind]
    lines = [
        "| " + " | ".join(["", *kinds, "mean", "95% interval, all questions"]) + " |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for name, row in rows:
        cells = [f"{row['kinds'][kind]['accuracy']:.1%}" for kind in kinds]
        lines.append("| " + " | ".join([name, *cells, f"{row['mean']:.1%}", _interval(row)]) + " |")
    chance = [f"{untrained['kinds'][kind]['chance']:.1%}" for kind in kinds]
    lines.append(
        "| " + " | ".join(["always the most frequent answer", *chance, f"{untrained['chance']:.1%}", ""]) + " |"
    )
    plan = ", ".join(f"{name}={value!r}" for name, value in training["dpvr"].items() if value is not None)
    lines += [
        "",
        f"{accuracy['num_questions']} test questions of each kind, one seed. Config: `{plan}`. "
        f"{training['trainable_parameters']:,} parameters were trained, for {training['train_seconds']:.0f} s.",
        f"Made by `{accuracy['command']}` and `{training['command']}`",
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
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(before + MARKS[0] + render() + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
