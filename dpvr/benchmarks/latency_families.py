"""Models of any family in the latency benchmark: a real model's shape with random weights, its plans as one adapter.

config of a model      a file of configs/shapes, a folder or a name on the Hub; no weights are read
    |
    |-- at most 2.5 billion parameters, or a GPU      random weights; the tower is let go
    |       adapters       a DPVR plan each, on the same weights, switched between answers
    |       pruned twins   FastV and random pruning, on the same weights
    `-- larger             counted alone

The image's features are given (`mm_encoder_outputs`), so the time is that of the language model: a tower costs the
same under every method, and most towers give a number of tokens of their own. Axes: B batch, V image, X text tokens.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adapter_dpvr import DpvrConfig
from configuration_dpvr import JOINT, LayerPlan
from decoders_dpvr import decoder_of, deepstack_layers, lowest_split
from dpvr.benchmarks.latency_methods import Machine, Row
from dpvr.benchmarks.pruning import check_prunable, prune, pruned_flops, pruned_kv_numbers
from dpvr.benchmarks.random_models import SEED
from dpvr.benchmarks.setups import PRUNING, PRUNINGS
from dpvr.benchmarks.time_and_memory import check_device, peak_beyond, timed
from dpvr.cost_table import EARLY, load_config, make_model
from dpvr.cost_table import row as cost_row
from images_dpvr import mark_ids
from versions_dpvr import LINE_4

TIMED_UP_TO = 2.5e9  # parameters; larger models are timed on a GPU alone
PREFIX = "plan_"  # of the adapters' names, which may not occur in weights' names


class FamilySize(NamedTuple):
    """A batch of equal prompts: text tokens and image tokens of each row."""

    batch_size: int
    text_tokens: int
    image_tokens: int


WARM_UP = FamilySize(batch_size=1, text_tokens=4, image_tokens=4)  # before the trial of number formats


def plan_fields(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Fields of `DpvrConfig` for each method that is a layer plan; {} is vanilla.

    Late fusion splits at 18/32 of the depth; `read_everywhere` at an eighth, with every deep layer reading the image;
    the latent, of a quarter of the width, after one layer. A split is the lowest that the decoder allows at least.
    """
    text, lowest = config.get_text_config(), lowest_split(config)
    depth = text.num_hidden_layers
    return {
        "vanilla": {},
        "late_fusion": {"routing": "late_fusion", "split_layer": max(lowest, round(depth * 18 / 32))},
        "read_everywhere": {"routing": "kv_substitution", "split_layer": max(lowest, round(depth / EARLY))},
        "latent": {"routing": "latent", "split_layer": lowest, "latent_rank": text.hidden_size // 4},
    }


def why_refused(name: str, config: PretrainedConfig) -> str | None:
    """Why a model's decoder cannot run a method; None if it can."""
    try:
        if name in PRUNINGS:
            check_prunable(config, PRUNING["layer"])
        elif name != "vanilla":
            DpvrConfig(**plan_fields(config)[name]).plan_for(config)
    except ValueError as error:
        return str(error)
    return None


class FamilyBench:
    """What the rounds of the benchmark ask of a model of any family.

    Attributes:
        shape: the name of the model in the results.
        machine: where it runs and in which numbers; on the device "meta" it is counted and not run.
        tried_ms: milliseconds of one prefill in each number format, where the faster was chosen.
        peak: which peak of memory is measured.

    Raises:
        ValueError: if no plan can run on the model, or it is to be timed on a release without given features.
    """

    clock = None  # parts of a prefill are not timed
    peak = "prefill_peak_bytes"

    def __init__(self, args: Namespace) -> None:
        self.args, self.shape, self.names = args, shape_name(args.model), args.methods
        self.config = load_config(args.model)
        self.counted = make_model(self.config)
        self.refused = {name: why_refused(name, self.config) for name in self.names}
        self.machine = machine_for(self.counted.num_parameters, args.device, args.dtype)
        self.tried_ms: dict[str, float] | None = None
        if LINE_4 and self.machine.device != "meta":
            raise ValueError(
                "A model of any family is timed on image features that are given, which transformers 4 does not take: "
                "pip install 'transformers>=5.18', or count it with --device meta."
            )

    def load(self) -> None:
        """Make the model, in the faster number format if none was asked for, and its methods."""
        if self.machine.device == "meta":
            return
        model = make_random(self.config, self.machine)
        if self.machine.device == "cpu" and self.args.dtype is None:
            first = next(self.sizes())
            self.tried_ms = {name: self._one_prefill(model, name, first) for name in ("bfloat16", "float32")}
            self.machine = self.machine._replace(dtype=getattr(torch, min(self.tried_ms, key=self.tried_ms.get)))
            model.to(self.machine.dtype)
        self._attach(model)

    def _one_prefill(self, model: PreTrainedModel, dtype: str, size: FamilySize) -> float:
        """Milliseconds of a prefill of the stock model in a number format, to which its weights are converted."""
        model.to(getattr(torch, dtype))
        warm_up, prompt = make_prompt(model, WARM_UP), make_prompt(model, size)
        with torch.inference_mode():
            model(**warm_up, logits_to_keep=1)
            return timed(lambda: model(**prompt, logits_to_keep=1), self.machine.device)[1]

    def _attach(self, model: PreTrainedModel) -> None:
        """Add an adapter for every plan, and make the pruned twins."""
        runnable = [name for name in self.names if self.refused[name] is None]
        self.model, self.adapted = model, None
        self.pruned = {name: prune(model, **PRUNING, rank=PRUNINGS[name]) for name in runnable if name in PRUNINGS}
        for name in runnable:
            fields = None if name in PRUNINGS else plan_fields(self.config)[name]
            if not fields:
                continue
            options = {"adapter_name": PREFIX + name, "autocast_adapter_dtype": False}
            if self.adapted is None:
                self.adapted = get_peft_model(model, DpvrConfig(**fields), **options).eval()
            else:
                self.adapted.add_adapter(peft_config=DpvrConfig(**fields), **options)

    @contextmanager
    def running(self, name: str) -> Iterator[PreTrainedModel]:
        """The model under a method: a pruned twin, or the model with this plan's adapter active, or with none."""
        if name in self.pruned:
            yield self.pruned[name]
        elif self.adapted is None:
            yield self.model
        elif name == "vanilla":
            with self.adapted.disable_adapter():
                yield self.model
        else:
            self.adapted.set_adapter(PREFIX + name)
            self.adapted.requires_grad_(False)  # trained weights may be run by other kernels
            yield self.model

    def peak_of_one_prefill(self, name: str) -> int:
        """Bytes at the peak of one prefill, its keys and values among them, beyond the weights; after a short one."""
        self.load()
        warm_up, prompt = make_prompt(self.model, WARM_UP), self.prompt(next(self.sizes()))
        with torch.inference_mode(), self.running(name) as model:
            model(**warm_up, logits_to_keep=1)
            return peak_beyond(lambda: model(**prompt, logits_to_keep=1), self.machine.device)

    def why_not(self, name: str) -> str | None:
        """Why a method cannot run here."""
        if self.refused[name] is not None:
            return f"not supported: {self.refused[name]}"
        return "not measured: no GPU" if self.machine.device == "meta" else None

    def prompt(self, size: FamilySize) -> dict[str, Any]:
        return make_prompt(self.model, size)

    def sizes(self) -> Iterator[FamilySize]:
        args = self.args
        return (
            FamilySize(rows, text, image)
            for rows in args.batch_sizes
            for text in args.text_tokens
            for image in args.image_tokens
        )

    def count(self, name: str, size: FamilySize) -> Row:
        """What formulas say of a method: its plan, FLOPs of the language model's prefill, bytes of keys and values."""
        costs, item = self.counted.costs, self.machine.dtype.itemsize
        of_row = {"plan": None, "prefill_flops": None, "kv_bytes": None}
        if self.refused[name] is not None:
            return of_row
        if name in PRUNINGS:
            tokens, cut = (size.image_tokens, size.text_tokens), dict(PRUNING)
            layers, shared = len(costs.layers), PRUNING["layer"]
            of_row["plan"] = str(LayerPlan(shared, (JOINT,) * layers))
            of_row["prefill_flops"] = pruned_flops(costs, *tokens, **cut, rank=PRUNINGS[name])
            of_row["kv_bytes"] = pruned_kv_numbers(costs, *tokens, **cut) * item
        else:
            fields = plan_fields(self.config)[name] or {"routing": "none"}
            asked = Namespace(**size._asdict(), short_vanilla=False, dtype=str(self.machine.dtype).split(".")[-1])
            found = cost_row(self.counted, fields, asked)
            of_row = {key: found[key] for key in of_row}
        return of_row | {key: size.batch_size * of_row[key] for key in ("prefill_flops", "kv_bytes")}


def shape_name(model: str) -> str:
    """A model's name in the results: that of its file, or the last part of its path or name on the Hub."""
    return Path(model).stem if model.endswith(".json") else Path(model).name


def machine_for(num_parameters: int, device: str | None, dtype: str | None) -> Machine:
    """What was asked for; else a GPU, without one the CPU, and "meta" for models that are too large for it.

    Raises:
        ValueError: for a device that is not here.
    """
    if device is None:
        small = num_parameters <= TIMED_UP_TO
        device = "cuda" if torch.cuda.is_available() else "cpu" if small else "meta"
    return Machine(check_device(device), getattr(torch, dtype or "bfloat16"))


def make_random(config: PretrainedConfig, machine: Machine) -> PreTrainedModel:
    """A model of random weights, not trained, without tower and projector, which do not run."""
    torch.manual_seed(SEED)
    with torch.device(machine.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=machine.dtype)
    name, _ = decoder_of(model.model)
    for other in model.model._modules.keys() - {name}:
        setattr(model.model, other, nn.Module())
    return model.eval().requires_grad_(False)


class Features(list):
    """An image's features as families take them: a list of tensors (V, D), or one tensor, which is moved with `to`."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.stack(self).to(*args, **kwargs)


@dataclass
class GivenFeatures(BaseModelOutputWithPooling):
    """What a tower would return, with the features that DeepStack adds in the first layers."""

    deepstack_features: list[list[torch.Tensor]] | None = None


def image_id(config: PretrainedConfig) -> int:
    """The id of the token that stands for an image."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next(value for value in found if value is not None)


def make_prompt(model: PreTrainedModel, size: FamilySize) -> dict[str, Any]:
    """A token of text, the image with its features, then the rest of the text; without padding."""
    text, marks = model.config.get_text_config(), mark_ids(model.config)
    like = next(decoder_of(model.model)[1].layers.parameters())
    rows, vocabulary = size.batch_size, [i for i in range(min(1000, text.vocab_size)) if i not in marks]
    ids = torch.tensor(vocabulary)[torch.randint(len(vocabulary), (rows, size.text_tokens))]
    image = torch.full((rows, size.image_tokens), image_id(model.config))

    def features() -> Features:
        drawn = torch.randn(rows, size.image_tokens, text.hidden_size, dtype=like.dtype, device=like.device)
        return Features(drawn * text.initializer_range)

    deepstack = [list(features()) for _ in range(deepstack_layers(model.config))]
    outputs = GivenFeatures(pooler_output=features(), deepstack_features=deepstack)
    input_ids = torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1).to(like.device)
    return {"input_ids": input_ids, "mm_encoder_outputs": {"image": outputs}}
