"""The column of pictures in training rows: `datasets` stores them, `pictures.py` reads them.

    {"bytes", "path"} --outside_of: in the data set?--> Picture.decode_example --> read_picture --> upright RGB

A path is a file, or an address as fsspec has it: https://..., hf://datasets/..., zip://inside::archive.
"""

import os
from pathlib import Path
from typing import Any

import datasets.config
import fsspec
from datasets import Image
from huggingface_hub.constants import HF_HUB_CACHE
from PIL.Image import Image as PilImage

from dpvr.data.pictures import read_picture

MAX_BYTES = 200_000_000  # of a picture from an address, which may never end


class Picture(Image):
    """A `datasets.Image` that gives pictures as `pictures.to_rgb` does; on disk it is an `Image`."""

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> PilImage:
        """Return an encoded picture, {"bytes", "path"}, whose bytes go before its path.

        Raises:
            ValueError: as of `read_picture`, or if there is nothing to read. The message names the picture.
        """
        data, path = value["bytes"], value["path"]
        try:
            return read_picture(_fetch(path) if data is None else data)
        except (OSError, ValueError) as error:
            raise ValueError(f"the picture {path or 'bytes without a name'!r} cannot be read: {error}") from error


def _fetch(path: str | None) -> str | bytes:
    if path is None:
        raise ValueError("It has neither bytes nor a path: give one of them.")
    return _download(path) if is_address(path) else path


def is_address(path: str) -> bool:
    return "://" in path


def _download(address: str) -> bytes:
    try:
        with fsspec.open(address, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"The address cannot be opened ({error}): check it and the connection.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"The file has more than {MAX_BYTES:,} bytes: make it smaller.")
    return data


def outside_of(data: str, path: str) -> bool:
    """Whether a path in a data set's column of pictures leads out of it.

    Inside are the folder, or the repository on the Hub, and the caches that it is downloaded and unpacked to; also
    after `..` and symbolic links.
    """
    path = path.split("::")[-1]  # of a file in an archive, the archive
    if is_address(path):
        own = f"hf://datasets/{data}"
        return ".." in Path(path).parts or not path.startswith((f"{own}@", f"{own}/"))
    roots = [HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    roots += [data] if os.path.isdir(data) else []
    # links in the Hub's cache lead from snapshots to blobs, both of which are inside of it
    real = os.path.realpath(path)
    return not any(os.path.commonpath([root, real]) == root for root in map(os.path.realpath, roots))
