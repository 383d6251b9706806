"""README.md and docs/: snippets print what they say, commands parse, links exist, numbers are those of results/.

docs/serving.md shows a client of a server, which test_serving.py runs; docs/lmms_eval.md is also read by
test_lmms_eval.py, and the notebook is test_notebook.py's.
"""

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llava
from families import make as make_family
from huggingface_hub import ModelCard, metadata_load
from lines import NEEDS_TRAINING
from packaging.specifiers import SpecifierSet
from transformers import AutoModelForImageTextToText

from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.page import build, launch, write_examples
from dpvr.training.options import BaseOptions, DpvrArguments, RecipeOptions, make_help
from minibench.scenes import make_scene
from versions_dpvr import LINE_4

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->\n", flags=re.DOTALL)
INLINE = re.compile(r"`(python (?:train_sft\.py|app\.py|-m dpvr\.|-m minibench\.export)[^`]*)`")
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")


def snippets() -> Iterator[tuple[str, str, str | None]]:
    """Page, code, and what the page says it prints, of every Python block but the client of a server."""
    for page, text in TEXTS.items():
        blocks = FENCE.findall(text)
        for index, (language, code) in enumerate(blocks):
            if language == "python" and page != "docs/serving.md":
                follows = blocks[index + 1] if index + 1 < len(blocks) else ("", "")
                yield page, code, follows[1] if follows[0] == "text" else None


def command_lines() -> Iterator[tuple[str, str]]:
    """Page and command: each line of a bash block, split at &&, and what stands between backticks with its options."""
    for page, text in TEXTS.items():
        for language, block in FENCE.findall(text):
            if language == "bash":
                yield from ((page, part.strip()) for line in block.splitlines() for part in line.split("&&"))
        for command in INLINE.findall(GENERATED.sub("", FENCE.sub("", text))):
            if " --" in command and not command.endswith("..."):
                yield page, command


SNIPPETS, COMMANDS = list(snippets()), list(dict.fromkeys(command_lines()))
RUN_ELSEWHERE = {  # programs of others, and what stands in their commands that has to be there
    "pip": r"-r (\S+)",
    "lmms-eval": r"--config (\S+)",
    "accelerate": r"--config_file (\S+)",
    "transformers": None,
    "vllm": None,
    "export": None,
    "pytest": None,
    "ruff": None,
    "git": None,
    ".": None,
}


@pytest.fixture
def python(monkeypatch, capsys) -> Callable[[str], str]:
    """Runs what comes after "python" in a command in this process, which has imported the libraries already."""

    def run(command: str) -> str:
        script, *arguments = shlex.split(command)
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        if script == "-m":
            script, *arguments = arguments
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.delitem(sys.modules, script, raising=False)  # else runpy warns
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


