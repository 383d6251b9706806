"""dpvr/reports/kept.py, prose.py, values.py: every number in a sentence has a source, and is what the source gives."""

import json
from pathlib import Path
from shutil import copyfile

import pytest
from lines import ONCE

from dpvr.reports.blocks import blocks
from dpvr.reports.kept import Claim, as_written, broken, documents, is_given, problems, read_claims, unclaimed
from dpvr.reports.prose import flat, unrecognised
from dpvr.reports.values import field, value

pytestmark = ONCE
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
CLAIMS = read_claims(RESULTS)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """{document: its prose in one line}"""
    made = blocks(RESULTS)
    return {document: flat(ROOT / document, made.get(document, ())) for document in documents(ROOT)}


def own(document: str) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.document == document]


@pytest.mark.parametrize("document", sorted({claim.document for claim in CLAIMS}))
def test_every_claim_of_a_document_is_what_its_source_gives(document, pages):
    assert [line for claim in own(document) for line in broken(claim, pages[document], RESULTS)] == []


@pytest.mark.parametrize("document", documents(ROOT))
def test_every_number_of_a_document_has_a_claim(document, pages):
    assert unclaimed(own(document), pages[document]) == []


@pytest.mark.parametrize(
    "made_up",
    [
        "It answers 83.1% of them.",
        "That took 12 ms.",
        "It is 2.3 times as fast.",
        "17 of 20 answers are equal.",
        "It costs 0.41 of the prefill.",
        "A step is 3x faster.",
        "The difference is -4.2 points (95% interval -5.0 to -3.1).",
        "Split 4 gains 1.5 points.",
        "Rank 64 explains 0.912.",
        "On transformers 5.23.0 it took 40 s.",
        "layer 9 takes 3 ms",
        "With 12 layers it scores 71.",
    ],
)
@pytest.mark.parametrize("document", ["README.md", "docs/latent.md"])
def test_a_new_number_that_nobody_measured_is_found(made_up, document, pages):
    assert unclaimed(own(document), f"{pages[document]} {made_up}") != []


def test_a_sentence_that_says_another_number_than_the_record_is_found(pages):
    claim = next(claim for claim in CLAIMS if "1.4" in claim.numbers)
    prose = pages[claim.document]
    changed = claim._replace(text=claim.text.replace("1.4", "1.3"))
    assert "1.4" in broken(changed, prose.replace(claim.text, changed.text), RESULTS)[0]
    numbers = {"1.3" if written == "1.4" else written: source for written, source in claim.numbers.items()}
    (line,) = broken(changed._replace(numbers=numbers), prose.replace(claim.text, changed.text), RESULTS)
    assert line.startswith("1.3 in ") and line.endswith(" gives 1.4")


def test_a_claim_whose_sentence_is_gone_or_stands_twice_is_found():
    claim = Claim("a.md", "took 5 s", {}, "example: x")
    assert "0 times" in broken(claim, "It took 6 s.", RESULTS)[0]
    assert "2 times" in broken(claim, "It took 5 s, and took 5 s.", RESULTS)[0]
    assert broken(claim, "It took 5 s.", RESULTS) == unclaimed([claim], "It took 5 s.") == []
    assert len(unclaimed([claim], "7 s it took.")) == 1


@pytest.mark.parametrize(
    ("prose", "found"),
    [
        ("LLaVA-1.5-7B of 13B, Qwen2.5-VL, 4-bit, arXiv 2606.09131, v0.32, torch 2.13 and Python 3.11 or 3.12.1", []),
        (
            "Table 2, section 3.1, layers 1, 4 and 9, split 8, K = 1, after 8 of 12 layers, 576 image tokens",
            [],
        ),
        ("`--limit 50` and [that](docs/page-2.md), https://a.b/3, the 10th percentile, the 95% interval", []),
        ("1,024 rows, 3e-4, +1.5 points, 20mb", ["1,024", "3e-4", "+1.5", "20"]),
        ("layer 9 in 3 s, and 12 pictures of 40", ["3", "12", "40"]),
    ],
)
def test_what_is_recognised(prose, found):
    assert [number.written for number in unrecognised(prose)] == found


def test_code_blocks_of_the_reports_and_front_matter_are_left_out_and_other_blocks_are_not(tmp_path):
    page = tmp_path / "a.md"
    inside = "<!-- {0} -->\n5 s\n<!-- /{0} -->\n"
    page.write_text(
        f"---\na: 1\n---\n1. Two.\n\n    3 s\n\n```\n4\n```\n{inside.format('made')}{inside.format('own')}"
    )
    assert [number.written for number in unrecognised(flat(page, ["made"]))] == ["5"]
    code = tmp_path / "a.py"
    code.write_text('"""1 s"""\ntext = "2 s"\nother = f"{text:.3f} 4 s"\n')
    assert [number.written for number in unrecognised(flat(code))] == ["2", "4"]


