"""Tiny processors of the families in families.py, built offline: each family's own class, marks and chat template.

    a tokenizer trained on MiniBench's words + the family's special tokens
    the family's image processor, for the pictures of the tiny tower         --> the family's processor
    its published chat template, without tools and dates

`make_with_processor` gives a tiny random model whose vocabulary and marks are those of such a processor, and
`save_family` puts both into a folder, as a repository on the Hub has them.
"""

import copy
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, PRESENT, make_from
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import is_num2words_available, is_torchvision_available

from dpvr.data.templates import CHAT_TEMPLATE
from dpvr.pretraining.processor import train_tokenizer
from processors_dpvr import NoVideos, for_pictures_alone
from versions_dpvr import LINE_4

BASE_TOKENS = ("<s>", "</s>", "<pad>", "<unk>", "<image>")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


def parts(picture: str) -> str:
    """What a template makes of a message's content."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + picture
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )


def chat_ml(picture: str, *, system: str = "", before_reply: str = "") -> str:
    """The template of Qwen, InternVL and LLaVA-OneVision, with what they put in for a picture."""
    if system:
        system = f"<|im_start|>system\n{system}<|im_end|>\n"
        system = "{% if loop.first and message['role'] != 'system' %}" + system + "{% endif %}"
    reply = "{% if message['role'] == 'assistant' %}" + before_reply + "{% endif %}" if before_reply else ""
    return (
        "{% for message in messages %}"
        + system
        + "<|im_start|>{{ message['role'] }}\n"
        + reply
        + parts(picture)
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        + before_reply
        + "{% endif %}"
    )


def mistral(picture: str) -> str:
    """The template of Mistral's models: [INST] around what is asked."""
    asked = "{% if message['role'] == 'user' %}[INST]" + parts(picture) + "[/INST]"
    answered = "{% elif message['role'] == 'assistant' %}" + parts("") + "</s>{% endif %}"
    return "<s>{% for message in messages %}" + asked + answered + "{% endfor %}"


IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
COHERE = (
    "<BOS_TOKEN>{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|CHATBOT_TOKEN|>' if message['role'] == 'assistant' else '<|USER_TOKEN|>' }}"
    + parts("<|IMG_PATCH|>")
    + "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
GEMMA = (
    "<bos>{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass
class Kind:
    """What a family's processor is made of.

    Attributes:
        processor, image_processor: names of classes.
        image: settings of the image processor.
        fields: other arguments of the processor.
        special: bos, eos and pad token.
        named: further tokens, by the attributes of the tokenizer under which the processor looks for them.
        other: further tokens.
        marks: fields of the model's config, and the tokens that they are the ids of.
        template: the chat template; None as PaliGemma's, which has none.
        video_processor: the name of a class, for where torchvision is installed.
    """

    processor: str
    image_processor: str
    image: dict[str, Any]
    template: str | None
    fields: dict[str, Any] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})
    named: dict[str, str] = field(default_factory=dict)
    other: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=lambda: {"image_token_id": "<image>"})
    video_processor: str | None = None


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


ANYRES = [[16, 8], [8, 16]]
CHAT_ML_TOKENS = {"special": {"eos_token": IM_END}, "other": (IM_START,)}
CLIP = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_convert_rgb": True}
TILED = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
IDEFICS_TOKENS = {
    "special": {"eos_token": "<end_of_utterance>"},
    "other": (
        IM_START,
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
    ),
}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def qwen(processor: str, template: str, video_processor: str = "Qwen2VLVideoProcessor") -> Kind:
    size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}  # numbers of pixels
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    tokens = {"special": CHAT_ML_TOKENS["special"], "other": (IM_START, *QWEN_MARKS.values())}
    tokens |= {"marks": QWEN_MARKS, "video_processor": video_processor}
    return Kind(processor, "Qwen2VLImageProcessor", patches, template, **tokens)


