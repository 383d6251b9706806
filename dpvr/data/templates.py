"""Chat templates: the one of dpvr-mini, how a prompt becomes tokens, and where its replies are.

    USER: <image>
    Is there a red star? ASSISTANT: yes</s>USER: ...
                                   ^^^^^^^^ a reply: what the template adds for the message, up to the end token

A model is trained on the tokens that it is asked with: `tokenized` is the one way from texts to tokens, and a reply is
found by rendering the conversation without it and with it, for any template.
"""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin

Messages = list[dict[str, Any]]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("Unknown role '" ~ message['role'] ~ "': expected system, user or assistant.") -}}
{%- endif -%}
{%- set parts = message['content'] -%}
{%- if parts is string -%}
{%- set parts = [{'type': 'text', 'text': parts}] -%}
{%- endif -%}
{%- set reply = namespace(text='') -%}
{%- for part in parts if part['type'] == 'text' -%}
{%- set reply.text = reply.text ~ part['text'] -%}
{%- endfor -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{{- ' ' ~ reply.text ~ '</s>' -}}
{%- endgeneration -%}
{%- else -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- endif -%}
{%- for part in parts if part['type'] == 'image' -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{{- reply.text ~ ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def tokenized(processor: ProcessorMixin, texts: Sequence[str], images: Any = None, **options: Any) -> BatchFeature:
    """The inputs of rendered prompts; a begin token that the template writes is not added again."""
    begin = processor.tokenizer.bos_token
    written = bool(begin) and all(text.startswith(begin) for text in texts)
    options |= {"add_special_tokens": False} if written else {}
    return processor(images=images, text=list(texts), return_tensors="pt", **options)


def check_template(processor: ProcessorMixin) -> None:
    """Raise ValueError if a processor cannot write conversations as prompts."""
    if not processor.chat_template:
        raise ValueError(
            f"The {type(processor).__name__} of this model has no chat template, so a conversation cannot be written "
            "as its prompt: set processor.chat_template and save the processor with the model."
        )


def reply_spans(processor: ProcessorMixin, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """A rendered conversation, and the first and last character + 1 of each reply, its end token included.

    Raises:
        ValueError: if there is no template, or it writes a prompt differently once it is answered.
    """
    check_template(processor)
    whole, end, spans = processor.apply_chat_template(messages), processor.tokenizer.eos_token, []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = processor.apply_chat_template(messages[:index], add_generation_prompt=True)
            after = processor.apply_chat_template(messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"The chat template writes the prompt {before!r} differently once it is answered, as {after!r}, "
                    "so replies cannot be told from prompts: use a template that does not, such as dpvr-mini's."
                )
            stop = whole.rfind(end, len(before), len(after)) if end else -1
            spans.append((len(before), stop + len(end) if stop >= 0 else len(after)))
    return whole, spans


def ends_replies(processor: ProcessorMixin) -> bool:
    """Whether replies end with the end token, which teaches a model to stop."""
    end = processor.tokenizer.eos_token
    if not processor.chat_template or not end:
        return False
    text, [(_, stop)] = reply_spans(processor, [_message("user"), _message("assistant")])
    return text[:stop].endswith(end)


def with_ended_replies(processor: ProcessorMixin) -> ProcessorMixin:
    """The processor, if need be with dpvr-mini's template, whose replies end with the end token.

    LLaVA-1.5's published template leaves the end token out; ours writes the same prompts, and replaces no other.

    Raises:
        ValueError: for another template without it.
    """
    if ends_replies(processor):
        return processor
    own, end = processor.chat_template, processor.tokenizer.eos_token
    asked = own and processor.apply_chat_template([_message("user")], add_generation_prompt=True)
    processor.chat_template = CHAT_TEMPLATE.replace("</s>", end or "")
    ours = processor.apply_chat_template([_message("user")], add_generation_prompt=True)
    if not end or (own and asked != ours):
        processor.chat_template = own
        raise ValueError(
            f"The chat template of the base does not end a reply with the end token {end!r}, so a model trained with "
            f"it would not learn to stop; its prompts look like {asked!r}. Give the processor a template whose "
            "replies end with its eos_token."
        )
    print("The base's chat template does not end replies with the end token: dpvr-mini's, of the same form, is used.")
    return processor


def _message(role: str) -> dict[str, Any]:
    picture = [{"type": "image"}] if role == "user" else []
    return {"role": role, "content": [*picture, {"type": "text", "text": role}]}
