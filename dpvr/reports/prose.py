"""The numbers that a document's prose holds, and which of them say by themselves that nothing was measured.

Markdown --less front matter, code, generated blocks--+
Python   --string constants that are shown------------+--less HTML tags--> one flat line --less names, ...--> Number

Of an HTML tag only what is said in words is prose: alt, title, aria-label. The front matter and the generated blocks
have tests of their own (tests/test_documents.py, tests/test_reports.py).
"""

import ast
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

APP = ("app.py", *(f"dpvr/inference/{name}.py" for name in ("page", "controls", "views")))

FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
BLOCK = re.compile(r"^<!-- (\w+) -->\n.*?^<!-- /\1 -->\n", re.DOTALL | re.MULTILINE)
TAG = re.compile(r"<[A-Za-z][\w-]*\s+[\w-]+=[^<>]*>")  # with attributes: others hold no number
SAID = re.compile(r"""\s(?:alt|title|aria-label)=("[^"]*"|'[^']*')""")
LIST_NUMBER = re.compile(r"^ *\d+\. ", re.MULTILINE)

NUMBER = re.compile(r"(?<![\w.,])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?")
LISTED = r"\d+(?:(?:, | and | or | to | x |, and | )\d+)*\b(?!\.\d|%| ?m?s\b| point)"
RECOGNISED = (  # what a reader sees not to be a measurement; whatever else has a number is a claim
    r"`[^`]*`|\]\([^)\s]*\)|https?://\S+|\{[^{}]*\}|#[0-9a-f]{6}\b",  # code, where links lead, styles
    r"\b(?:transformers|torch|Python|Gradio|lmms-eval|WCAG|Gemma|Llama|Mistral Small|FSDP|CC BY) \d+(?:\.\d+)*"
    r"(?:(?:, | and )\d+(?:\.\d+)+)*",  # releases, standards and licences
    r"\b(?:[Tt]ables?|[Ff]igure|[Ss]ection|[Ss]tage|[Pp]oint|[Ss]eed) \d+(?:\.\d+)?\b(?!%)",  # references
    r"\b(?:[Ll]ayers?|[Ss]plits?|[Ss]plit (?:after|at)|[Ll]atent|[Rr]ank|s =|K =|d_v =|r =) " + LISTED,  # plans
    LISTED
    + r" (?:of \d+ )?layers\b|\b(?<!,)\d[\d,]* image\b|\b\d+ text tokens\b|\b\d+ \+ \d+ tokens\b",  # plans, prompts
    r"\b[A-Za-z_](?=[\w./-]*\d)[\w./-]*|\b\d+(?:\.\d+)?B\b|\b\d+-bit\b",  # names and sizes: LLaVA-1.5-7B, 13B, 4-bit
    r"\b\d+\.\d+\.\d+[\w.+]*|\b\d+\.\d+ or newer\b|\b\d{4}\.\d{5}\b"  # releases, papers
    r"|\b\d+(?:st|nd|rd|th)\b|\b95% interval",
)
MASK = re.compile("|".join(f"(?:{pattern})" for pattern in RECOGNISED))


class Number(NamedTuple):
    """A number as it is written, and where it begins in the flat text."""

    written: str
    start: int


def flat(path: Path, made: Collection[str] = ()) -> str:
    """A document's prose in one line; `made` names the blocks that the reports make, which are left out."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return " ".join(less_tags(" ".join(shown(text))).split())
    for pattern in (FRONT_MATTER, FENCE, INDENTED):
        text = pattern.sub("\n\n", text)
    text = BLOCK.sub(lambda block: "\n\n" if block[1] in made else block[0], text)
    return " ".join(less_tags(LIST_NUMBER.sub("", text)).split())


def less_tags(text: str) -> str:
    """A text without its HTML tags, in whose places stands what they say in words."""
    return TAG.sub(lambda tag: f" {' '.join(SAID.findall(tag[0]))} ", text)


def shown(code: str) -> list[str]:
    """The strings of a Python file that are no docstrings; of an f-string its own text, in one piece."""
    tree = ast.parse(code)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    hidden = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    hidden |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue) for part in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in hidden:
            constants = [part for part in node.values if isinstance(part, ast.Constant)]
            hidden |= {id(part) for part in constants}  # ast.walk comes to them later
            found.append(" ".join(part.value for part in constants))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
            found.append(node.value)
    return found


def numbers(prose: str) -> list[Number]:
    """Every number of a flat text."""
    return [Number(found[0], found.start()) for found in NUMBER.finditer(prose)]


def unrecognised(prose: str) -> list[Number]:
    """Those that no pattern of RECOGNISED covers: each needs a claim."""
    return numbers(MASK.sub(lambda found: "\0" * len(found[0]), prose))
