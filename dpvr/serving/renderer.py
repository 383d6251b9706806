"""A prompt, checked before vLLM works on it: what transformers would refuse is refused here as well.

    prompt --vLLM--> token ids, a mark per picture --checked--> the pictures' tokens are put in the marks' places
    pictures -------------------------------------------------> an error of this request alone

vLLM itself does not look for a mark without a picture, such as `<image>` typed into a text: if it comes before the
picture's own mark, the picture is put in its place. The check comes first, as vLLM takes for granted that its engine
has each picture that was once processed.
"""

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from dpvr.serving.plans import served
from images_dpvr import mark_ids


class DpvrRenderer(HfRenderer):
    """vLLM's renderer of Hugging Face repositories, with a check of prompts."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        hf_config = config.model_config.hf_config
        self.marks, self.is_routed = mark_ids(hf_config), not served(hf_config).plan.is_vanilla

    def process_for_engine(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
        """Called by vLLM with a tokenised prompt and its pictures."""
        self._check(prompt)
        return super().process_for_engine(prompt, *arguments, **options)

    async def process_for_engine_async(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
        """The same, of a server."""
        self._check(prompt)
        return await super().process_for_engine_async(prompt, *arguments, **options)

    def _check(self, prompt: Any) -> None:
        given, pictures = prompt.get("multi_modal_data"), 0
        if given:
            pictures = sum(self.get_mm_processor().info.parse_mm_data(given).get_all_counts().values())
        check_prompt(prompt["prompt_token_ids"], pictures, self.marks, self.is_routed)


def check_prompt(ids: Sequence[int], pictures: int, marks: Sequence[int], is_routed: bool) -> None:
    """Refuse a prompt whose marks and pictures do not fit.

    Args:
        ids: of the tokens, with one mark for each picture.
        pictures: how many pictures and videos came with it.
        marks: the ids that stand for pictures and videos.
        is_routed: whether layers past the split run text alone.

    Raises:
        VLLMValidationError: for more or fewer marks than pictures, and under a routing for a picture at the end.
    """
    found = sum(token in marks for token in ids)
    if found != pictures:
        raise VLLMValidationError(
            f"The prompt has {found} marks for pictures, such as <image>, and {pictures} pictures came with it: send "
            "each picture as a part of a message, and do not type marks into its text."
        )
    if is_routed and ids and ids[-1] in marks:
        raise VLLMValidationError(
            "The prompt ends in an image, and past the split image tokens predict nothing: put text after the image, "
            "such as the question, or use the chat template."
        )
