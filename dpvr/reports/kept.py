"""The claims of the documents: results/claims.json names what each number comes from, and this recomputes it.

claims.json --each: document, text, numbers {as written: source}--> recomputed, compared --+
documents   --their numbers (prose.py), less those of claims-------------------------------+--> what does not hold

A number that was not measured here has a claim too, with "given" in place of "numbers", or of one number's source:
which kind of number it is, and where it stands. `python -m dpvr.reports` prints what does not hold, and
tests/test_claims.py fails on it.
"""

from pathlib import Path
from typing import Any, NamedTuple

from dpvr.reports.blocks import blocks
from dpvr.reports.documents import read
from dpvr.reports.prose import APP, Number, flat, numbers, unrecognised
from dpvr.reports.values import value

KINDS = ("paper", "published", "fixed", "example", "goal", "pending")  # see CONTRIBUTING.md
FIELDS = {"document", "text"}


class Claim(NamedTuple):
    """A fragment of a document that stands in it once, and the sources of its numbers or their kind."""

    document: str
    text: str
    numbers: dict[str, Any]
    given: str


def read_claims(results: Path) -> list[Claim]:
    """The claims of a folder of results.

    Raises:
        ValueError: for a claim without numbers and kind, or with both, or of an unknown kind.
    """
    found = []
    for entry in read(results / "claims.json"):
        rest = entry.keys() - FIELDS
        if rest not in ({"numbers"}, {"given"}) or not entry.keys() > FIELDS:
            raise ValueError(f"A claim has document, text, and numbers or given, not {', '.join(entry)}: {entry}.")
        claim = Claim(**{"numbers": {}, "given": "", **entry})
        if claim.given and not is_given(claim.given):
            raise ValueError(f"'given' begins with {', '.join(KINDS)} and a colon, not {claim.given!r}.")
        found.append(claim)
    return found


def is_given(source: Any) -> bool:
    """Whether it is the kind of a number that was not measured here, and no source."""
    return isinstance(source, str) and source.partition(":")[0] in KINDS


def documents(root: Path) -> list[str]:
    pages = (path.relative_to(root).as_posix() for path in sorted((root / "docs").glob("*.md")))
    return [document for document in ("README.md", "CONTRIBUTING.md", *pages, *APP) if (root / document).exists()]


def problems(root: Path) -> list[str]:
    """A line for every claim that does not hold, and for every number without a claim."""
    results = root / "results"
    claims, made = read_claims(results), blocks(results)
    pages = {document: flat(root / document, made.get(document, ())) for document in documents(root)}
    strangers = [f"{claim.document} is no document: {claim.text!r}" for claim in claims if claim.document not in pages]
    for document, prose in pages.items():
        own = [claim for claim in claims if claim.document == document]
        strangers += [f"{document}: {line}" for claim in own for line in broken(claim, prose, results)]
        strangers += [f"{document}: {line}" for line in unclaimed(own, prose)]
    return strangers


def broken(claim: Claim, prose: str, results: Path) -> list[str]:
    """What does not hold of a claim."""
    if prose.count(claim.text) != 1:
        return [f"a claim's text stands there {prose.count(claim.text)} times, and must once: {claim.text!r}"]
    there = {number.written for number in numbers(claim.text)}
    lines = [f"{written} is not in {claim.text!r}" for written in claim.numbers.keys() - there]
    for written, source in claim.numbers.items():
        if is_given(source):
            continue
        try:
            found = as_written(written, value(source, results))
        except ValueError as error:
            found = str(error)
        if found != written:
            lines.append(f"{written} in {claim.text!r}: {source} gives {found}")
    return lines


def unclaimed(claims: list[Claim], prose: str) -> list[str]:
    """The numbers of a document that no claim covers."""
    covered = [(claim, prose.find(claim.text)) for claim in claims if claim.text in prose]

    def stands(number: Number) -> bool:
        return any(
            start <= number.start < start + len(claim.text) and (claim.given or number.written in claim.numbers)
            for claim, start in covered
        )

    return [
        f"{number.written} has no claim in results/claims.json: "
        f"...{prose[max(0, number.start - 60) : number.start + 40]}..."
        for number in unrecognised(prose)
        if not stands(number)
    ]


def as_written(written: str, found: float) -> str:
    """A value in the form of a number that stands in a text: as many decimals, commas, a plus, per cent.

    Raises:
        ValueError: for a value that is no number.
    """
    if not isinstance(found, int | float):
        raise ValueError(f"no number but {found!r}")
    digits = written.strip("+-%")
    found = 100 * found if written.endswith("%") else found
    if "e" in digits:
        return f"{found:.{len(digits.partition('e')[0].partition('.')[2])}e}".replace("e-0", "e-")
    decimals = len(digits.partition(".")[2])
    form = ("+" if written.startswith("+") else "") + ("," if "," in digits else "") + f".{decimals}f"
    return f"{found:{form}}" + "%" * written.endswith("%")
