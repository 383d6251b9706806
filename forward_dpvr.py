"""The forward of a vision-language model under a layer plan: how a chunk of tokens is run.

    all layers joint, or no image so far          the stock model's forward
    a chunk with images                           the stock forward on a twin that runs the plan (two_stream_dpvr.py)
    text after images                             on a twin that gives each layer the mask columns of its own keys
    one token after a prompt without padding      the stock model's forward, on the cache as it is

A twin is a copy of a model with the same weights, in which the layers are replaced (twins_dpvr.py). `routed_forward`
serves a LLaVA with its own side branch (modeling_dpvr.py) and a stock one with a side branch in a PEFT adapter
(adapter_dpvr.py). Paper section 3.2. Axes: B batch, T tokens of the chunk, K keys, D width, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

try:
    from .cache_dpvr import CacheRecord, ChunkNotes, continue_cache, is_static
    from .configuration_dpvr import DpvrLlavaConfig, LayerPlan
    from .decoders_dpvr import RECURRENT, decoder_of, layer_kinds
    from .images_dpvr import find_images
    from .self_check_dpvr import check_untested
    from .streams_dpvr import mask_of_keys, shifted
    from .twins_dpvr import MASK, RoutedLayer, routed_twin
    from .two_stream_dpvr import TwoStreamPass, eagerly
    from .versions_dpvr import LINE_4, argument_names, cache_in
except ImportError:
    from cache_dpvr import CacheRecord, ChunkNotes, continue_cache, is_static
    from configuration_dpvr import DpvrLlavaConfig, LayerPlan
    from decoders_dpvr import RECURRENT, decoder_of, layer_kinds
    from images_dpvr import find_images
    from self_check_dpvr import check_untested
    from streams_dpvr import mask_of_keys, shifted
    from twins_dpvr import MASK, RoutedLayer, routed_twin
    from two_stream_dpvr import TwoStreamPass, eagerly
    from versions_dpvr import LINE_4, argument_names, cache_in

SUPPORTED_DECODERS = ("llama", "mistral", "qwen2")
SUPPORTED_ATTENTION = ("eager", "sdpa", "flex_attention")


class RoutedModel:
    """A mixin that `routed_model` puts before the class of a stock model without its head.

    Attributes:
        stock: that class of the library.
        plan: what every decoder layer does; the inheriting class provides it.
        branch: the side branch that the plan uses; likewise.
        is_base: whether `plan` is the base's for now, see `as_base`.
    """

    stock: type
    plan: LayerPlan
    branch: nn.ModuleList
    is_base = False

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The model runs as its base meanwhile, whatever its plan."""
        self.is_base = True
        try:
            yield
        finally:
            self.is_base = False


