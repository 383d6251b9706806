"""A batch as vLLM hands it to a model, the tokens of several requests in a row, sorted into text and image.

    request 0: t t I I I t t     request 1: I I t      (a chunk of a longer prompt, or a decoded token)
    runs:      t t       t t                    t      each a short sequence of its own over its request's cache

A run's queries are the last slots of what it sees: all of its request's tokens before it, and itself. So a causal
kernel for sequences of different lengths needs no mask. Runs are sorted by length, as some kernels want single tokens
first.

Axes: N tokens of the batch, X text and V image tokens among them, B requests, R runs.
"""

from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """A batch's tokens in two streams."""

    text: np.ndarray  # int64 (X,), places in the batch, run after run
    image: np.ndarray  # int64 (V,), places in the batch, in order
    image_requests: np.ndarray  # int64 (V,)
    image_slots: np.ndarray  # int64 (V,), places in their requests
    requests: np.ndarray  # int64 (R,)
    starts: np.ndarray  # int32 (R + 1,), where the runs' queries start in `text`
    ends: np.ndarray  # int32 (R,), slots up to which the runs see


def sort_tokens(is_image: np.ndarray, query_starts: np.ndarray, lengths: np.ndarray) -> Runs:
    """Sort a batch.

    Args:
        is_image: bool (N,).
        query_starts: int (B + 1,), where the requests' tokens start in the batch.
        lengths: int (B,), of the requests up to and including this batch's tokens.
    """
    counts = np.diff(query_starts)
    request = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(request)) + (lengths - query_starts[1:])[request]
    text, image = np.flatnonzero(~is_image), np.flatnonzero(is_image)
    first = np.ones(len(text), dtype=bool)  # of a run
    first[1:] = (np.diff(text) > 1) | (np.diff(request[text]) > 0)
    begins = np.flatnonzero(first)
    sizes = np.diff(np.append(begins, len(text)))
    order = np.argsort(sizes, kind="stable")
    begins, sizes = begins[order], sizes[order]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    text = text[np.repeat(begins - starts[:-1], sizes) + np.arange(len(text))]
    last = text[starts[1:] - 1]
    return Runs(text, image, request[image], slot[image], request[last], starts, (slot[last] + 1).astype(np.int32))
