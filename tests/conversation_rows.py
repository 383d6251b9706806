"""Rows of LLaVA's JSON and of data sets with images and messages, and the pictures of one colour that they name."""

import io

from datasets import Dataset, Features, Value
from PIL import Image

from dpvr.data.conversations import FEATURES

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "deep/blue.png": (0, 0, 255)}
SIDE = 8


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def llava(image="red.png", *values: str) -> dict:
    return {"id": "x", "image": image, "conversations": turns(*(values or ("<image>\nColour?", "red")))}


def text_only(question: str = "Two?", answer: str = "2") -> dict:
    return {"id": "t", "conversations": turns(question, answer)}


def content(message: dict) -> list:
    """Parts in short: a text, or None for a picture."""
    assert all((part["type"] == "image") == (part["text"] is None) for part in message["content"])
    return [part["text"] for part in message["content"]]


def contents(row: dict) -> list:
    return [content(message) for message in row["messages"]]


def colours(row: dict) -> list:
    return [picture.convert("RGB").getpixel((0, 0)) for picture in row["images"]]


def encode(name: str, form: str = "PNG") -> dict:
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), COLOURS[name]).save(data, form)
    return {"bytes": data.getvalue(), "path": None}


def chat(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": part} for number, part in enumerate(contents)]


def parts(*texts) -> list[dict]:
    return [{"type": "image" if text is None else "text", "text": text} for text in texts]


def save(rows: list[dict], path, plain: bool = False) -> str:
    """Save rows of images and messages, whose content is plain text or parts, and return the folder."""
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({**FEATURES, "messages": [message]}) if plain else FEATURES
    Dataset.from_list(rows, features=features).save_to_disk(path)
    return str(path)
