"""What pretraining adds to `transformers.Trainer`: rows in order, checkpoints of LLaVA, a log and validation.

Trainer --on_log--> JsonLog --> DIR/log.jsonl: a JSON line per start, logging step and validation
        --on_step_end--> Validation: accuracy on MiniBench's validation split
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import LlavaProcessor, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpvr.inference.evaluation import evaluate


class InOrderTrainer(Trainer):
    """A Trainer that takes the rows in order: the data sets are random already, and captions come first."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class LlavaTrainer(InOrderTrainer):
    """A Trainer that resumes a LLaVA: it reads a checkpoint with `from_pretrained`.

    LLaVA's parameters are saved under other names than they have in memory. Trainer's own loading does not match them
    and would leave the weights untouched, with no more than a warning.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint).state_dict())


class JsonLog(TrainerCallback):
    """Appends what the Trainer logs to a file of JSON lines, each with the stage, the step and the seconds so far."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self.start = time.time()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        self.write(step=state.global_step, **logs)

    def write(self, **entry: Any) -> None:
        entry = {"stage": self.stage, "seconds": round(time.time() - self.start, 1), **entry}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Validation(TrainerCallback):
    """Measures accuracy on the validation split every `every` steps and after the last one."""

    def __init__(self, log: JsonLog, processor: LlavaProcessor, every: int, num_questions: int) -> None:
        self.log = log
        self.processor = processor
        self.every = every
        self.num_questions = num_questions

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with torch.compiler.set_stance("force_eager"):
                result = evaluate(model, self.processor, split="validation", num_questions=self.num_questions)
            scores = {task: round(score, 4) for task, score in result["tasks"].items()}
            self.log.write(step=state.global_step, validation=scores, mean=round(result["mean"], 4))


def validation_table(log: Path) -> str:
    """The last validation in a log, as a table; empty if there was none."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [entry for entry in entries if "validation" in entry]
    if not found:
        return ""
    scores = {**found[-1]["validation"], "mean": found[-1]["mean"]}
    return "\n".join(f"{task:<12}{score:>7.1%}" for task, score in scores.items())