# -- snippets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Iterator[dict[str, str]]:
    """What the snippets download, read or write, and what stands in for it here."""
    folder = tmp_path_factory.mktemp("documents")
    make_llava(depth=20).save_pretrained(folder / "llava")
    make_family("qwen3_vl", torch.float32).save_pretrained(folder / "qwen")
    make_scene("test", 0, 0).draw().save(folder / "scene.png")
    app = build(Answerer(*load(str(ROOT))), "About.", write_examples(folder))
    launch(app, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    found = {name: str(folder / name) for name in ("my-dpvr", "my-adapter", "my-qwen-adapter", "scene.png")}
    found["Qwen/Qwen3-VL-8B-Instruct"] = str(folder / "qwen")
    yield {"llava-hf/llava-1.5-7b-hf": str(folder / "llava"), "http://127.0.0.1:7860": app.local_url, **found}
    app.close()


@pytest.mark.parametrize(
    ("page", "code", "output"), SNIPPETS, ids=[f"{page} {index}" for index, (page, *_) in enumerate(SNIPPETS)]
)
def test_every_snippet_runs_and_prints_what_its_page_says(page, code, output, stand_ins, monkeypatch, capsys):
    """In this process, which has imported the libraries already; a name that a snippet does not import is unknown."""
    monkeypatch.chdir(ROOT)
    for name, instead in stand_ins.items():
        code = code.replace(name, instead)
    capsys.readouterr()
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    if output is not None:
        assert capsys.readouterr().out == output


# -- commands ---------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Have a command's own parser read its arguments; an option that it does not know ends in SystemExit."""
    script, *arguments = words
    if script == "-m":
        script, *arguments = arguments
    if script == "train_sft.py":
        return parse_training(arguments)
    module = importlib.import_module(script.removesuffix(".py"))
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{script}.__main__")
    module.parse_args(arguments)


def parse_training(arguments: list[str]) -> None:
    """train_sft.py's, whose options are partly TRL's, and TRL imports with the newer releases of transformers only."""
    known = set(make_help("")._option_string_actions)
    known |= {f"--{name}" for options in (DpvrArguments, BaseOptions, RecipeOptions) for name in vars(options)}
    if not LINE_4:
        from dpvr.training.arguments import TrainingParser

        known |= set(TrainingParser()._option_string_actions)
    given = [word for word in arguments if word.startswith("--")]
    assert set(given) <= known
    for option in ("--config", "--plan"):
        if option in given:
            assert (ROOT / arguments[arguments.index(option) + 1]).exists()


def test_every_command_that_is_named_exists():
    named = {
        name
        for text in TEXTS.values()
        for name in re.findall(r"python -m ((?:dpvr|minibench)[\w.]*)", GENERATED.sub("", text))
    }
    old = set(re.findall(r"python -m (minibench\.\w+)", TEXTS["docs/reproduce.md"])) - {"minibench.export"}
    missing = {name for name in named if importlib.util.find_spec(name) is None}
    assert len(named) > 10 and missing == old


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_every_command_has_options_that_its_parser_knows(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "python" and words[:2] != ["-m", "venv"]:
        try:
            parse(words)
        except SystemExit as end:
            assert end.code == 0 and {"--help", "--help-all"} & set(words)
    elif program != "python":
        files = RUN_ELSEWHERE[program]
        assert all((ROOT / path).is_file() for path in re.findall(files, command)) if files else True
    if program == "accelerate" and "train_sft.py" in words:
        parse(words[words.index("train_sft.py") :])


def test_the_accuracy_command_ends_in_one_json_document(python):
    printed = python("-m dpvr.benchmarks.accuracy --limit 2 --json")
    document = json.loads(printed.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == ["vanilla", "latent", "blind"]
    assert all(row.keys() >= {"routing", "tasks", "mean", "six_bench_mean", "n"} for row in document["rows"])


@pytest.mark.parametrize(
    ("form", "files"), [("datasets", ["train-00000-of-00001.parquet"]), ("llava", ["train.json"])]
)
def test_the_export_commands_write_the_split(form, files, python, tmp_path):
    python(f"-m minibench.export --output_dir {tmp_path / form} --format {form} --split train --size 3")
    assert [path.name for path in (tmp_path / form).rglob("train*.*") if path.suffix != ".png"] == files


@NEEDS_TRAINING
def test_the_training_command_runs_on_the_embedded_model_in_a_fresh_process(tmp_path):
    short = "--num_rows 16 --per_device_train_batch_size 4 --eval_questions 4 --output_dir"
    command = [sys.executable, "train_sft.py", *short.split(), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^vanilla +mean.*^fitted latent +mean.*^trained latent +mean.*^On MiniBench with red and blue swapped the",
        result.stdout,
        re.DOTALL | re.MULTILINE,
    )
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4e6


@NEEDS_TRAINING
def test_the_training_command_runs_on_llavas_json_with_a_recipe(python, random_mini, tmp_path):
    (tmp_path / "images").mkdir()
    make_scene("train", 0, 0).draw().save(tmp_path / "images" / "scene.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a star"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "scene.png", "conversations": talk}] * 2))
    starts = "python train_sft.py --config "
    (recipe,) = {command.split()[3] for _, command in COMMANDS if command.startswith(starts)}
    base = f"--model_name_or_path {random_mini} --split_layer 2 --use_cpu true --output_dir {tmp_path / 'out'}"
    data = f"--data {tmp_path / 'rows.json'} --image_folder {tmp_path / 'images'} --report_to none"
    python(f"train_sft.py --config {recipe} {base} {data}")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["learning_rate"] == 1e-4


