"""lmms-eval: the model "dpvr_llava", MiniBench's tasks, the configs and the committed results.

Where lmms-eval is not installed (docs/lmms_eval.md), the model is tested on stand-ins for the few classes that it
takes from there, and what needs lmms-eval itself is skipped.
"""

import inspect
import json
import os
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from families import FAMILIES
from family_processors import save_family
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from adapter_dpvr import DpvrConfig
from dpvr.inference.batches import reply, to_settings
from dpvr.inference.evaluation import evaluate
from dpvr.inference.loading import load
from dpvr.lmms_eval import minibench_tasks as lmms
from dpvr.pretraining.processor import save_processor
from minibench.data import make_items
from minibench.scoring import summarise
from minibench.tasks import TASKS
from processors_dpvr import load_processor
from versions_dpvr import LINE_4

ROOT = Path(__file__).parent.parent
TASK_FILES = Path("dpvr/lmms_eval/tasks")
RESULTS = ROOT / "results" / "lmms_eval"
CONFIG = yaml.safe_load((ROOT / "configs" / "lmms_eval.yaml").read_text())
PUBLIC = ["pope", "mme", "mmbench_en_dev", "mmbench_cn_dev", "scienceqa_img", "seedbench", "blink"]
INSTALLED = find_spec("lmms_eval") is not None
pytestmark = pytest.mark.skipif(LINE_4, reason="for transformers 5; test_batches.py is for both")
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Instance:
    """What lmms-eval hands over: the question as text, a row's messages, wishes, the row, its task and split."""

    args: tuple


class Lmms:
    def __init__(self) -> None:
        self.task_dict = {}


def stand_ins() -> dict[str, types.ModuleType]:
    names = {
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "TokenCounts": SimpleNamespace,
            "GenerationResult": lambda text, counts: SimpleNamespace(text=text, token_counts=counts),
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *_: None},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
    }
    modules = {}
    for name, contents in names.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(contents)
    return modules