@pytest.mark.parametrize(("name", "text"), [("a.md", "{}\n"), ("a.py", "shown = {!r}\n")])
def test_of_html_tags_only_what_they_say_in_words_is_prose(name, text, tmp_path):
    page = tmp_path / name
    tags = "<p>In 3 ms<img width=\"64%\"\n alt=\"2 s\"> <td class='n4' aria-label='5%'>1 <b and 9> 8</td>"
    page.write_text(text.format(tags))
    assert sorted(number.written for number in unrecognised(flat(page))) == ["1", "2", "3", "5%", "8", "9"]


def test_a_tag_of_an_f_string_is_found_around_its_values(tmp_path):
    page = tmp_path / "a.py"
    page.write_text("""a = f"<text x='{1 + 2}' y='14' style='{'4'}: 5'>6 ms {'7'}</text>" f"{a:.8f} 9"\n""")
    assert [number.written for number in unrecognised(flat(page))] == ["6", "9"]


@pytest.mark.parametrize(
    ("written", "found"),
    [("0.4", 0.449), ("44.9%", 0.449), ("1,234", 1234.4), ("+1.0", 0.96), ("-1.0", -0.96), ("3e-4", 0.0003), ("7", 7)],
)
def test_a_value_is_rounded_as_it_is_written(written, found):
    assert as_written(written, found) == written


def test_sources_are_fields_arithmetic_and_counts(tmp_path):
    rows = [{"name": "a", "x": 1, "y": {"z": [1, 2, 4]}}, {"name": "b", "x": 3}]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    one = "r.json rows/name=b/x"
    assert value(one, tmp_path) == 3 and value("r.json rows/*/x", tmp_path) == [1, 3]
    assert value({"minus": [one, {"ratio": ["r.json rows/0/y/z/-1", 2]}]}, tmp_path) == 1
    assert value({"max": "r.json rows/0/y/z"}, tmp_path) == 4 and value({"mean": "r.json rows/*/x"}, tmp_path) == 2
    assert value({"code": "dpvr.data.pictures:MAX_ASPECT"}, tmp_path) == 20
    for wrong, message in (
        ("r.json rows/name=c/x", "0 rows have name=c"),
        ("r.json rows/0/w", "no 'w' on the path"),
        ("none.json x", "There is no file"),
        ({"add": [one]}, "There is no operation 'add'"),
        ({"code": "dpvr.data.pictures:NONE"}, "There is no NONE"),
        (3, "A source is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            value(wrong, tmp_path)
    assert field({"a": {"b": 1}}, "a/b") == 1


def test_the_counted_costs_are_those_of_the_record():
    late = {"counted_share": {"shape": "llava-1.5-7b", "plan": {"split_layer": 18}}}
    recorded = "latency/llava-1.5-7b.json rows/method=late_fusion/ratio_to_vanilla/prefill_flops"
    assert value(late, RESULTS) == pytest.approx(value(recorded, RESULTS))


@pytest.mark.parametrize(
    "entry",
    [
        {"document": "a.md", "text": "1 s"},
        {"document": "a.md", "text": "1 s", "given": "because"},
        {"document": "a.md", "text": "1 s", "given": "example: a", "numbers": {}},
        {"document": "a.md", "text": "1 s", "number": {"1": "a b"}},
    ],
)
def test_a_claim_of_another_form_is_refused(entry, tmp_path):
    (tmp_path / "claims.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="numbers or given|begins with paper"):
        read_claims(tmp_path)


def test_what_is_given_says_where_it_stands():
    given = [claim.given for claim in CLAIMS if claim.given]
    given += [source for claim in CLAIMS for source in claim.numbers.values() if is_given(source)]
    assert len(given) > 20 and all(len(text.partition(": ")[2]) > 5 for text in given)


def test_the_reports_say_of_a_copy_what_does_not_hold(tmp_path):
    """One document of its own, whose claim is of no document, and a number without a claim."""
    for document in ("README.md", "CONTRIBUTING.md", *documents(ROOT)[-4:]):
        (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
        copyfile(ROOT / document, tmp_path / document)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text("It takes 0.41 of the time.\n")
    (tmp_path / "results").symlink_to(RESULTS, target_is_directory=True)
    found = problems(tmp_path)
    assert any(line.startswith("docs/new.md: 0.41 has no claim") for line in found)
    assert any(line.startswith("docs/latent.md is no document") for line in found)