@NEEDS_TRAINING
def test_the_rebuild_commands_make_a_repository_that_loads(python, tmp_path):
    small = "--text_layers 3 --text_width 64 --vision_layers 2 --vision_width 32 --tower_pictures 32 --pictures 32"
    quick = "--further_pictures 16 --texts 8 --aligned_pictures 8 --batch_size 8"
    quick += " --validation_questions 2 --num_workers 0"
    python(f"-m dpvr.pretraining.train --output_dir {tmp_path / 'pretrain'} {small} {quick}")
    sft = f"--model_name_or_path {tmp_path / 'pretrain' / 'final'} --output_dir {tmp_path / 'side'}"
    python(f"train_sft.py {sft} --split_layer 1 --num_rows 8 --eval_questions 0")
    assembled = tmp_path / "dpvr-mini"
    python(f"-m dpvr.pretraining.assemble --side_branch {tmp_path / 'side'} --output_dir {assembled}")
    model = AutoModelForImageTextToText.from_pretrained(assembled, trust_remote_code=True)
    assert model.config.layer_plan().modes == ("joint", "text", "context")


# -- what the pages point to -----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the Hub give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_to_something(page):
    for target in LINK.findall(FENCE.sub("", TEXTS[page])):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), target


def test_every_page_is_in_the_index_and_the_index_is_on_the_front_page():
    linked = set(LINK.findall(TEXTS["docs/README.md"]))
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} <= linked | {"README.md"}
    assert "docs/README.md" in LINK.findall(TEXTS["README.md"])


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md"])
def test_the_tables_of_what_works_name_tests_that_exist(page):
    rows = re.findall(r"^\|.*\| (?:yes|no)\b.*\|(.*)\|$", TEXTS[page], flags=re.MULTILINE)
    assert len(rows) > 9
    for row in rows:
        named = re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", row)
        assert named, row
        for file, name in named:
            assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row


# -- the front page --------------------------------------------------------------------------------------------------


def test_the_front_page_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_the_tree_on_the_front_page_is_the_tree_of_the_repository():
    """Every tracked entry of the root and every folder of dpvr/, and nothing else."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tracked = [path.split("/") for path in listing if (ROOT / path).exists()]
    there = {
        "root": {parts[0] + "/" * (len(parts) > 1) for parts in tracked},
        "dpvr": {parts[1] + "/" for parts in tracked if parts[0] == "dpvr" and len(parts) > 2},
    }
    drawn: dict[str, list[str]] = {"root": [], "dpvr": []}
    for line in TEXTS["README.md"].split("## Files\n\n")[1].split("\n\n")[0].splitlines():
        where = "dpvr" if line.startswith(" " * 8) else "root"
        drawn[where] += re.split(r" {2,}", line.strip())[0].split(", ")
    for where, names in there.items():
        assert all(sum(fnmatch(name, pattern) for pattern in drawn[where]) == 1 for name in names), names
        assert all(any(fnmatch(name, pattern) for name in names) for pattern in drawn[where]), drawn[where]


def test_the_front_matter_makes_a_space_of_the_repository():
    card = metadata_load(ROOT / "README.md")
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py") and (ROOT / card["app_file"]).exists()
    needed = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("gradio"))
    assert SpecifierSet(needed.removeprefix("gradio")).contains(card["sdk_version"])
    assert len(card["short_description"]) <= 60
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = re.search(r'requires-python = "(.+)"', project).group(1)
    assert SpecifierSet(supported).contains(card["python_version"])


def test_the_front_matter_has_the_scores_of_the_model_as_it_is_loaded():
    card = ModelCard(TEXTS["README.md"])
    routing = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["routing"]
    cell = ROOT / "results" / "frontier" / "cells" / f"{routing}.json"
    row = json.loads(cell.read_text(encoding="utf-8"))["row"]
    assert card.data.model_name == f"dpvr-mini, routing {routing}"
    measured = {"mean of the eight tasks": row["mean"], **row["tasks"]}
    said = {result.metric_name.removesuffix(", per cent"): result.metric_value for result in card.data.eval_results}
    assert said == {name: round(100 * score, 1) for name, score in measured.items()}
    assert {result.task_type for result in card.data.eval_results} == {card.data.pipeline_tag}
    assert {result.dataset_name for result in card.data.eval_results} == {"MiniBench"}


def test_the_citation_file_has_what_the_format_requires_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation.keys() >= {"message", "title", "authors"}
    assert citation["type"] == "software" and all(author.get("name") for author in citation["authors"])
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors"} and paper["url"].endswith("2606.09131")
    flat = " ".join(TEXTS["README.md"].split())
    assert paper["title"] in flat and all(author["family-names"] in flat for author in paper["authors"])
