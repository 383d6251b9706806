"""Chat templates: the one of dpvr-mini, and what training needs of any.

    USER: <image>
    Is there a red star? ASSISTANT: yes</s>USER: ...
                                  ^^^^^^^^^ a {% generation %} block: the reply, its leading space and the end token

TRL puts the loss on generation blocks alone (`assistant_only_loss`), so a template that has none, or leaves the end
token out of them, cannot be trained with as it is.
"""

import copy

from transformers import LlavaProcessor

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


def marks_replies(processor: LlavaProcessor) -> bool:
    """Whether the chat template marks a reply for the loss, with the end token that teaches the model to stop."""
    if not processor.chat_template:
        return False
    talk = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    tokens = processor.tokenizer.apply_chat_template(
        talk,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [token for token, mark in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mark]
    return bool(kept) and kept[-1] == processor.tokenizer.eos_token_id


def with_marked_replies(processor: LlavaProcessor) -> LlavaProcessor:
    """The processor, if need be with a template that marks replies and their end token for the loss.

    LLaVA-1.5's published template leaves the end token out; ours writes the same prompts.
    """
    if not marks_replies(processor):
        print("The base's chat template does not mark replies and their end: dpvr-mini's, of the same form, is used.")
        processor.chat_template = CHAT_TEMPLATE.replace("</s>", processor.tokenizer.eos_token)
    return processor


def with_bos(processor: LlavaProcessor) -> LlavaProcessor:
    """A copy for TRL, which tokenizes what the template writes as it is: the template begins with the BOS token.

    Everywhere else the tokenizer adds it, so the template that is saved must not.
    """
    copied = copy.deepcopy(processor)
    copied.chat_template = "{{- bos_token -}}" + processor.chat_template
    return copied
