"""Configuration of DPVR-LLaVA, and the layer plan that says what every decoder layer does.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing (DPVR), https://arxiv.org/abs/2606.09131, sections 3.2 and
3.3.

A plan holds one word per decoder layer. Text tokens run through every layer; the word says what image tokens do:

    joint    text and image tokens run together, as in any LLaVA
    text     text tokens run alone and do not attend to the image               (Algorithm 1, phase 3)
    context  text tokens attend to image keys and values, which the layer makes from the side branch's output
    reset    the same function as context: all tokens run, then the image tokens are reset to the side branch's output

With L layers, split s and K fusion layers (o = joint, . = text, c = context, r = reset):

    routing                layers 0 ... s-1 | s ... L-1
    none                   o o o o o o o o o o o o o o       vanilla LLaVA, no side branch
    late_fusion, K = 1     o o o o o o o | . . . . . . c     the paper's method
    late_fusion, K = 3     o o o o o o o | . . . . o o c
    fusion_layers=[8, 9]   o o o o o o o | . c c . . . .     sparse fusion, any deep layers
    kv_substitution        o o o o o o o | c c c c c c c     DPVR-KV
    persistent_context     o o o o o o o | r r r r r r r     DPVR-PC, the same function as DPVR-KV
    text_only              o o o o o o o | . . . . . . .     DPVR-LF-ideal; VTW when there is no side branch
    latent                 o | l l l l l l l l l l l l l     context whose keys and values are made from a low-rank
                                                             latent of the image's states (latent_dpvr.py)
"""

import os
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers import LlavaConfig

try:
    from .versions_dpvr import check_transformers
except ImportError:
    from versions_dpvr import check_transformers

try:  # `transformers serve` accepts pictures for the models in this table, whatever the Auto classes say
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:  # transformers 4 has no such table
    pass
else:
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["dpvr_llava"] = "DpvrLlavaForConditionalGeneration"

check_transformers()  # here because the Auto classes load the configuration first

