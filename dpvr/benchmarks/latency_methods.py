"""The models and prompts of the latency benchmark, and what formulas say of their costs.

LlavaBench            what the rounds (latency_rounds.py) ask of a LLaVA; of other families: latency_families.py

shape or dpvr-mini  -->  make_base: one LLaVA  -->  make_method: a model per method, which shares its weights
                                |                        |
Size  -------------------->  make_prompt              counted: FLOPs, bytes of keys and values, layer plan
"""

import itertools
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from configuration_dpvr import DpvrLlavaConfig, LayerPlan, vanilla_plan
from dpvr.benchmarks.phase_clock import PhaseClock
from dpvr.benchmarks.pruning import Pruned, prune
from dpvr.benchmarks.random_models import make_llava
from dpvr.benchmarks.setups import EARLY_READING, FLASH, LARGE, MINI, PRUNING, PRUNINGS, ROUTINGS, SHAPES
from dpvr.benchmarks.time_and_memory import check_device
from modeling_dpvr import DpvrLlavaForConditionalGeneration

Method = DpvrLlavaForConditionalGeneration | Pruned | LlavaForConditionalGeneration
Row = dict[str, Any]


class Size(NamedTuple):
    """A batch of equal prompts: text tokens and pictures of each row."""

    batch_size: int
    text_tokens: int
    num_images: int