@pytest.fixture(scope="module")
def lmms_dpvr() -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name, module in stand_ins().items():
                patch.setitem(sys.modules, name, module)
        from dpvr.lmms_eval import model as lmms_dpvr

        yield lmms_dpvr
    if not INSTALLED:
        for name in ("dpvr.lmms_eval.model", "dpvr.lmms_eval.manifest"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """The folder of two questions of each task, with the task files beside it."""
    folder = tmp_path_factory.mktemp("lmms")
    lmms.write_tasks(folder, limit=2, seed=3)
    return folder


def rows(questions: Path, task: str) -> list[dict]:
    path = questions / "outputs" / "questions" / f"{task}.parquet"
    return list(Dataset.from_parquet(str(path), cache_dir=str(questions / "cache")))


def to_messages(row: dict) -> list[dict]:
    pictures = [{"type": "image", "url": picture} for picture in lmms.to_pictures(row)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": lmms.to_question(row)}]}]


def ask(model, questions: Path, **wanted) -> list[str]:
    """The replies of the model to all questions of two tasks, one of them with two pictures a question."""
    wanted = {"max_new_tokens": 10, "do_sample": False, **wanted}
    instances = []
    for task in ("multi_image", "science"):
        model.task_dict[task] = {"test": rows(questions, task)}
        instances += [
            SimpleNamespace(args=(row["question"], to_messages, dict(wanted), index, task, "test"))
            for index, row in enumerate(model.task_dict[task]["test"])
        ]
    return [result.text for result in model.generate_until(instances)]


@pytest.mark.parametrize("routing", ["none", "late_fusion"])
def test_the_models_replies_are_those_that_minibench_scores(lmms_dpvr, questions, routing, monkeypatch):
    model = lmms_dpvr.DpvrLlava(str(ROOT), routing=routing, device="cpu", dtype="float64", batch_size="3")
    assert model.model.config.routing == routing and model.model.dtype == torch.float64
    expected = []
    monkeypatch.setattr("dpvr.inference.evaluation.summarise", lambda items, replies: expected.extend(replies) or {})
    for task in ("multi_image", "science"):
        evaluate(model.model, model.processor, num_questions=2, seed=3, batch_size=1, tasks=[task])
    assert ask(model, questions) == [text for replies in expected for text in replies]


def test_an_adapter_answers_on_its_stock_base(lmms_dpvr, questions, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float64)
    del llava.config.auto_map  # a stock LLaVA knows nothing of DPVR's code
    llava.save_pretrained(tmp_path / "base")
    save_processor(load_processor(str(ROOT)), tmp_path / "base")
    peft = get_peft_model(llava, DpvrConfig(split_layer=1, side_branch_init="random")).eval()
    peft.save_pretrained(tmp_path / "adapter")
    adapter = {"pretrained": str(tmp_path / "adapter"), "base": str(tmp_path / "base"), "device": "cpu"}
    model = lmms_dpvr.DpvrLlava(**adapter, batch_size=4)
    assert model.model.config.layer_plan().reads_side_branch and model.model.dtype == torch.float64
    expected = [
        each.text
        for task in ("multi_image", "science")
        for row in rows(questions, task)
        for each in reply(
            peft,
            model.processor,
            [lmms_dpvr.to_conversation(to_messages(row))],
            max_new_tokens=10,
            do_sample=False,
        )
    ]
    assert ask(model, questions) == expected
    assert ask(lmms_dpvr.DpvrLlava(**adapter, routing="none"), questions) != expected


@pytest.mark.parametrize("name", ["gemma3", "internvl", "llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_any_family_is_asked_with_its_own_processor_and_with_and_without_its_adapter(
    lmms_dpvr, questions, name, tmp_path
):
    save_family(name, tmp_path / "base")
    fields = {"routing": "kv_substitution", "split_layer": FAMILIES[name].split}
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, DpvrConfig(**fields, side_branch_init="random"))
    adapted.save_pretrained(tmp_path / "adapter")
    stock = lmms_dpvr.DpvrLlava(str(tmp_path / "base"), device="cpu", batch_size=2)
    own = ask(stock, questions)
    arguments = {"pretrained": str(tmp_path / "adapter"), "base": str(tmp_path / "base"), "device": "cpu"}
    assert ask(lmms_dpvr.DpvrLlava(**arguments, routing="none", batch_size=2), questions) == own
    model = lmms_dpvr.DpvrLlava(**arguments, batch_size=2)
    conversation = lmms_dpvr.to_conversation(to_messages(rows(questions, "science")[0]))
    (expected,) = reply(adapted.eval(), model.processor, [conversation], max_new_tokens=10, do_sample=False)
    assert ask(model, questions)[2] == expected.text
    with pytest.raises(ValueError, match="routing is 'late_fusion': choose one of none"):
        lmms_dpvr.DpvrLlava(str(tmp_path / "base"), device="cpu", routing="late_fusion")


def test_an_error_in_generation_is_raised(lmms_dpvr, questions, monkeypatch):
    model = lmms_dpvr.DpvrLlava(str(ROOT), device="cpu")

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(model, questions)


def test_what_the_model_cannot_do_is_refused(lmms_dpvr, questions):
    for batch_size, most in (("auto", None), (0, None), (4, 8)):
        with pytest.raises(ValueError, match="give a --batch_size of 1 or more and no maximum"):
            lmms_dpvr.DpvrLlava(str(ROOT), batch_size=batch_size, max_batch_size=most)
    model = lmms_dpvr.DpvrLlava(str(ROOT), device="cpu")
    with pytest.raises(ValueError, match="setting 'tokens' is not known"):
        ask(model, questions, tokens=3)
    with pytest.raises(NotImplementedError, match="no likelihoods: choose a task"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="has a video, and the model takes pictures"):
        lmms_dpvr.to_conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


# -- MiniBench's tasks ------------------------------------------------------------------------------------------------


def test_scores_of_single_questions_in_any_order_are_minibenchs(questions):
    items = make_items("test", 2, seed=3)
    rng, replies, found = random.Random(0), [], {}
    for task in TASKS:
        results = []
        for row in rows(questions, task):
            said = rng.choice([row["answer"], row["answer"], "no idea"])
            results.append(lmms.to_results(row, [said])["score"])
        replies += lmms.to_items(results)[1]
        rng.shuffle(results)
        found[task] = (lmms.score(results), lmms.accuracy(results))
    details = summarise(items, replies)["details"]
    assert found == {task: (details[task]["score"], details[task]["accuracy"]) for task in TASKS}
    assert 0 < sum(score for score, _ in found.values()) < 8


def test_the_exported_questions_are_those_that_the_accuracy_benchmark_asks(questions):
    items = make_items("test", 2, seed=3)
    for task in TASKS:
        own = [item for item in items if item.task == task]
        exported = rows(questions, task)
        asked = [(row["question"], row["answer"]) for row in exported]
        assert asked == [pair for item in own for pair in item.questions]
        pictures = [picture.tobytes() for row in exported for picture in lmms.to_pictures(row)]
        assert pictures == [s.draw().tobytes() for item in own for _ in item.questions for s in item.scenes]


def test_part_of_an_item_is_not_scored(questions):
    results = [lmms.to_results(row, ["yes"])["score"] for row in rows(questions, "choice_en")]
    with pytest.raises(
        ValueError, match="6 replies to the 8 questions of 2 items of 'choice_en', .*: leave out lmms-eval's --limit"
    ):
        lmms.score(results[:6])
    with pytest.raises(ValueError, match="9 replies to the 8 questions"):
        lmms.score([*results, results[0]])


def test_the_group_names_every_task_and_every_file_is_written(questions):
    folder = questions / TASK_FILES / "minibench"
    group = yaml.safe_load((folder / "minibench.yaml").read_text())
    assert group["task"] == [f"minibench_{task}" for task in TASKS]
    shared = (folder / "_every_task").read_text().replace("!function ", "")
    files = yaml.safe_load(shared)["dataset_kwargs"]["data_files"]
    assert list(files) == list(TASKS) and all((folder / path).is_file() for path in files.values())
    for task in TASKS:
        own = yaml.safe_load((folder / f"{task}.yaml").read_text())
        assert own == {"include": "_every_task", "task": f"minibench_{task}", "test_split": task}


# -- the committed results --------------------------------------------------------------------------------------------


def test_lmms_eval_and_the_accuracy_benchmark_found_the_same_scores():
    ours, theirs = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("accuracy", "minibench"))
    assert (ours["limit"], ours["seed"]) == (theirs["limit"], theirs["seed"]) == (100, 0)
    assert theirs["versions"].items() > ours["versions"].items()
    assert [row["name"] for row in theirs["rows"]] == ["vanilla", "late_fusion"]
    for row in theirs["rows"]:
        (own,) = (own for own in ours["rows"] if own["name"] == row["name"])
        assert row["tasks"] == own["tasks"] and row["mean"] == pytest.approx(own["mean"], abs=1e-12)
        assert row["accuracy"] == {task: own["details"][task]["accuracy"] for task in TASKS}
        assert row["questions"] == {task: own["details"][task]["questions"] for task in TASKS}


# -- configs and installation -----------------------------------------------------------------------------------------


def test_the_config_names_the_papers_benchmarks_and_lets_errors_end_the_run():
    assert CONFIG["model"] == "dpvr_llava" and CONFIG["tasks"].split(",") == PUBLIC
    assert CONFIG["batch_size"] > 1 and CONFIG["verbosity"] == "DEBUG"


def test_the_documents_commands_give_the_model_what_it_takes(lmms_dpvr):
    known = inspect.signature(lmms_dpvr.DpvrLlava).parameters.keys() - {"device", "batch_size", "max_batch_size"}
    document = (ROOT / "docs" / "lmms_eval.md").read_text(encoding="utf-8")
    given = re.findall(r"--model_args (\S+)", document)
    assert len(given) == 4 and {pair.split("=")[0] for pairs in given for pair in pairs.split(",")} < known
    table = document.split("| `--model_args` | |\n")[1].split("\n\n")[0]
    first_column = "".join(line.split("|")[1] for line in table.splitlines())
    assert set(re.findall(r"`(\w+)`", first_column)) == known


def test_the_manifest_names_the_model(lmms_dpvr):
    from dpvr.lmms_eval.manifest import MANIFEST as manifest

    assert manifest.model_id == "dpvr_llava"
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert module == lmms_dpvr.__name__ and vars(lmms_dpvr)[name] is lmms_dpvr.DpvrLlava
    assert not lmms_dpvr.DpvrLlava.is_simple


# -- with lmms-eval ---------------------------------------------------------------------------------------------------


@needs_lmms_eval
def test_lmms_eval_knows_the_model_and_the_benchmarks_and_their_wishes_are_understood():
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    assert get_model("dpvr_llava").__name__ == "DpvrLlava"
    manager = TaskManager()
    assert manager.match_tasks(PUBLIC) == sorted(PUBLIC)
    for task in PUBLIC:
        path = manager.task_index[task]["yaml_path"]
        if task == "blink":  # a group of 14, with one template
            path = str(Path(path).parent / "blink_counting.yaml")
        config = load_yaml_config(path)
        assert config["output_type"] == "generate_until"
        assert to_settings(config["generation_kwargs"], 128)["do_sample"] is False


@needs_lmms_eval
def test_blinks_questions_keep_all_their_pictures(lmms_dpvr):
    from lmms_eval.tasks.blink.utils import blink_doc_to_messages

    first, second = (scene for item in make_items("test", 2, tasks=["scene"]) for scene in item.scenes)
    row = {
        "prompt": "Which?",
        "choices": ["a", "b"],
        "image_1": first.draw(),
        "image_2": second.draw(),
        "image_3": None,
    }
    found = lmms_dpvr.to_conversation(blink_doc_to_messages(row, {"pre_prompt": "Say {}. "}))
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Say A, B. Which?"}]
    assert found.messages == [{"role": "user", "content": parts}]
    assert [picture.tobytes() for picture in found.pictures] == [s.draw().tobytes() for s in (first, second)]


def lmms_eval(questions: Path, model: str, output: Path, code: str = "") -> subprocess.CompletedProcess:
    """Run lmms-eval's command on MiniBench, after some code."""
    args = ["--model", "dpvr_llava", "--model_args", model, "--tasks", "minibench_all", "--batch_size", "5"]
    args += ["--include_path", str(questions / TASK_FILES), "--output_path", str(output), "--verbosity", "DEBUG"]
    program = f"import sys\n{code}\nsys.argv[1:] = {args}\nfrom lmms_eval.cli.dispatch import main\nmain()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_lmms_eval
def test_a_run_of_lmms_eval_finds_minibenchs_scores(questions, tmp_path):
    run = lmms_eval(questions, f"pretrained={ROOT},routing=late_fusion,device=cpu", tmp_path)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.rglob("*_results.json")
    found = json.loads(path.read_text())["results"]
    model, processor = load(str(ROOT), device="cpu")
    model.set_routing("late_fusion")
    expected = evaluate(model, processor, num_questions=2, seed=3)
    assert {task: found[f"minibench_{task}"]["score,none"] for task in TASKS} == expected["tasks"]
    assert found["minibench_all"]["score,none"] == pytest.approx(expected["mean"])


@needs_lmms_eval
def test_a_run_of_lmms_eval_ends_with_the_error_in_generation(questions, tmp_path):
    code = """
from dpvr.lmms_eval import model as lmms_dpvr
def fail(*_, **__):
    raise RuntimeError("out of memory")
lmms_dpvr.reply_to_all.__globals__["reply"] = fail
"""
    run = lmms_eval(questions, f"pretrained={ROOT}", tmp_path, code)
    assert run.returncode != 0 and "RuntimeError: out of memory" in run.stderr
    assert not list(tmp_path.rglob("*_results.json"))