JOINT, TEXT, CONTEXT, RESET = "joint", "text", "context", "reset"
LETTERS = {JOINT: "o", TEXT: ".", CONTEXT: "c", RESET: "r"}
ROUTINGS = ("late_fusion", "persistent_context", "kv_substitution", "text_only", "latent", "none")
SIDE_BRANCH_INITS = ("split_layer", "identity", "random")
FIXED_READERS = ("persistent_context", "kv_substitution", "text_only")  # every deep layer reads the image, or none
LATENT_FIELDS = (
    "latent_rank",
    "latent_split_layer",
    "latent_layers",
    "latent_side_layers",
    "latent_stride",
    "latent_score",
)
LATENT_SCORES = ("norm", "distance")
METHOD_FIELDS = (
    "routing",
    "split_layer",
    "num_side_layers",
    "num_fusion_layers",
    "fusion_layers",
    "side_branch_init",
    *LATENT_FIELDS,
)
DPVR_FIELDS = (*METHOD_FIELDS, "base_model_name_or_path")
PLAN_FIELDS = ("depth", *(name for name in METHOD_FIELDS if name != "side_branch_init"))
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
    latent_stride: int = 0  # 0: context comes from the side branch; k: from a latent of one image token in k
    latent_score: str | None = None  # which: None, every k-th; else those with the highest score

    def __str__(self) -> str:
        """The plan as drawn above, such as "ooooooo|....c"."""
        letters = "".join(LETTERS[mode] for mode in self.modes)
        if self.latent_stride:
            letters = letters.replace(LETTERS[CONTEXT], "l")
        return f"{letters[: self.split_layer]}|{letters[self.split_layer :]}"

    def keys_in(self, layer: int) -> str:
        """Whose keys a layer holds after a prompt: "joint", all tokens'; "text"; or "context", both in turn.

        Layer 0 always holds one key per token, in their order, as a cache is asked there how long the sequence is.
        """
        mode = self.modes[layer]
        return "joint" if layer == 0 or mode == RESET else mode

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
        fusion_layers: for "late_fusion", the layers from the split on that run as `context`, in place of the last K.
            None: the last `num_fusion_layers`. With a list, leave `num_fusion_layers` at 1 or set it to the length.
            Refused, as is K above 1, with the routings in which every deep layer reads the image, or none.
        side_branch_init: how a new side branch starts: "split_layer" (a copy of the base layers from the split on),
            "identity" (the same with its output projections at zero) or "random".
        latent_rank: r, the width of the latent that "latent" reads; None: the model has no latent.
        latent_split_layer: the split of "latent", from 0 on; None: `split_layer`.
        latent_layers: the layers that read the latent; None: all from that split on.
        latent_side_layers: decoder layers that image states run through before the latent.
        latent_stride: k: only every k-th image token of a row is read, its first among them; in layer 0 all are.
        latent_score: read, in place of every k-th, the share 1/k of each picture's tokens that stand out most: "norm",
            whose states are longest, or "distance", which differ most in direction from the picture's mean. Pictures
            without text between them are chosen from together; one that is given in pieces, piece by piece.
        base_model_name_or_path: the frozen LLaVA, if this repository holds the side branch alone; None if it holds
            all weights.
        **kwargs: the fields of `LlavaConfig`.

    Raises:
        ValueError: for contradictory or misspelt fields.
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
        latent_rank: int | None = None,
        latent_split_layer: int | None = None,
        latent_layers: list[int] | None = None,
        latent_side_layers: int = 0,
        latent_stride: int = 1,
        latent_score: str | None = None,
        base_model_name_or_path: str | None = None,
        **kwargs,
    ):
        _refuse_misspelt(kwargs)
        for name in ("image_token_index", "image_token_id"):
            if kwargs.get(name, 0) is None:
                raise ValueError(f"{name} is None: set it to the tokenizer's id of '<image>' (LLaVA-1.5: 32000).")
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)
        self.routing = routing
        self.split_layer = split_layer
        self.num_side_layers = num_side_layers
        self.num_fusion_layers = num_fusion_layers
        self.fusion_layers = fusion_layers
        self.side_branch_init = side_branch_init
        self.latent_rank = latent_rank
        self.latent_split_layer = latent_split_layer
        self.latent_layers = latent_layers
        self.latent_side_layers = latent_side_layers
        self.latent_stride = latent_stride
        self.latent_score = latent_score
        self.base_model_name_or_path = base_model_name_or_path
        self.check_dpvr_fields()

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Called by transformers for every file that a config is read from.

        Raises:
            ValueError: if it is no JSON object, or not a LLaVA's.
        """
        try:
            values = super()._dict_from_json_file(json_file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_file} is no JSON ({error}): download it or save the model again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{json_file} is a {type(values).__name__}, and a JSON object is needed: save it again.")
        if values.get("model_type") not in (cls.model_type, LlavaConfig.model_type):
            raise ValueError(
                f"{json_file} is of a model of type {values.get('model_type')!r}, and a LLaVA is needed, of type "
                f"{LlavaConfig.model_type!r} or {cls.model_type!r}: a side branch on another model is a PEFT adapter "
                "(docs/adapter.md)."
            )
        for name in ("text_config", "vision_config", "quantization_config"):
            if not isinstance(values.get(name, {}), dict) and (name, values[name]) != ("quantization_config", None):
                raise ValueError(
                    f"{json_file} has {name}={values[name]!r}, and a JSON object is needed: save the model again."
                )
        return values

    def dpvr_fields(self) -> dict[str, Any]:
        """The fields of the method by name, without the base: what another base needs for the same side branch.

        Fusion layers are left out under a routing without them, to which `set_routing` may have switched.
        """
        own = {name: vars(self)[name] for name in METHOD_FIELDS}
        return own | ({"fusion_layers": None, "num_fusion_layers": 1} if self.routing in FIXED_READERS else {})

    def layer_plan(self, routing: str | None = None) -> LayerPlan:
        """The plan that these fields describe.

        Args:
            routing: used in place of `self.routing`.

        Raises:
            ValueError: for a contradiction among the fields.
        """
        fields = dict(zip(PLAN_FIELDS, self.plan_fields, strict=True))
        return make_plan(**fields | {"routing": routing or self.routing})

    @property
    def plan_fields(self) -> tuple:
        """The values of `PLAN_FIELDS`; while they are equal, so is the plan."""
        values = (self.text_config.num_hidden_layers, *(vars(self)[name] for name in PLAN_FIELDS[1:]))
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)  # lists may be changed

    def check_dpvr_fields(self) -> None:
        """Raise ValueError for a contradiction among the fields."""
        check_choice("side_branch_init", self.side_branch_init, SIDE_BRANCH_INITS)
        self.layer_plan()
        depth, count = self.text_config.num_hidden_layers, self.num_side_layers
        if not (_is_count(self.split_layer) and _is_count(count) and count <= depth):  # with routing "none", too
            raise ValueError(
                f"split_layer is {self.split_layer!r} and num_side_layers {count!r}: the first is a number of layers, "
                f"and the side branch has 0 to {depth}, the depth of the decoder."
            )
        check_fusion_fields(self.routing, self.num_fusion_layers, self.fusion_layers)
        base = self.base_model_name_or_path
        if base is not None and (not isinstance(base, str) or not base.strip()):
            raise ValueError(
                f"base_model_name_or_path is {base!r}: name the base by its Hub id or folder, or set it to None if "
                "the repository holds all weights."
            )
        if self.latent_rank is not None:
            self.layer_plan("latent")


def vanilla_plan(depth: int) -> LayerPlan:
    """The plan of a decoder of `depth` layers that runs as it is: all layers joint."""
    return LayerPlan(depth, (JOINT,) * depth)


def make_plan(
    depth: int,
    *,
    routing: str = "late_fusion",
    split_layer: int = 18,
    num_side_layers: int = 1,
    num_fusion_layers: int = 1,
    fusion_layers: Sequence[int] | None = None,
    latent_rank: int | None = None,
    latent_split_layer: int | None = None,
    latent_layers: Sequence[int] | None = None,
    latent_side_layers: int = 0,
    latent_stride: int = 1,
    latent_score: str | None = None,
    recurrent: Collection[int] = (),
) -> LayerPlan:
    """The layer plan of a decoder of `depth` layers; the fields are `DpvrLlavaConfig`'s.

    Args:
        recurrent: layers that keep no keys, in which text cannot read the image (decoders_dpvr.py).

    Raises:
        ValueError: for a contradiction among the fields.
    """
    check_choice("routing", routing, ROUTINGS)
    if routing == "none":
        return vanilla_plan(depth)
    if routing == "latent":
        split = split_layer if latent_split_layer is None else latent_split_layer
        _check_latent(depth, split, latent_rank, latent_side_layers, latent_stride, latent_score)
        readers = [layer for layer in range(split, depth) if layer not in recurrent]
        _check_layers("latent_layers", depth, readers, split, latent_layers)
        if split == 0 and 0 not in (readers if latent_layers is None else latent_layers):
            raise ValueError(
                f"The latent's split is 0 and layer 0 does not read it (latent_layers is {latent_layers!r}): let it "
                "read, as its cache says how long a sequence is, or split at 1."
            )
        read = set(readers if latent_layers is None else latent_layers)
        deep = tuple(CONTEXT if layer in read else TEXT for layer in range(split, depth))
        return LayerPlan(split, (JOINT,) * split + deep, latent_stride, latent_score)
    _check_side_branch(depth, routing, split_layer, num_side_layers)
    readers = [layer for layer in range(split_layer, depth) if layer not in recurrent]
    _check_fusion_layers(depth, readers, split_layer, num_fusion_layers, fusion_layers)
    plan = [JOINT] * split_layer + [TEXT] * (depth - split_layer)
    if routing == "late_fusion" and fusion_layers is None:
        first, last = readers[-num_fusion_layers], readers[-1]
        plan[first:last] = [JOINT] * (last - first)
        plan[last] = CONTEXT
    elif routing != "text_only":
        for layer in fusion_layers if routing == "late_fusion" else readers:
            plan[layer] = RESET if routing == "persistent_context" else CONTEXT
    return LayerPlan(split_layer, tuple(plan))


def with_fields(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with `fields` in place of some.

    A routing among `fields` leaves fusion layers of `values` behind that it does not have.
    """
    if fields.get("routing") in FIXED_READERS:
        values = {name: value for name, value in values.items() if name not in ("fusion_layers", "num_fusion_layers")}
    return {**values, **fields, "model_type": DpvrLlavaConfig.model_type}