class Machine(NamedTuple):
    """Where the models run and in which numbers; on the device "meta" they are counted and not run."""

    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: str, device: str | None, dtype: str | None) -> "Machine":
        """What was asked for; else a GPU, without one the CPU, and "meta" for shapes too large for it.

        The default dtype is float32 on a CPU and bfloat16 elsewhere.

        Raises:
            ValueError: for a device that is not here.
        """
        if device is None:
            large = shape in SHAPES and SHAPES[shape].width >= LARGE
            device = "cuda" if torch.cuda.is_available() else "meta" if large else "cpu"
        return cls(check_device(device), getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")))


def make_base(shape: str, machine: Machine) -> tuple[LlavaForConditionalGeneration, int]:
    """The LLaVA whose weights all methods share, and the split of late fusion."""
    if shape != MINI:
        return make_llava(SHAPES[shape], *machine).eval(), SHAPES[shape].split_layer
    llava = LlavaForConditionalGeneration.from_pretrained(".", dtype=machine.dtype).to(machine.device)
    return llava.eval(), DpvrLlavaConfig.from_pretrained(".").split_layer


def make_method(name: str, llava: LlavaForConditionalGeneration, split_layer: int) -> Method:
    """A model that shares the weights of `llava`; a side branch, where the method has one, is its own."""
    if name in PRUNINGS:
        return prune(llava, **PRUNING, rank=PRUNINGS[name])
    if name == FLASH:
        return llava
    fields = {"routing": "late_fusion", "num_side_layers": 1, "num_fusion_layers": 1, "fusion_layers": None}
    fields |= {"split_layer": split_layer}
    if name in EARLY_READING:
        depth = llava.config.text_config.num_hidden_layers
        layers = sorted({round(layer * depth / 32) for layer in EARLY_READING[name]})
        fields |= {"split_layer": max(1, depth // 4), "fusion_layers": layers}
    else:
        fields |= ROUTINGS[name]
    return DpvrLlavaForConditionalGeneration.from_llava(llava, **fields)


def why_not(name: str, machine: Machine) -> str | None:
    """Why a method cannot run here."""
    if machine.device == "meta":
        return "not measured: no GPU"
    if name == FLASH and not is_flash_attn_2_available():
        return "not measured: flash attention is not installed"
    return None


@contextmanager
def kernels_of(name: str, llava: LlavaForConditionalGeneration) -> Iterator[None]:
    """Flash attention for vanilla alone: a context layer needs a mask, which flash attention does not take."""
    if name != FLASH:
        yield
        return
    llava.set_attn_implementation("flash_attention_2")
    try:
        yield
    finally:
        llava.set_attn_implementation("sdpa")


def make_prompt(llava: LlavaForConditionalGeneration, size: Size, machine: Machine) -> dict[str, torch.Tensor]:
    """A token of text, the pictures, then the rest of the text."""
    config = llava.config
    rows, image = size.batch_size, config.image_token_id
    text = torch.randint(image + 1, min(1000, config.text_config.vocab_size), (rows, size.text_tokens))
    images = torch.full((rows, size.num_images * config.image_seq_length), image)
    side = config.vision_config.image_size
    pixels = torch.randn(rows * size.num_images, 3, side, side, dtype=machine.dtype)
    ids = torch.cat([text[:, :1], images, text[:, 1:]], dim=1)
    return {"input_ids": ids.to(machine.device), "pixel_values": pixels.to(machine.device)}


def plan_of(model: Method) -> LayerPlan:
    if isinstance(model, Pruned):
        return model.plan
    if isinstance(model, DpvrLlavaForConditionalGeneration):
        return model.config.layer_plan()
    return vanilla_plan(model.config.text_config.num_hidden_layers)


def counted(model: Method, size: Size, vanilla: DpvrLlavaForConditionalGeneration) -> Row:
    """What formulas say: FLOPs of the prefill without the tower, bytes of keys and values, and what a token costs.

    A decoded token reads every weight of the decoder and the head once, and every key and value of the decoder; a
    prefill reads the weights (and the side branch's) and writes the keys and values. Activations are not counted.
    """
    tokens, plan = (size.num_images * model.config.image_seq_length, size.text_tokens), plan_of(model)
    text, rows = model.config.text_config, size.batch_size
    per_image = vanilla.kv_cache_bytes(tokens[0], 0, batch_size=rows) // text.num_hidden_layers  # in one layer
    kv_bytes = model.kv_cache_bytes(*tokens, batch_size=rows)
    read = kv_bytes - (per_image if plan.reads_side_branch else 0)
    weights = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    matrices, item = sum(weight.numel() for weight in weights if weight.ndim == 2), model.dtype.itemsize
    branch = sum(weight.numel() for weight in model.side_branch.parameters()) if plan.reads_side_branch else 0
    row = {
        "image_tokens": tokens[0],
        "plan": str(plan),
        "prefill_flops": model.prefill_flops(*tokens, batch_size=rows),
        "prefill_bytes": (matrices + branch) * item + kv_bytes,
        "decode_flops": 2 * rows * matrices + 2 * read // item * text.num_attention_heads // text.num_key_value_heads,
        "decode_bytes": matrices * item + read,
        "kv_bytes": kv_bytes,
        "deep_image_layers": None,
    }
    if not isinstance(model, Pruned) and (model is vanilla or model.config.fusion_layers is None):
        row["deep_image_layers"] = deep_image_layers(model, tokens)
    return row


def deep_image_layers(model: DpvrLlavaForConditionalGeneration, tokens: tuple[int, int]) -> float:
    """FLOPs that images cost past the split and in the side branch, in vanilla layers' worth (the unit of Table 1)."""
    everywhere = {
        routing: model.prefill_flops(*tokens, logits_to_keep=0, routing=routing) for routing in ("none", "text_only")
    }
    unit = (everywhere["none"] - everywhere["text_only"]) / (
        len(model.config.layer_plan("none").modes) - model.config.split_layer
    )
    return (model.prefill_flops(*tokens, logits_to_keep=0) - everywhere["text_only"]) / unit


class LlavaBench:
    """What the rounds of the benchmark ask of a LLaVA.

    Attributes:
        shape: its name in the results.
        machine: where it runs and in which numbers.
        tried_ms: None, as the number format is not chosen by trial.
        peak: which peak of memory is measured.
    """

    tried_ms = None
    peak = "peak_bytes"

    def __init__(self, args: Namespace) -> None:
        self.args, self.shape, self.names = args, args.shape, args.methods
        self.machine = Machine.of(args.shape, args.device, args.dtype)

    def load(self) -> None:
        """Make the model and its methods."""
        self.llava, split_layer = make_base(self.shape, self.machine)
        self.models = {name: make_method(name, self.llava, split_layer) for name in self.names}
        self.clock = PhaseClock(self.llava, self.machine.device)

    @contextmanager
    def running(self, name: str) -> Iterator[Method]:
        """The model under a method, with its kernels."""
        with kernels_of(name, self.llava):
            yield self.models[name]

    def why_not(self, name: str) -> str | None:
        """Why a method cannot run here."""
        return why_not(name, self.machine)

    def prompt(self, size: Size) -> dict[str, torch.Tensor]:
        return make_prompt(self.llava, size, self.machine)

    def sizes(self) -> Iterator[Size]:
        return sizes(self.args)

    def count(self, name: str, size: Size) -> Row:
        """What formulas say of a method."""
        vanilla = self.models["vanilla"]
        return counted(vanilla if name == FLASH else self.models[name], size, vanilla)


def sizes(args: Namespace) -> Iterator[Size]:
    return (Size(*values) for values in itertools.product(args.batch_sizes, args.text_tokens, args.num_images))
