"""One tiny random LLaVA and one processor for all tests: CPU, float64 where exactness is asked, nothing downloaded."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conversation_rows import COLOURS, SIDE
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from dpvr.inference.chat import Answerer
from dpvr.inference.loading import load
from dpvr.inference.uploads import own_folder
from dpvr.pretraining.model import make_model
from dpvr.pretraining.processor import make_processor, save_processor
from dpvr.pretraining.train import parse_args as parse_pretrain_args
from modeling_dpvr import DpvrLlavaForConditionalGeneration

IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, VOCAB_SIZE = 7, 4, 40

torch.set_num_threads(1)  # a second thread costs more than it saves on matrices this small


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the libraries, which are imported by now: a fifth of a training run."""
    gc.collect()
    gc.freeze()


def make_llava(
    depth: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64, **text_fields
) -> LlavaForConditionalGeneration:
    """A random LLaVA of width 32 with grouped queries, 4 tokens per image and image token id 7, in evaluation mode."""
    text = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **text_fields,
        }
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID, image_seq_length=TOKENS_PER_IMAGE
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


@pytest.fixture(autouse=True, scope="session")
def own_uploads() -> Iterator[None]:
    """Tests that run at the same time upload the same pictures, and each deletes its own."""
    with own_folder():
        yield


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    return make_llava()


@pytest.fixture(scope="session")
def minibench_processor() -> LlavaProcessor:
    """The processor of the small LLaVA, its tokenizer trained on fewer rows: 3 seconds instead of 15."""
    return make_processor(num_rows=500)


@pytest.fixture(scope="session")
def random_mini(tmp_path_factory, minibench_processor) -> str:
    """The folder of a random dpvr-mini in very small: its processor, pictures and shapes, four narrow layers."""
    folder = tmp_path_factory.mktemp("random_mini")
    size = ["--text_layers", "4", "--text_width", "64", "--vision_layers", "2", "--vision_width", "32"]
    torch.manual_seed(0)
    llava = make_model(minibench_processor, parse_pretrain_args(["--output_dir", str(folder), *size]))
    llava.set_attn_implementation("sdpa")
    DpvrLlavaForConditionalGeneration.from_llava(llava, split_layer=2).save_pretrained(folder)
    save_processor(minibench_processor, folder)
    return str(folder)


@pytest.fixture(scope="module")
def answerer(random_mini) -> Answerer:
    """The random dpvr-mini behind the chat; its answers are as long as they are asked to be."""
    answerer = Answerer(*load(random_mini))
    answerer.model.generation_config.eos_token_id = None
    return answerer


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    """Pictures of one colour each, a broken and a cut one, and a picture beside the folder with two links to it."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "secret.jpg")
    (folder / "cut.jpg").write_bytes((tmp_path / "secret.jpg").read_bytes()[:-500])
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "alias.png").symlink_to(folder / "red.png")
    return folder


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., str]:
    """Writes rows of LLaVA as .json or .jsonl and returns the path."""

    def run(rows: list, name: str = "rows.json") -> str:
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(rows))
        return str(tmp_path / name)

    return run
