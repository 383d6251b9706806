"""What autograd keeps of a forward pass for the backward pass, in bytes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Saved:
    """Bytes of the distinct storages that were saved."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def counting_saved(not_counted: Iterable[torch.Tensor]) -> Iterator[Saved]:
    """Counts what is saved within, but for the storages of some tensors: weights, buffers and inputs.

    What a recomputing layer (activation checkpointing) holds back for itself is not seen.
    """
    own, saved = {tensor.untyped_storage().data_ptr() for tensor in not_counted}, Saved()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
