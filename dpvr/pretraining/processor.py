"""The processor of the small LLaVA: a byte-level BPE tokenizer, CLIP's image processor and a chat template.

    USER: <image>                       <s> is put in front by the tokenizer; <image> becomes 64 tokens, one per patch
    Is there a red star? ASSISTANT: yes</s>USER: ...
                                  ^^^^^^^^^ the {% generation %} block: the reply, its leading space and its end

A word carries its leading space (" yes"), so the tokens of a prompt are the first tokens of prompt and answer.

`save_processor` writes one set of files that transformers 4.57 and 5 both read. `save_pretrained` of version 5 alone
would name a tokenizer class and nest an image processor in ways that version 4 does not know.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from dpvr.data.templates import CHAT_TEMPLATE
from dpvr.pretraining.rows import PretrainingRows
from minibench.questions import CHINESE, CHINESE_WORDS, PLURALS
from minibench.scenes import SIDE
from minibench.tasks import PROPERTIES

PATCH = 12
VOCABULARY = 768
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"

# Words that no question uses yet, so that new questions need no new tokenizer.
EXTRA_TEXT = (
    "zero one two three four five six seven eight nine ten none nothing both neither",
    "Is the red circle left of, right of, above, below, behind or in front of the blue square?",
    "Which is bigger, darker, lighter, nearer, first, second, third, last, next to, between?",
    "What is on the left side of the image? What is not there? The answer is a number. Compare the two pictures.",
    "black white grey brown pink diamond heart hexagon line arrow letter color object background",
    "图中有什么？是。不是。有。没有。多少个？上面 下面 大 小 相同 不同 第一张 第二张",
)
# Each answer word is one token, and so is every other character: Chinese has no spaces between words.
CHINESE_WORD = "|".join((*CHINESE_WORDS.values(), "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"))


def train_tokenizer(num_rows: int = 3000) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `VOCABULARY` tokens, trained on generated rows."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CHINESE_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [*SPECIAL_TOKENS.values(), IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(num_rows), trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _training_text(num_rows: int) -> list[str]:
    rows = PretrainingRows("train", num_rows, caption_share=0.2, pair_share=0.15)
    texts = []
    for index in range(num_rows):
        for message in rows[index]["messages"]:
            text = message["content"][-1]["text"]
            # A first question follows the line break after the picture, a later one the space of "USER: ".
            asked = [f"USER: \n{text} ASSISTANT:", f"USER: {text}"]
            texts += asked if message["role"] == "user" else [f" {text}"]
    words = [*CHINESE, *CHINESE.values(), *PLURALS.values(), *PROPERTIES, *map(str, range(20))]
    texts += [f" {word}" for word in words] + [text for text in EXTRA_TEXT for _ in range(20)]
    random.Random(0).shuffle(texts)
    return texts


def make_processor(num_rows: int = 3000) -> LlavaProcessor:
    """Return the processor for pictures of `SIDE` pixels cut into patches of `PATCH`, and its tokenizer trained."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**_image_processor_settings()),
        tokenizer=train_tokenizer(num_rows),
        chat_template=CHAT_TEMPLATE,
        **_processor_settings(),
    )


def _image_processor_settings() -> dict:
    return {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_resize": True,
        "do_center_crop": True,
        "do_convert_rgb": True,
    }


def _processor_settings() -> dict:
    return {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": IMAGE_TOKEN,
    }


def save_processor(processor: LlavaProcessor, folder: Path | str) -> None:
    """Save a processor as files that `AutoProcessor` and `AutoTokenizer` of transformers 4.57 and 5 both load."""
    folder = Path(folder)
    processor.tokenizer.backend_tokenizer.no_padding()  # else the padding of its latest batch would be saved
    processor.save_pretrained(folder)
    own = _read(folder / "processor_config.json")
    images = own.pop("image_processor", None)
    if images is not None:
        images["image_processor_type"] = "CLIPImageProcessor"
        _write(folder / "processor_config.json", own)
        _write(folder / "preprocessor_config.json", {**images, "processor_class": "LlavaProcessor"})
    tokenizer = _read(folder / "tokenizer_config.json")
    for leftover in ("backend", "is_local", "local_files_only"):  # these say where it was loaded from
        tokenizer.pop(leftover, None)
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
    _write(folder / "tokenizer_config.json", tokenizer)
    _write(folder / "special_tokens_map.json", {**SPECIAL_TOKENS, "image_token": IMAGE_TOKEN})


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