HELPFUL, NO_THOUGHT = "You are a helpful assistant.", "<think>\n\n</think>\n\n"
QWEN3_VIDEOS = "Qwen3VLVideoProcessor"
KINDS = {
    "llava": Kind(
        "LlavaProcessor",
        "CLIPImageProcessor",
        CLIP,
        CHAT_TEMPLATE,
        fields={"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_next": Kind(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {**CLIP, "image_grid_pinpoints": ANYRES},
        mistral("<image>\n"),
        fields={"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Kind(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {**square(8), "image_grid_pinpoints": ANYRES},
        chat_ml("<image>"),
        fields={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        special=CHAT_ML_TOKENS["special"],
        other=(IM_START, "<video>"),
        marks={"image_token_id": "<image>", "video_token_id": "<video>"},
        video_processor="LlavaOnevisionVideoProcessor",
    ),
    "internvl": Kind(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        {**square(16), "max_patches": 2},
        chat_ml("<IMG_CONTEXT>\n"),
        fields={"image_seq_length": 4},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        marks={"image_token_id": "<IMG_CONTEXT>"},
        video_processor="InternVLVideoProcessor",
        **CHAT_ML_TOKENS,
    ),
    "idefics3": Kind(
        "Idefics3Processor", "Idefics3ImageProcessor", TILED, IDEFICS, fields={"image_seq_len": 4}, **IDEFICS_TOKENS
    ),
    "smolvlm": Kind(
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        TILED,
        IDEFICS,
        fields={"image_seq_len": 4},
        video_processor="SmolVLMVideoProcessor",
        **IDEFICS_TOKENS,
    ),
    "qwen2_vl": qwen("Qwen2VLProcessor", chat_ml(QWEN_PICTURE, system=HELPFUL)),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor", chat_ml(QWEN_PICTURE, system=HELPFUL)),
    "qwen3_vl": qwen("Qwen3VLProcessor", chat_ml(QWEN_PICTURE), QWEN3_VIDEOS),
    "qwen3_vl_moe": qwen("Qwen3VLProcessor", chat_ml(QWEN_PICTURE), QWEN3_VIDEOS),
    "qwen3_5": qwen("Qwen3VLProcessor", chat_ml(QWEN_PICTURE, before_reply=NO_THOUGHT), QWEN3_VIDEOS),
    "mistral3": Kind(
        "PixtralProcessor",
        "PixtralImageProcessor",
        {"size": {"longest_edge": 16}, "patch_size": {"height": 4, "width": 4}},
        mistral("[IMG]"),
        fields={"patch_size": 4, "spatial_merge_size": 2},
        other=("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        marks={"image_token_id": "[IMG]"},
    ),
    "paligemma": Kind(
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        {**square(8), "image_seq_length": 4},
        None,
        special={"bos_token": "<bos>", "eos_token": "<eos>"},
        named={"image_token": "<image>"},
    ),
    "gemma3": Kind(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        square(16),
        GEMMA,
        fields={"image_seq_length": 4},
        special={"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
        named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        other=("<start_of_turn>",),
        marks={
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    ),
    "cohere2_vision": Kind(
        "Cohere2VisionProcessor",
        "Cohere2VisionImageProcessor",
        {**square(16), "max_patches": 2, "patch_size": 2},
        COHERE,
        special={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        other=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        marks={"image_token_id": "<|IMG_PATCH|>"},
    ),
}
# No form of Cohere's image processor and of Pixtral's processor, which Mistral 3 has, runs without torchvision.
HAS_TORCHVISION, NEEDS_TORCHVISION = is_torchvision_available(), ("cohere2_vision", "mistral3")


def can_be_made(name: str) -> bool:
    """Whether a family's processor can be made with what is installed."""
    if name in NEEDS_TORCHVISION and not HAS_TORCHVISION:
        return False
    return name != "smolvlm" or (is_num2words_available() and (HAS_TORCHVISION or not LINE_4))


WITH_PROCESSOR = [name for name in PRESENT if can_be_made(name)]


@lru_cache
def _words() -> str:
    """The tokenizer that all families start from, as JSON, without its own begin token."""
    spec = json.loads(train_tokenizer(300).backend_tokenizer.to_str())
    return json.dumps({**spec, "post_processor": None, "padding": None, "truncation": None})


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """MiniBench's words and the special tokens of a family."""
    is_qwen = kind.processor.startswith("Qwen")  # whose processors take no other tokenizer in transformers 4
    tokenizer_class = transformers.Qwen2TokenizerFast if LINE_4 and is_qwen else PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_object=Tokenizer.from_str(_words()),
        pad_token="<pad>",
        **kind.special,
        extra_special_tokens=kind.named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens([token for token in kind.other if token not in BASE_TOKENS], special_tokens=True)
    return tokenizer


def make_processor_of(name: str) -> ProcessorMixin:
    """The tiny processor of a family."""
    kind = KINDS[name]
    image_class = getattr(transformers, kind.image_processor + ("" if LINE_4 or HAS_TORCHVISION else "Pil"))
    processor_class = getattr(transformers, kind.processor)
    parts = {"image_processor": image_class(**kind.image), "tokenizer": make_tokenizer(kind)}
    if kind.video_processor and HAS_TORCHVISION:
        parts["video_processor"] = getattr(transformers, kind.video_processor)()
    elif kind.video_processor:
        processor_class, parts["video_processor"] = for_pictures_alone(processor_class), NoVideos({})
    return processor_class(**parts, chat_template=kind.template, **kind.fields)


def make_with_processor(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> tuple[nn.Module, ProcessorMixin]:
    """A tiny random model of a family, and a processor that makes its inputs."""
    kind, processor = KINDS[name], make_processor_of(name)
    tokenizer, fields = processor.tokenizer, copy.deepcopy(FAMILIES[name].config)
    ids = tokenizer.convert_tokens_to_ids
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    begin = tokenizer.bos_token_id
    fields["text_config"] |= {"vocab_size": len(tokenizer), "bos_token_id": begin, **end}
    fields |= {mark: ids(token) for mark, token in kind.marks.items()}
    if "pad_token_id" in fields:
        fields["pad_token_id"] = tokenizer.pad_token_id
    model = make_from(name, fields, dtype, attention, seed)
    model.generation_config.update(bos_token_id=begin, **end)
    return model, processor


def save_family(name: str, folder: Path | str, **options: Any) -> None:
    """Save a tiny model with its processor as a repository on the Hub has them."""
    model, processor = make_with_processor(name, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
