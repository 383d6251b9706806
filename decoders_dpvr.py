"""What a layer plan has to know of a decoder: where it is, what its layers are, and which plans it cannot run.

    any vision-language model of transformers
        owner        holds tower, projector and decoder: LlavaModel, Qwen3VLModel, ...    found, not named
            decoder  `language_model` or `text_model`, with a list of `layers`

A layer is of attention (full, sliding, chunked) or recurrent (linear attention, convolution). A recurrent layer keeps
no keys, so text cannot read the image there: image tokens that have left the decoder are never seen by it.

What a decoder asks of the split, beside 1 <= s < L:

    above the layers that add tower features to image states          DeepStack, Qwen3-VL
    above the first layer of each kind of attention                   the stock masks are made for that layer, or 0
    below no layer that uses another layer's keys and values          Gemma 4's small models
"""

from torch import nn
from transformers import PretrainedConfig

RECURRENT = "recurrent"
DECODER_NAMES = ("language_model", "text_model")  # what outer models call their decoder
CROSS_ATTENTION_MODELS = ("mllama", "idefics")


def decoder_of(owner: nn.Module) -> tuple[str, nn.Module]:
    """The name and the decoder of a vision-language model without its head.

    Raises:
        ValueError: if it has none.
    """
    for name in DECODER_NAMES:
        decoder = owner._modules.get(name)
        if decoder is not None and isinstance(decoder._modules.get("layers"), nn.ModuleList):
            return name, decoder
    raise ValueError(
        f"{type(owner).__name__} has no decoder under the name {' or '.join(DECODER_NAMES)}: use a vision-language "
        "model of transformers, such as LLaVA, Qwen3-VL or InternVL."
    )


def owner_of(model: nn.Module) -> nn.Module:
    """What holds tower, projector and decoder in a vision-language model with its head.

    Raises:
        ValueError: if the model has another form.
    """
    owner = model._modules.get("model")
    if owner is None:
        raise ValueError(
            f"{type(model).__name__} is no head on a model under the name 'model': use a vision-language model of "
            "transformers, such as LLaVA, Qwen3-VL or InternVL."
        )
    decoder_of(owner)
    return owner


def layer_kinds(text_config: PretrainedConfig) -> tuple[str, ...]:
    """The kind of every decoder layer: `RECURRENT`, or the name of its attention, as "full_attention"."""
    types = getattr(text_config, "layer_types", None)
    if types is None:  # a decoder of one kind, as Mistral's
        window = getattr(text_config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"] * text_config.num_hidden_layers
    return tuple(RECURRENT if kind.startswith("linear") or not kind.endswith("attention") else kind for kind in types)


def recurrent_layers(text_config: PretrainedConfig) -> frozenset[int]:
    """The layers that keep no keys."""
    return frozenset(index for index, kind in enumerate(layer_kinds(text_config)) if kind == RECURRENT)


def side_sources(text_config: PretrainedConfig, split_layer: int, count: int) -> list[int]:
    """The decoder layers of which the `count` layers of a side branch are copies, and where the branch runs.

    These are the first layer of attention from the split on and those of its kind after it; the last one is repeated
    if there are too few. A split past the decoder, which only routing "none" has, takes the last of all.
    """
    kinds = layer_kinds(text_config)
    attention = [index for index, kind in enumerate(kinds) if kind != RECURRENT]
    first = next((index for index in attention if index >= split_layer), attention[-1])
    alike = [index for index in range(first, len(kinds)) if kinds[index] == kinds[first]]
    return [alike[min(index, len(alike) - 1)] for index in range(count)]


def deepstack_layers(config: PretrainedConfig) -> int:
    """How many first layers of a vision-language model add features of its tower to the image's states."""
    tower = getattr(config, "vision_config", None)
    return len(getattr(tower, "deepstack_visual_indexes", None) or ())


def layers_until_every_attention(text_config: PretrainedConfig) -> int:
    """The number of first layers among which every kind of attention occurs."""
    kinds = layer_kinds(text_config)
    return 1 + max(kinds.index(kind) for kind in set(kinds) - {RECURRENT})


def lowest_split(config: PretrainedConfig) -> int:
    """The lowest split that `check_decoder` allows a model."""
    return max(1, deepstack_layers(config), layers_until_every_attention(config.get_text_config()))


def check_decoder(config: PretrainedConfig, split_layer: int) -> None:
    """Raise ValueError, with the reason, if a model's decoder cannot run a plan with this split.

    Args:
        config: of the whole vision-language model.
    """
    text = config.get_text_config()
    if config.model_type in CROSS_ATTENTION_MODELS:
        raise ValueError(
            f"{config.model_type!r} reads images by cross-attention, so that no image token runs through its decoder "
            "and there is nothing to skip: use a model that puts image tokens into the prompt, such as LLaVA."
        )
    stacked = deepstack_layers(config)
    if split_layer < stacked:
        raise ValueError(
            f"split_layer is {split_layer}, but this model adds features of its tower to the image's states after "
            f"each of its first {stacked} layers (DeepStack): choose {stacked} or more."
        )
    kinds = layer_kinds(text)
    needed = layers_until_every_attention(text)
    if split_layer < needed and not (split_layer == 0 and needed == 1):
        raise ValueError(
            f"split_layer is {split_layer}, but {kinds[needed - 1]!r} first occurs in layer {needed - 1} of this "
            f"decoder, and its masks are made for that layer with all tokens: choose {needed} or more."
        )
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    if shared:
        raise ValueError(
            f"The last {shared} layers of this decoder use the keys and values of earlier layers, and a layer plan "
            "gives deep layers keys of their own: use a model without shared keys and values, such as the larger ones "
            "of its family."
        )
