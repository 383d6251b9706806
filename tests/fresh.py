"""Check the main claim as a stranger would: the commands of docs/check.md, from a fresh environment, each timed.

    python -m tests.fresh --output results/fresh.json

dpvr-mini stands in for the checkpoint, as a stock LLaVA in a folder outside the repository, and MiniBench for the data
and the questions; the rest of each command is as the page has it. The environments are made by pip, from pip's own
index, as requirements.txt and docs/lmms_eval.md say. The record is written after every step.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpvr.command_line import Parser, at_least, run
from dpvr.record import publish, run_record

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHECKPOINT, LATENT = "llava-hf/llava-1.5-7b-hf", "outputs/check"
FIT_ON = "llava_v1_5_mix665k.json --image_folder images"
QUESTIONS = "--tasks pope --limit 500"
LMMS = "--tasks minibench_all --include_path dpvr/lmms_eval/tasks"
QUESTION_FILES = ROOT / "outputs" / "questions"  # where the tasks of lmms-eval look
NOT_HERE = ("torchvision", "timm")  # beside torch for CPUs: docs/lmms_eval.md


def save_stock(folder: Path) -> None:
    """dpvr-mini's base as a stock LLaVA, which has nothing of this repository."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from modeling_dpvr import DpvrLlavaForConditionalGeneration
    from processors_dpvr import load_processor

    model = DpvrLlavaForConditionalGeneration.from_pretrained(ROOT)
    fields = {name: getattr(model.config, name) for name in ("text_config", "vision_config", "image_token_index")}
    base = LlavaForConditionalGeneration(LlavaConfig(**fields, **of_features(model.config)))
    weights = {name: weight for name, weight in model.state_dict().items() if "side_branch" not in name}
    base.load_state_dict(weights)
    base.generation_config = model.generation_config
    base.save_pretrained(folder)
    load_processor(str(ROOT)).save_pretrained(folder)


def of_features(config: Any) -> dict[str, Any]:
    names = ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "image_seq_length")
    return {name: getattr(config, name) for name in names}


def commands(page: str, names: dict[str, str]) -> list[str]:
    """The commands of a page, with what stands in for what a stranger has."""
    lines = [line for block in FENCE.findall(page) for line in block.splitlines()]
    for name, instead in names.items():
        lines = [line.replace(name, instead) for line in lines]
    return lines


def environment(folder: Path, *installs: str) -> Path:
    """A new environment's folder of programs; each install is what comes after pip install."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for words in installs:
        subprocess.run([folder / "bin" / "pip", *shlex.split(words)], cwd=ROOT, check=True)
    return folder / "bin"


def timed(record: dict[str, Any], output: Path, step: str, act: Any, *words: Any) -> Any:
    """Run a step, and put its seconds into the record at once."""
    start = time.perf_counter()
    found = act(*words)
    record["seconds"][step] = round(time.perf_counter() - start, 1)
    publish(record, output)
    return found


def execute(programs: Path, command: str) -> None:
    program, *words = shlex.split(command)
    subprocess.run([programs / program, *words], cwd=ROOT, check=True)


def scores(folder: Path) -> dict[str, float]:
    """{task: score} of lmms-eval's newest results in a folder."""
    newest = max(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text(encoding="utf-8"))["results"]
    return {task: row["score,none"] for task, row in results.items() if "score,none" in row}


def main(args: Any) -> None:
    record = run_record("-m tests.fresh") | {"samples": args.samples, "questions": args.questions, "seconds": {}}
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside)
        stock, latent = folder / "stranger", folder / "check"
        rows = f"minibench --batch_size 8 --eval_samples {args.samples // 2} --num_samples {args.samples}"
        names = {
            FIT_ON: "minibench",
            "--latent_rank 1024": "--latent_rank 48",
            "--image_tokens 576": "--image_tokens 64",
        }
        names |= {"--num_samples 300 --eval_samples 200 --dtype bfloat16": rows.removeprefix("minibench ")}
        names |= {CHECKPOINT: str(stock), LATENT: str(latent), ",dtype=bfloat16": "", QUESTIONS: LMMS}
        page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
        costs, fit, *asked = commands(page, names)
        if QUESTION_FILES.exists():
            raise ValueError(f"{QUESTION_FILES} exists, and the questions of this check go there: move it away.")
        save_stock(stock)
        output = args.output
        programs = timed(record, output, "install", environment, folder / "env", "install -q -r requirements.txt")
        timed(record, output, "costs", execute, programs, costs)
        timed(record, output, "fit", execute, programs, fit)
        record["fit"] = json.loads((latent / "fit.json").read_text(encoding="utf-8"))
        installs = ("install -q -r requirements-lmms.txt", "install -q -e . --no-deps")
        lmms = timed(
            record,
            output,
            "install lmms-eval",
            environment,
            folder / "lmms",
            *installs,
            f"uninstall -qy {' '.join(NOT_HERE)}",
        )
        export = f"python -m minibench.export --format questions --split test --size {args.questions}"
        execute(programs, f"{export} --output_dir {QUESTION_FILES}")
        for name, command in zip(("base", "latent"), asked, strict=True):
            replies = folder / name
            timed(record, output, f"ask the {name}", execute, lmms, f"{command} --output_path {replies}")
            record.setdefault("scores", {})[name] = scores(replies)
        publish(record, args.output)


def parse_args(argv: list[str] | None = None) -> Any:
    parser = Parser(__doc__)
    parser.add_argument(
        "--samples", type=at_least(2), default=200, help="pictures to fit on; half as many to compare on"
    )
    parser.add_argument("--questions", type=at_least(2), default=50, help="of each task, by lmms-eval")
    parser.add_argument("--output", type=Path, default=Path("results/fresh.json"), help="the JSON document")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
