"""Configuration of DPVR-LLaVA, and the layer plan that says what every decoder layer does.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing (DPVR), https://arxiv.org/abs/2606.09131, sections 3.2 and
3.3.

A plan is one word per decoder layer: what the image stream does there while the text stream is always computed.

    joint    text and image run together, the image states move on            (an ordinary LLaVA layer)
    text     text runs alone and never sees the image, which waits            (Algorithm 1, phase 3)
    context  text attends to image keys and values made from the side branch's output, which does not move on
    reset    like context, computed the long way: a full layer whose image outputs are thrown away (DPVR-PC)

With L layers, split s and K fusion layers (o = joint, . = text, c = context, r = reset):

    routing                layers 0 ... s-1 | s ... L-1
    none                   o o o o o o o o o o o o o o       vanilla LLaVA, no side branch
    late_fusion, K = 1     o o o o o o o | . . . . . . c     the paper's method
    late_fusion, K = 3     o o o o o o o | . . . . o o c
    fusion_layers=[8, 9]   o o o o o o o | . c c . . . .     sparse fusion, any deep layers
    kv_substitution        o o o o o o o | c c c c c c c     DPVR-KV
    persistent_context     o o o o o o o | r r r r r r r     DPVR-PC, the same function as DPVR-KV
    text_only              o o o o o o o | . . . . . . .     DPVR-LF-ideal; VTW when there is no side branch
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from transformers import LlavaConfig

try:
    from .versions_dpvr import check_transformers
except ImportError:
    from versions_dpvr import check_transformers

try:  # `transformers serve` takes a model to see pictures if this table has its name, whatever the Auto classes say
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:  # transformers 4 has no such table
    pass
else:
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["dpvr_llava"] = "DpvrLlavaForConditionalGeneration"

check_transformers()  # here, as the Auto classes load a configuration before anything else

JOINT, TEXT, CONTEXT, RESET = "joint", "text", "context", "reset"
LETTERS = {JOINT: "o", TEXT: ".", CONTEXT: "c", RESET: "r"}
ROUTINGS = ("late_fusion", "persistent_context", "kv_substitution", "text_only", "none")
SIDE_BRANCH_INITS = ("split_layer", "identity", "random")
DPVR_FIELDS = (
    "routing",
    "split_layer",
    "num_side_layers",
    "num_fusion_layers",
    "fusion_layers",
    "side_branch_init",
    "base_model_name_or_path",
)
PLAN_FIELDS = ("depth", "routing", "split_layer", "num_side_layers", "num_fusion_layers", "fusion_layers")
AUTO_MAP = {
    "AutoConfig": "configuration_dpvr.DpvrLlavaConfig",
    "AutoModel": "modeling_dpvr.DpvrLlavaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_dpvr.DpvrLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_dpvr.DpvrLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_dpvr.DpvrLlavaForConditionalGeneration",
}


class LayerPlan(NamedTuple):
    """What every decoder layer does; image tokens take the side branch before layer `split_layer`."""

    split_layer: int
    modes: tuple[str, ...]  # one of JOINT, TEXT, CONTEXT, RESET per layer

    def __str__(self) -> str:
        """As drawn above: "ooooooo|....c"."""
        letters = "".join(LETTERS[mode] for mode in self.modes)
        return f"{letters[: self.split_layer]}|{letters[self.split_layer :]}"

    @property
    def is_vanilla(self) -> bool:
        """Whether every layer is an ordinary LLaVA layer."""
        return self.split_layer == len(self.modes)

    @property
    def reads_side_branch(self) -> bool:
        return any(mode != TEXT for mode in self.modes[self.split_layer :])


class DpvrLlavaConfig(LlavaConfig):
    """A `LlavaConfig` plus the fields of the method.

    Args:
        routing: one of "late_fusion" (DPVR-LF, paper section 3.2), "persistent_context" (DPVR-PC) and
            "kv_substitution" (DPVR-KV, both section 3.3), "text_only" (DPVR-LF-ideal) and "none" (vanilla LLaVA).
        split_layer: s, the number of decoder layers that image and text share; 1 <= s < number of layers.
        num_side_layers: d_v, the decoder layers of the side branch (paper section 4.5). 0 is for "text_only" and
            "none".
        num_fusion_layers: K, how many of the last layers fuse the streams again; 1 <= K <= layers - s.
        fusion_layers: for "late_fusion", the deep layers that read the image, each as `context`, in place of the last
            K; None means the last `num_fusion_layers`, which beside a list is left at 1 or says its length.
        side_branch_init: what a new side branch starts from: "split_layer" (a copy of the base layers from the split
            on), "identity" (the same with its output projections at zero) or "random".
        base_model_name_or_path: where the frozen LLaVA lies when this repository holds nothing but the side branch;
            None when the repository holds all weights.
        **kwargs: the fields of `LlavaConfig`.

    Raises:
        ValueError: for contradictory or misspelt fields; the message names expected, got and remedy.
    """

    model_type = "dpvr_llava"

    def __init__(
        self,
        routing: str = "late_fusion",
        split_layer: int = 18,
        num_side_layers: int = 1,
        num_fusion_layers: int = 1,
        fusion_layers: list[int] | None = None,
        side_branch_init: str = "split_layer",
        base_model_name_or_path: str | None = None,
        **kwargs,
    ):
        _refuse_misspelt(kwargs)
        for name in ("image_token_index", "image_token_id"):
            _require(
                kwargs.get(name, 0) is not None,
                f"{name}, the id of '<image>' in the tokenizer, to be an integer",
                None,
                "set it in the config; LLaVA-1.5 has 32000",
            )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)
        self.routing = routing
        self.split_layer = split_layer
        self.num_side_layers = num_side_layers
        self.num_fusion_layers = num_fusion_layers
        self.fusion_layers = fusion_layers
        self.side_branch_init = side_branch_init
        self.base_model_name_or_path = base_model_name_or_path
        self.check_dpvr_fields()

    def layer_plan(self, routing: str | None = None) -> LayerPlan:
        """The plan that these fields describe, checked.

        Args:
            routing: a routing to plan for in place of `self.routing`; the other fields stay.
        """
        fields = dict(zip(PLAN_FIELDS, self.plan_fields, strict=True))
        return make_plan(**fields | {"routing": routing or self.routing})

    @property
    def plan_fields(self) -> tuple:
        """The values of `PLAN_FIELDS`: while they stay the same, so does the plan."""
        layers = self.fusion_layers
        return (
            self.text_config.num_hidden_layers,
            self.routing,
            self.split_layer,
            self.num_side_layers,
            self.num_fusion_layers,
            tuple(layers) if isinstance(layers, list) else layers,  # a list may be changed in place
        )

    def check_dpvr_fields(self) -> None:
        """Raise `ValueError` for a contradiction among the fields."""
        _require(
            self.side_branch_init in SIDE_BRANCH_INITS,
            f"side_branch_init to be one of {SIDE_BRANCH_INITS}",
            self.side_branch_init,
            "pick one of these names",
        )
        self.layer_plan()


def make_plan(
    depth: int,
    *,
    routing: str = "late_fusion",
    split_layer: int = 18,
    num_side_layers: int = 1,
    num_fusion_layers: int = 1,
    fusion_layers: Sequence[int] | None = None,
) -> LayerPlan:
    """The layer plan of a decoder of `depth` layers; the fields are `DpvrLlavaConfig`'s.

    Raises:
        ValueError: for a contradiction among the fields.
    """
    _require(routing in ROUTINGS, f"routing to be one of {ROUTINGS}", routing, "pick one of these names")
    if routing == "none":
        return LayerPlan(depth, (JOINT,) * depth)
    _check_side_branch(depth, routing, split_layer, num_side_layers)
    _check_fusion_layers(depth, split_layer, num_fusion_layers, fusion_layers)
    deep = {"persistent_context": RESET, "kv_substitution": CONTEXT}.get(routing, TEXT)
    plan = [JOINT] * split_layer + [deep] * (depth - split_layer)
    if routing == "late_fusion":
        if fusion_layers is not None:
            for layer in fusion_layers:
                plan[layer] = CONTEXT
        else:
            plan[depth - num_fusion_layers : -1] = [JOINT] * (num_fusion_layers - 1)
            plan[-1] = CONTEXT
    return LayerPlan(split_layer, tuple(plan))


def _check_side_branch(depth: int, routing: str, split: object, num_side_layers: object) -> None:
    _require(
        _is_count(split) and 1 <= split < depth,
        f"split_layer to be an integer from 1 to {depth - 1}, for a decoder of {depth} layers",
        split,
        f"the paper's 18 of 32 would be {max(1, round(depth * 18 / 32))} here",
    )
    _require(
        _is_count(num_side_layers) and (num_side_layers >= 1 or routing == "text_only"),
        f"num_side_layers to be an integer of at least 1 with routing {routing!r}",
        num_side_layers,
        "give the side branch a layer, or use routing='text_only' (with 0 side layers that is VTW)",
    )


def _check_fusion_layers(depth: int, split: int, count: object, layers: object) -> None:
    _require(
        _is_count(count) and 1 <= count <= depth - split,
        f"num_fusion_layers to be an integer from 1 to {depth - split}, the layers from the split at {split} on",
        count,
        "fuse fewer layers or split earlier; no fusion at all is routing='text_only'",
    )
    if layers is None:
        return
    _require(
        isinstance(layers, list | tuple)
        and len(layers) > 0
        and all(_is_count(layer) and split <= layer < depth for layer in layers),
        f"fusion_layers to be layer indices from split_layer={split} to {depth - 1}",
        layers,
        "drop the layers outside the deep stack; no fusion at all is routing='text_only'",
    )
    _require(
        list(layers) == sorted(set(layers)),
        "fusion_layers in ascending order, each once",
        layers,
        f"write {sorted(set(layers))}",
    )
    _require(
        count in (1, len(layers)),
        f"num_fusion_layers={len(layers)} beside the {len(layers)} fusion_layers {layers}",
        count,
        "name the fusion layers one way: leave num_fusion_layers out, or fusion_layers",
    )


def _require(condition: bool, expected: str, got: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"Expected {expected}; got {got!r}. Remedy: {remedy}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_misspelt(kwargs: dict) -> None:
    """`LlavaConfig` keeps any keyword it does not know, so a typing error in a DPVR field would be lost in silence."""
    for key in kwargs:
        if key not in LlavaConfig.__dict__ and (match := get_close_matches(key, DPVR_FIELDS, n=1, cutoff=0.87)):
            raise ValueError(
                f"Expected the DPVR fields {DPVR_FIELDS}; got {key!r}. Remedy: did you mean {match[0]!r}?"
            )


DpvrLlavaConfig.register_for_auto_class()
