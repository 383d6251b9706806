"""Where the time of a LLaVA's prefill goes, part by part."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import LlavaForConditionalGeneration

from dpvr.benchmarks.time_and_memory import synchronize
from modeling_dpvr import DpvrLlavaForConditionalGeneration

PARTS = ("tower", "embedding", "shared_stack", "side_branch", "deep_stack", "last_layer", "head")


class PhaseClock:
    """Milliseconds of a prefill by its parts; each lasts until the next begins.

    tower, embedding, shared stack (layers 0 ... s-1), side branch, deep stack (s ... L-2), last layer, head
    """

    def __init__(self, llava: LlavaForConditionalGeneration, device: str) -> None:
        self.llava, self.device = llava, device
        self.begins: dict[str, float] = {}

    @contextmanager
    def listening(self, model: LlavaForConditionalGeneration, split: int) -> Iterator[None]:
        """Take the time of one prefill of `model`, a method on the LLaVA's own layers that splits after `split`."""
        layers, self.begins = self.llava.model.language_model.layers, {}
        beginnings = [(self.llava.model.vision_tower, "tower"), (layers[0], "shared_stack")]
        if isinstance(model, DpvrLlavaForConditionalGeneration) and len(model.side_branch):
            beginnings.append((model.side_branch[0], "side_branch"))
        if split < len(layers):
            beginnings.append((layers[split].input_layernorm, "deep_stack"))
        beginnings.append((layers[-1].input_layernorm, "last_layer"))  # a context layer writes the image's keys first
        beginnings.append((self.llava.model.language_model.norm, "head"))
        handles = [module.register_forward_pre_hook(partial(self._begin, part)) for module, part in beginnings]
        handles.append(self.llava.model.multi_modal_projector.register_forward_hook(partial(self._begin, "embedding")))
        try:
            yield
            self._begin("end")
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, part: str, *_: Any) -> None:
        if part not in self.begins:
            synchronize(self.device)
            self.begins[part] = time.perf_counter()

    def milliseconds(self) -> dict[str, float]:
        """Of every part; 0 of one that the method does not have."""
        ordered = sorted(self.begins, key=self.begins.get)
        found = {a: 1000 * (self.begins[b] - self.begins[a]) for a, b in itertools.pairwise(ordered)}
        return {part: found.get(part, 0.0) for part in PARTS}
