"""What may stand in a text that becomes a prompt, wherever it comes from: rows, questions, batches, the app.

A special token in a text, such as "</s>" or "<image>", would become the token itself: end the turn, or take the place
of a picture. A part of a message that is neither text nor picture would be left out, and the question answered blind.
"""

from typing import Any

from transformers import ProcessorMixin

CHARACTERS_PER_POSITION = 64  # a text with more of them per position of the model is not tokenized to learn its length
PARTS = ("text", "image")


def special_tokens(processor: ProcessorMixin) -> list[str]:
    """The special tokens of a processor, its marks for pictures among them."""
    marks = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    return sorted({token for token in (*processor.tokenizer.all_special_tokens, *marks) if token})


def fault_of_text(text: str, special: list[str], room: int | None = None) -> str | None:
    """Why a text may not stand in a prompt, or None.

    Args:
        special: the tokens that it must not hold.
        room: how many positions the model has.
    """
    if room is not None and len(text) > CHARACTERS_PER_POSITION * room:
        return f"it has {len(text):,} characters, and the model has {room} positions"
    for token in special:
        if token in text:
            return f"the text {text!r:.60} holds {token!r}, one of the model's special tokens"
    return None


def fault_of_part(part: Any) -> str | None:
    """Why a part of a message cannot be read, or None."""
    if not isinstance(part, dict):
        return f"a part is {part!r:.60}, not an object with a type"
    if part.get("type") not in PARTS:
        return f"a part has the type {part.get('type')!r:.60}, and only image and text can be read"
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        return f"the text of a part is {part.get('text')!r:.60}, not a string"
    return None