def fields_that_run(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a method with none of what its routing does not run: side layers, or a latent.

    An adapter has one routing and one of the two; a `DpvrLlavaConfig` may have both.
    """
    return {**fields, **({"num_side_layers": 0} if fields["routing"] == "latent" else {"latent_rank": None})}


def check_fusion_fields(routing: str, num_fusion_layers: int, fusion_layers: Sequence[int] | None) -> None:
    """Raise ValueError for fusion layers with a routing that has none to choose."""
    if routing in FIXED_READERS and (fusion_layers is not None or num_fusion_layers != 1):
        name, value = "fusion_layers", fusion_layers
        if fusion_layers is None:
            name, value = "num_fusion_layers", num_fusion_layers
        every = "no" if routing == "text_only" else "every"
        raise ValueError(
            f"{name} is {value!r}, but with routing {routing!r} {every} layer from the split on reads the image: "
            f"leave {name} out, or choose routing='late_fusion'."
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a field has one of these values."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}.")


def _check_side_branch(depth: int, routing: str, split: object, num_side_layers: object) -> None:
    if not (_is_count(split) and 1 <= split < depth):
        raise ValueError(
            f"split_layer is {split!r}, but this decoder has {depth} layers: choose 1 to {depth - 1} (the paper "
            f"splits 32 layers after 18; the same share here is {max(1, round(depth * 18 / 32))})."
        )
    fewest = 0 if routing == "text_only" else 1
    if not (_is_count(num_side_layers) and fewest <= num_side_layers <= depth):
        raise ValueError(
            f"num_side_layers is {num_side_layers!r}, but routing {routing!r} needs {fewest} to {depth}, the depth of "
            "the decoder. Without a side branch choose routing='text_only' (with 0 side layers that is VTW)."
        )


def _check_fusion_layers(depth: int, readers: list[int], split: int, count: object, layers: object) -> None:
    if not readers:
        raise ValueError(
            f"split_layer is {split}, and no layer after it has attention, so that nothing could read the image: "
            "choose an earlier split."
        )
    if not (_is_count(count) and 1 <= count <= len(readers)):
        kind = "layers" if len(readers) == depth - split else "layers of attention"
        raise ValueError(
            f"num_fusion_layers is {count!r}, but {len(readers)} {kind} follow the split at {split}: choose 1 to "
            f"{len(readers)}. For no fusion at all choose routing='text_only'."
        )
    _check_layers("fusion_layers", depth, readers, split, layers)
    if layers is not None and count not in (1, len(layers)):
        raise ValueError(
            f"num_fusion_layers is {count}, but fusion_layers lists {len(layers)} layers, {list(layers)}: set one of "
            "the two and leave the other out."
        )


def _check_latent(
    depth: int, split: object, rank: object, num_side_layers: object, stride: object, score: object
) -> None:
    if rank is None or not (_is_count(rank) and rank >= 1):
        raise ValueError(
            f"latent_rank is {rank!r}, and routing 'latent' needs a latent: choose a rank from 1 on and fit it with "
            "python -m dpvr.training.fit."
        )
    if not (_is_count(split) and 0 <= split < depth):
        raise ValueError(
            f"The latent's split is {split!r}, but this decoder has {depth} layers: choose 0 to {depth - 1}."
        )
    if not (_is_count(num_side_layers) and num_side_layers <= depth) or not (_is_count(stride) and stride >= 1):
        raise ValueError(
            f"latent_side_layers is {num_side_layers!r} and latent_stride {stride!r}: choose 0 to {depth} "
            "layers, and read every k-th image token with k from 1 on."
        )
    if score is not None and (score not in LATENT_SCORES or stride == 1):
        raise ValueError(
            f"latent_score is {score!r} with latent_stride {stride}: choose {' or '.join(LATENT_SCORES)} and a "
            "latent_stride from 2 on, as one token in so many is read; None reads every k-th."
        )


def _check_layers(name: str, depth: int, readers: list[int], split: int, layers: object) -> None:
    """Raise ValueError unless the field `name` lists deep layers that can read the image, or is None."""
    if layers is None:
        return
    layers = list(layers) if isinstance(layers, tuple) else layers
    allowed = isinstance(layers, list) and all(_is_count(layer) and split <= layer < depth for layer in layers)
    if not allowed or len(layers) == 0:
        raise ValueError(
            f"{name} is {layers!r}, but the image can be read from split_layer={split} to {depth - 1}: list "
            "layers of this range. For no fusion at all choose routing='text_only'."
        )
    if blind := sorted(set(layers) - set(readers)):
        raise ValueError(
            f"{name} names {blind}, which are recurrent and keep no keys, so that text cannot read the image "
            f"there: list some of {readers}."
        )
    if layers != sorted(set(layers)):
        raise ValueError(f"{name} is {layers!r}: list each layer once, in ascending order, as {sorted(set(layers))}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_misspelt(kwargs: dict) -> None:
    """Refuse a near miss of a DPVR field: `LlavaConfig` keeps any keyword, so the typing error would go unnoticed."""
    for key in kwargs:
        if key not in LlavaConfig.__dict__ and (match := get_close_matches(key, DPVR_FIELDS, n=1, cutoff=0.87)):
            raise ValueError(
                f"There is no field {key!r}: did you mean {match[0]!r}? The DPVR fields are {', '.join(DPVR_FIELDS)}."
            )


DpvrLlavaConfig.register_for_auto_class()