@lru_cache
def routed_model(stock: type) -> type:
    """A subclass of a stock model without its head, with the same name, whose forward is `routed_forward`."""
    names = argument_names(stock.forward)

    @can_return_tuple
    @wraps(stock.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return routed_forward(self, stock.forward, self.branch, self.plan, arguments)

    own = {"forward": forward, "stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (RoutedModel, stock), own)


def stock_class(owner: nn.Module) -> type:
    """The library's class of a vision-language model without its head, whose forward does not route."""
    return owner.stock if hasattr(type(owner), "stock") else type(owner)


def routed_forward(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    arguments: dict[str, Any],
    *,
    make_pass: Callable[..., TwoStreamPass] = TwoStreamPass,
) -> ModelOutput:
    """Run the forward of a vision-language model without its head under a layer plan.

    Args:
        owner: the model: tower, projector and decoder.
        stock_forward: its forward in the library, which is called on the model or on a twin.
        side_branch: decoder layers of the same shapes, whose `layer_idx` follow the decoder's.
        plan: what every decoder layer does.
        arguments: of the stock forward, by name; and `kept_logits`, the value of `logits_to_keep`. With n > 0 only the
            last n tokens are queries in the last layer, and last_hidden_state at the other tokens has no meaning.
        make_pass: makes the object that runs the layers for a chunk with images.

    Returns:
        What the stock forward returns. Past the split image tokens are context, not queries: last_hidden_state at them
        is the side branch's output, as are hidden_states until a joint layer updates them.

    Raises:
        ValueError: for image tokens and pixels that do not match, masks of a wrong shape, options that a routing does
            not support, and a cache that was filled under another plan.
    """
    arguments = dict(arguments)
    kept, cache = arguments.pop("kept_logits", 0), cache_in(arguments)
    image_mask = find_images(owner, arguments)
    record = continue_cache(cache, plan)
    if plan.is_vanilla or (image_mask is None and record is None):
        output = stock_forward(owner, **arguments)
        if image_mask is not None and cache_in(output) is not None:
            CacheRecord(plan, len(image_mask)).put_on(cache_in(output))  # so that another plan refuses this cache
        output.last_hidden_state = _with_gradient(output.last_hidden_state, side_branch)
        return output
    _check(owner, plan, arguments, cache)
    if image_mask is None:
        return _text_chunk(owner, stock_forward, record, arguments, cache)
    return _image_chunk(owner, stock_forward, side_branch, plan, arguments, image_mask, record, kept, make_pass)


@eagerly
def _image_chunk(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    arguments: dict[str, Any],
    image_mask: torch.Tensor,
    record: CacheRecord | None,
    kept: int | torch.Tensor,
    make_pass: Callable[..., TwoStreamPass],
) -> ModelOutput:
    """Run a chunk with images, on a twin made for it. This function is not compiled, the stock layers may be."""
    check_untested(owner)
    if arguments.get("use_cache") is None and owner.training:
        arguments["use_cache"] = False
    mask, wanted = arguments.get(MASK), _states_wanted(owner, arguments)
    two_stream_pass = make_pass(
        side_branch,
        plan,
        image_mask,
        record=record,
        padded=None if mask is None else (mask == 0).any() if _is_flat(mask) else torch.tensor(True),
        tail=None if wanted else _text_tail(kept, image_mask),
        keep_states=bool(wanted),
    )
    _text_twin(owner)  # made now because decoding may be compiled, and making it cannot be traced
    image_twin = routed_twin(owner, two_stream_pass)
    output = stock_forward(image_twin, **arguments)
    _hand_on(image_twin, owner)
    return _with_states(output, two_stream_pass.states, wanted)


def _hand_on(giver: nn.Module, taker: nn.Module) -> None:
    """Set the attributes of one model that its stock forward sets or reads, as rope_deltas, on a twin of it."""
    for name, value in vars(giver).items():
        if not name.startswith("_") and name in vars(taker) and vars(taker)[name] is not value and not callable(value):
            vars(taker)[name] = value


def _text_chunk(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    record: CacheRecord,
    arguments: dict[str, Any],
    cache: Cache,
) -> ModelOutput:
    """Run a chunk of text on a cache that has seen images; a single token needs no synchronisation with the device."""
    ids, mask, static = arguments.get("input_ids"), arguments.get(MASK), is_static(cache)
    length = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
    flat = mask is None or _is_flat(mask)
    if not static and length > 1 and record.plain and mask is not None:
        record.plain = flat and bool(mask.all())
    config = decoder_of(owner)[1].config
    without_windows = not set(layer_kinds(config)) - {"full_attention", RECURRENT}
    if length == 1 and flat and not static and without_windows and config._attn_implementation == "sdpa":
        if record.plain:
            return stock_forward(owner, **{**arguments, MASK: None})
        if mask is not None and RECURRENT not in layer_kinds(config) and "rope_deltas" not in vars(owner):
            # the mask of the stock decoder, which would check for padding first and so synchronise with the device
            arguments[MASK] = mask.bool()[:, None, None, :]
    places, end = record.tables, 0
    if static:
        if LINE_4 and arguments.get("cache_position") is None:  # the stock decoder would synchronise to make it
            arguments["cache_position"] = cache.get_seq_length() + torch.arange(length, device=places["text"].device)
    else:
        past = cache.get_seq_length()
        new = torch.arange(past, past + length, device=places["text"].device).expand(len(places["text"]), -1)
        places = {kind: torch.cat([record.slots(kind, past), new], dim=1) for kind in ("text", "context")}
        end = past + length
    wanted, text_twin = _states_wanted(owner, arguments), _text_twin(owner)
    record.step = ChunkNotes(places, end=end, states=[] if wanted else None)
    _hand_on(owner, text_twin)
    output = stock_forward(text_twin, **arguments)
    _hand_on(text_twin, owner)
    states, record.step = record.step.states, None
    return _with_states(output, states, wanted)


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def _states_wanted(owner: nn.Module, arguments: dict[str, Any]) -> bool | int | list[int]:
    """Return which hidden states are wanted, and turn off stock's recording of them, which would see one stream."""
    wanted = arguments.get("output_hidden_states")
    wanted = owner.config.output_hidden_states if wanted is None else wanted
    arguments |= {"output_hidden_states": False, "return_dict": True}
    return wanted


def _with_states(
    output: ModelOutput, states: list[torch.Tensor] | None, wanted: bool | int | list[int]
) -> ModelOutput:
    if states is not None:
        states = [*states, output.last_hidden_state]
        if not isinstance(wanted, bool):  # indices of states, from transformers 5.24 on
            chosen = [wanted] if isinstance(wanted, int) else wanted
            states = [state if at in chosen or at - len(states) in chosen else None for at, state in enumerate(states)]
        output.hidden_states = tuple(states)
    return output


def _text_tail(kept: int | torch.Tensor, image_mask: torch.Tensor) -> int | None:
    """The number of last tokens among which all kept ones are, or None if an image token is among them."""
    length = image_mask.shape[1]
    tail = length - int((kept % length).min()) if isinstance(kept, torch.Tensor) else min(kept, length)
    return None if tail == 0 or bool(image_mask[:, -tail:].any()) else tail


def _with_gradient(states: torch.Tensor, side_branch: nn.ModuleList) -> torch.Tensor:
    """States of a batch without images, to which zero times the side branch is added.

    The side branch was not used, and a trainer's backward would fail on a loss that depends on no trained weight.
    """
    trained = [weight for weight in side_branch.parameters() if weight.requires_grad]
    if not trained or not torch.is_grad_enabled() or states.requires_grad:
        return states
    return states + 0.0 * sum(weight.flatten()[0] for weight in trained).to(states)


def text_after_images(
    layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Run a layer for text on a cache that has seen images, with the mask columns of the keys that the layer holds."""
    record = CacheRecord.find(cache)
    kind, full = record.plan.keys_in(layer.index), arguments.get(MASK)
    if record.step.states is not None:
        record.step.states.append(hidden)
    if kind != "joint" and layer.kind != RECURRENT:
        arguments = {**arguments, MASK: _columns(record, kind, full, hidden.shape[1])}
    return layer.call(hidden, arguments, cache)


def _columns(record: CacheRecord, kind: str, full: Any, length: int) -> Any:
    for stock, of_kind, mask in record.step.masks:
        if stock is full and of_kind == kind:
            return mask
    places = record.step.places[kind]
    if full is not None:
        first = max(0, record.step.end - full.shape[-1])  # the mask of a sliding window may start later
        mask = mask_of_keys(full, None, shifted(first, places))
    else:  # a single token, which attends to all keys but those of padding slots
        mask = None if record.plain else (places >= 0)[:, None, None, :].expand(-1, -1, length, -1)
    record.step.masks.append((full, kind, mask))
    return mask


def _text_twin(owner: nn.Module) -> nn.Module:
    """The twin that runs text after images; kept on the model, so that a compiled step finds it again."""
    text_twin = vars(owner).get("_text_twin")
    if text_twin is None or not _is_current(text_twin, owner):
        text_twin = vars(owner)["_text_twin"] = routed_twin(owner, text_after_images)
    return text_twin


def _is_current(text_twin: nn.Module, owner: nn.Module) -> bool:
    """Whether no submodule of the model was replaced since its twin was made."""
    name, decoder = decoder_of(owner)
    decoder_twin = text_twin._modules[name]
    pairs = [(text_twin._modules, owner._modules, name), (decoder_twin._modules, decoder._modules, "layers")]
    if any(mine.keys() != its.keys() or mine[k] is not its[k] for mine, its, but in pairs for k in mine if k != but):
        return False
    layers = decoder_twin.layers
    return len(layers) == len(decoder.layers) and all(
        routed.stock is layer for routed, layer in zip(layers, decoder.layers, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is not supported


def check_support(config: DpvrLlavaConfig) -> None:
    """Raise ValueError for a decoder or an attention implementation that the method does not run on."""
    text = config.text_config
    if text.model_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"The decoder is of type {text.model_type!r}: use a LLaVA with one of {', '.join(SUPPORTED_DECODERS)}."
        )
    if (
        text.model_type != "llama"
        and text.sliding_window is not None
        and (text.model_type != "qwen2" or text.use_sliding_window)
    ):
        raise ValueError(
            f"The decoder has sliding_window={text.sliding_window}, and a layer plan needs full attention: set it to "
            "None in the text config."
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise ValueError(
            f"image_token_id is {config.image_token_id}, but the vocabulary has {text.vocab_size} tokens: set it to "
            "the tokenizer's id of '<image>'."
        )
    check_attention(config)


def check_attention(config: PretrainedConfig) -> None:
    """Raise ValueError if a vision-language model was loaded with an attention that takes no masks."""
    for part in (config, config.get_text_config()):
        if "flash" in (implementation := str(part._attn_implementation)):
            raise ValueError(_unsupported_attention(implementation))


def _unsupported_attention(implementation: str) -> str:
    return (
        f"attn_implementation is {implementation!r}, but a layer plan runs with {', '.join(SUPPORTED_ATTENTION)}: use "
        "'sdpa', which runs the flash kernel where no mask is needed. A context layer needs a mask, and "
        "flash_attention_2 takes none."
    )


def _check(owner: nn.Module, plan: LayerPlan, arguments: dict[str, Any], cache: Cache | None) -> None:
    """Refuse what a plan does not support, before any computation."""
    decoder = decoder_of(owner)[1]
    implementation = decoder.config._attn_implementation
    if implementation not in SUPPORTED_ATTENTION:
        raise ValueError(_unsupported_attention(implementation))
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", MASK))
    tokens = ids if ids is not None else embeds
    on_cpu = tokens.device.type == "cpu"
    if implementation == "flex_attention" and on_cpu and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(
            f"flex_attention gives wrong results on this CPU ({torch.backends.cpu.get_cpu_capability()}), as its "
            "compiled kernel needs AVX-512: use a GPU, or attn_implementation='sdpa'."
        )
    if arguments.get("output_attentions") or owner.config.output_attentions:
        raise ValueError(
            f"output_attentions is not supported under the plan {plan}, whose layers have different keys: leave it "
            "out, or run the base with set_routing('none') or disable_adapter()."
        )
    if decoder.training and any(layer.gradient_checkpointing for layer in decoder.layers):
        raise ValueError(
            "Gradient checkpointing is on and not supported: set gradient_checkpointing=False. It would save nothing "
            "here, as no activation is stored below the first layer that attends to the side branch."
        )
    kinds = set(layer_kinds(decoder.config))
    if is_static(cache) and kinds != {"full_attention"}:
        raise ValueError(
            f"A static cache is not supported under a layer plan with layers of {' and '.join(sorted(kinds))}, as its "
            "windows and states have sizes of their own: leave cache_implementation out."
        )
    if mask is not None and _is_flat(mask) and not is_static(cache):
        expected = (tokens.shape[0], (0 if cache is None else cache.get_seq_length()) + tokens.shape[1])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)}, but (batch, cached + new tokens) is {expected}: "
                "pass the processor's mask, extended by ones for cached answers."
            )
