"""DPVR in lmms-eval, whose task files and scores make a model's figures comparable with those that others publish.

    pip install -e . --no-deps            registers "dpvr_llava" with lmms-eval, by an entry point (pyproject.toml)
    lmms-eval --model dpvr_llava --model_args pretrained=.,routing=late_fusion --tasks pope --batch_size 16

`--model_args` are what `DpvrLlava` takes. docs/lmms_eval.md has the installation and the commands of the benchmarks.
"""

import time
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from dpvr.inference.batches import Conversation, Request, reply_to_all, to_settings
from dpvr.inference.loading import load_any
from dpvr.inference.ways import ways_of


class DpvrLlava(lmms):
    """A DPVR repository, an adapter on its base, or a stock vision-language model, asked through its chat template.

    Args:
        pretrained: a DPVR repository, an adapter or a stock model (id or path).
        base: for an adapter, where its base lies, if not where its config says.
        routing: of these weights; the config's own, unless said. "none" is the base by itself.
        device: the GPU if there is one, unless said; with several processes each takes its own.
        dtype: such as bfloat16; that of the weights, unless said.
        attn_implementation: sdpa, eager or flex_attention.
        batch_size: questions that are answered at once.
        max_new_tokens: for tasks that set no limit themselves.
        trust_remote_code: load a repository with its own code; unless said, none of it is run.
    """

    is_simple = False  # it takes chat messages, in which each picture is where the task puts it

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        revision: str = "main",
        routing: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = 128,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(
                f"--batch_size is {batch_size!r} and --max_batch_size {max_batch_size!r}: give a --batch_size of 1 or "
                "more and no maximum, as no fitting size is searched for; halve it until it fits."
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
        self.model, self.processor = load_any(str(pretrained), base, revision, device, **options)
        if routing is not None:
            ways_of(self.model).choose(routing)
        self.device = self.model.device
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the replies, and log how long they took: lmms-eval puts it under "throughput"."""
        start = time.perf_counter()
        replies = reply_to_all(
            self.model,
            self.processor,
            [self._to_request(*instance.args) for instance in requests],
            batch_size=self.batch_size,
            show_progress=self._rank == 0,
        )
        seconds, tokens = time.perf_counter() - start, sum(reply.tokens for reply in replies)
        rate = {"questions_per_second": len(replies) / seconds}
        log_metrics(seconds, tokens, tokens / seconds, rate)
        return [GenerationResult(reply.text, TokenCounts(output_tokens=reply.tokens)) for reply in replies]

    def _to_request(
        self, context: str, to_messages: Any, wanted: dict[str, Any], row: int, task: str, split: str
    ) -> Request:
        """What lmms-eval asks: messages are made from the task's row when they are needed."""
        rows = self.task_dict[task][split]
        return Request(
            make=lambda: to_conversation(to_messages(rows[row])),
            settings=to_settings(wanted, self.max_new_tokens),
            length=len(context),
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("dpvr_llava gives no likelihoods: choose a task with output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("dpvr_llava answers in one round: choose a task with output_type generate_until.")


def to_conversation(messages: list[dict[str, Any]]) -> Conversation:
    """Return lmms-eval's messages, whose pictures are inside them, as the chat template and the processor take them.

    Raises:
        ValueError: for videos and sounds.
    """
    pictures, turns = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                pictures.append(part["url"])
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append(part)
            else:
                raise ValueError(f"The task has a {part['type']}, and the model takes pictures and texts only.")
        turns.append({"role": message["role"], "content": parts})
    return Conversation(turns, pictures)
