"""versions_dpvr.py and requirements.txt: what is refused, what is said of newer releases, where testing stopped."""

import logging
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from versions_dpvr import NEWEST_TESTED, OLDEST, cache_in, check_transformers

ROOT = Path(__file__).parent.parent
BOUNDED = ("transformers", "trl", "peft", "gradio", "torch", "datasets")


def requirements() -> dict[str, SpecifierSet]:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def upper_bound(specifier: SpecifierSet) -> str:
    return next(part.version for part in specifier if part.operator == "<")


def next_minor(release: str) -> str:
    major, minor = Version(release).release[:2]
    return f"{major}.{minor + 1}"


def test_the_bound_on_transformers_is_the_release_after_the_newest_tested() -> None:
    specifier = requirements()["transformers"]
    assert upper_bound(specifier) == next_minor(NEWEST_TESTED)
    assert specifier.contains(OLDEST) and specifier.contains(NEWEST_TESTED)


newest_line = pytest.mark.skipif(
    Version(transformers.__version__).release[:2] < Version(NEWEST_TESTED).release[:2],
    reason="an older line pins transformers, and so what fits it",
)


@newest_line
@pytest.mark.parametrize("package", BOUNDED)
def test_requirements_end_at_the_minor_release_after_the_one_that_is_tested_here(package: str) -> None:
    assert upper_bound(requirements()[package]) == next_minor(version(package))


def test_ci_installs_the_newest_line_without_a_pin_and_the_readme_names_the_lines_once() -> None:
    script, readme = (ROOT / ".ci/run").read_text(), (ROOT / "README.md").read_text()
    pinned = re.search(r"^lines=\((.*)\)", script, flags=re.MULTILINE).group(1).split()
    assert pinned[0] == "newest" and len(pinned) == 3
    (sentence,) = re.findall(r"Tested on transformers (.*?)\.\s", readme)
    assert re.findall(r"\d+\.\d+(?:\.\d+)?", sentence) == [*pinned[:0:-1], NEWEST_TESTED]


def test_an_older_release_is_refused_and_a_newer_one_tried_with_one_warning(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(ImportError, match=f"needs transformers {OLDEST} or newer, and 4.50.3 is installed"):
        check_transformers("4.50.3")
    for release in (OLDEST, "5.0.0", f"{NEWEST_TESTED}.7"):
        check_transformers(release)
    assert not caplog.records
    check_transformers("99.1.0")
    said = caplog.messages
    check_transformers("99.1.0")
    assert caplog.messages == said  # once
    assert "\n" not in said[0] and f"tested up to transformers {NEWEST_TESTED}" in said[0]


AS_VERSION = """
import sys, transformers
transformers.__version__ = sys.argv[1]
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True).model_type)
"""


@pytest.mark.parametrize(
    ("release", "status", "said"), [("4.50.3", 1, f"DPVR needs transformers {OLDEST}"), ("99.1.0", 0, "was tested up")]
)
def test_the_code_on_the_hub_says_so_too(release: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", AS_VERSION, release, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == status and done.stderr.count(said) == 1, done.stderr
    assert (done.stdout.strip() == "dpvr_llava") != status


def test_a_cache_is_found_under_either_name() -> None:
    assert cache_in({"cache": 1}) == cache_in({"past_key_values": 1, "cache": None}) == 1
    assert cache_in({"input_ids": 1}) is None
