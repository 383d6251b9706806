"""The table of docs/families.md: what tests/family_checks.py found for each family, on each release of transformers.

results/families.json: {release: {"largest_difference": {family: {check: number}}, "allowed", command, versions, ...}}
"""

from pathlib import Path
from typing import Any

from packaging.version import Version

from dpvr.reports.documents import read, table

HEADINGS = {  # of the checks in tests/family_checks.py
    "all_joint": "all joint",
    "routings": "routings",
    "videos": "video",
    "cached": "cache",
    "beams": "beams",
    "later_turn": "chunks",
    "saved": "saved",
    "gradients": "gradients",
}


def render_families(results: Path) -> str:
    """A row per family: the largest difference that each check found on any release, and the releases side by side."""
    found = read(results / "families.json")
    releases = sorted(found, key=Version, reverse=True)
    names = sorted({name for release in releases for name in found[release]["largest_difference"]})
    rows = [
        [
            f"`{name}`",
            *(_largest(found, name, check) for check in HEADINGS),
            *(_passed(found[r], name) for r in releases),
        ]
        for name in names
    ]
    lines = table(["", *HEADINGS.values(), *releases], rows) + [""]
    for release in releases:
        record = found[release]
        lines.append(
            f"- transformers {release}: `{record['command']}`, on {record['hardware']}, torch "
            f"{record['versions']['torch']}, PEFT {record['versions']['peft']}."
        )
    return "\n".join(lines) + "\n"


def _largest(found: dict[str, Any], name: str, check: str) -> str:
    """The largest difference of a check on a family, over all releases; empty where the check does not apply."""
    of_family = [record["largest_difference"].get(name, {}) for record in found.values()]
    differences = [checks[check] for checks in of_family if check in checks]
    if not differences:
        return ""
    return "0" if max(differences) == 0 else f"{max(differences):.0e}"


def _passed(record: dict[str, Any], name: str) -> str:
    """How many checks of a family found no more than is allowed, as "8 of 8"; "-" if the release lacks the family."""
    checks = record["largest_difference"].get(name)
    if checks is None:
        return "-"
    right = sum(difference <= record["allowed"][check] for check, difference in checks.items())
    return f"{right} of {len(checks)}"
