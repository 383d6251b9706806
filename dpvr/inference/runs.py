"""One call of `generate`: its tokens as they come, and where its time went.

    turns, pictures -> processor -> vision tower, projector -> prefill -> first token -> ... -> last token
                       prepare      vision                    prefill     decode                            seconds

Times are taken between the moments at which the stages hand over, each once the device has done all it was given;
nothing is estimated but the FLOPs, which are the model's cost formula.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer

from dpvr.inference.ways import StockWays
from images_dpvr import mark_ids
from versions_dpvr import cache_in

MIB = 2**20


@dataclass(frozen=True)
class Readout:
    """Where the time of one answer went; milliseconds unless said.

    Attributes:
        prepare: template, tokenizer and picture preprocessing; pictures have been opened before.
        vision: vision tower and projector, 0 without a picture.
        prefill: the rest of the time to the first token, with what `generate` sets up.
        first_token: prepare, vision and prefill together: the time to first token.
        decode: from the first token to the last.
        decode_per_token: of each token after the first, None if there was none.
        tokens_per_second: after the first, None if there was none.
        kv_mib: keys and values in the cache at the end of the answer, MiB.
        prefill_gflops: of the language model, by the model's cost formula.
    """

    routing: str
    prepare: float
    vision: float
    prefill: float
    first_token: float
    decode: float
    decode_per_token: float | None
    tokens_per_second: float | None
    kv_mib: float
    prefill_gflops: float
    image_tokens: int
    text_tokens: int
    new_tokens: int


class Run(BaseStreamer):
    """One call of `generate`, in the worker's thread: its tokens as they come, and the moments between its stages."""

    def __init__(self, model: PreTrainedModel | PeftModel, ways: StockWays, prepare: float) -> None:
        self.model = model
        self.ways = ways
        self.stop = threading.Event()
        self.prepare = prepare
        self.vision: list[float] = []
        self.tokens: list[int] = []
        self.moments: list[float] = []  # one per token
        self.arrived: queue.Queue[int | None] = queue.Queue()
        self.knows_prompt = False

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, pool: ThreadPoolExecutor, inputs: dict[str, torch.Tensor], **settings: Any) -> Future:
        self.start = self.now()
        settings |= {"streamer": self, "return_dict_in_generate": True, "stopping_criteria": [Stop(self.stop)]}
        job = pool.submit(self.model.generate, **inputs, **settings)
        job.add_done_callback(lambda _: self.arrived.put(None))
        return job

    def put(self, value: torch.Tensor) -> None:
        if not self.knows_prompt:  # which comes first
            self.knows_prompt = True
            return
        self.moments.append(self.now())
        self.tokens += value.flatten().tolist()
        self.arrived.put(len(self.tokens))

    def end(self) -> None:
        """Nothing: the job's own end is what counts, as it may also fail."""

    def growing(self) -> Iterator[list[int]]:
        """Yield the tokens so far each time one has come, or several while nobody asked, until the job is done."""
        while (count := self.arrived.get()) is not None:
            if self.arrived.empty():
                yield self.tokens[:count]

    def readout(self, inputs: dict[str, torch.Tensor], output: Any) -> Readout:
        total, image = inputs["input_ids"].shape[1], num_image_tokens(self.model.config, inputs["input_ids"])
        vision = sum(self.vision)
        decode, later = self.moments[-1] - self.moments[0], len(self.tokens) - 1
        to_first = self.moments[0] - self.start
        kept = [layer for layer in cache_in(output).layers if isinstance(layer, CacheLayerMixin)]  # others: recurrent
        keys = [layer.keys.nbytes + layer.values.nbytes for layer in kept if layer.keys is not None]
        return Readout(
            routing=self.ways.now,
            prepare=1e3 * self.prepare,
            vision=1e3 * vision,
            prefill=1e3 * (to_first - vision),
            first_token=1e3 * (self.prepare + to_first),
            decode=1e3 * decode,
            decode_per_token=1e3 * decode / later if later else None,
            tokens_per_second=later / decode if later else None,
            kv_mib=sum(keys) / MIB,
            prefill_gflops=self.ways.prefill_flops(image, total - image) / 1e9,
            image_tokens=image,
            text_tokens=total - image,
            new_tokens=len(self.tokens),
        )


def num_image_tokens(config: PretrainedConfig, input_ids: torch.Tensor) -> int:
    return int(torch.isin(input_ids, torch.tensor(mark_ids(config), device=input_ids.device)).sum())


class Stop(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def of_the_model() -> Iterator[None]:
    """Tell an error of the model, whose input has been checked, from one of the person who asks: a ValueError."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError("The model failed at an input that had been checked.") from error
