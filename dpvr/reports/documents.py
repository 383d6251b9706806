"""What the reports share: a record read, a table in Markdown, and blocks put into a document.

    results/*.json --read--> a module's render functions --> {block: text} --fill--> the document

A block stands between marks such as <!-- accuracy --> and <!-- /accuracy -->.
"""

import json
from pathlib import Path
from typing import Any

COVERED = "Intervals cover the choice of questions, not seeds, other base models or photographs."


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table. A bar within a cell, as layer plans have, would end it and is escaped."""
    lines = (header, ["---"] * len(header), *rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def between_marks(document: str, name: str) -> str:
    """What stands in a document between the marks of a block.

    Raises:
        ValueError: if it has no such block.
    """
    start, end = _marks(name)
    before, found, rest = document.partition(start)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"There is no block {name!r}: put {start.strip()} and {end.strip()} on lines of their own.")
    return inside


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Put these texts between their marks in a document.

    Raises:
        ValueError: if the document lacks a block. Nothing is written then.
    """
    document = path.read_text(encoding="utf-8")
    for name, text in blocks.items():
        start, end = _marks(name)
        try:
            old = between_marks(document, name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        document = document.replace(start + old + end, start + text + end)
    path.write_text(document, encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
