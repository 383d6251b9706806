"""Training rows from a Hub data set, a folder or LLaVA's JSON, all in TRL's vision format and each one checked.

    Hub id, folder   images, messages     --+
                                            +--> turns and marks --> pictures decode --> Conversations(rows, bad_rows)
    LLaVA's JSON     image, conversations --+

A data set may have a column teacher_images too: the same pictures as the base knows them, which it is shown in place
of images when a side branch or a latent learns from it. Pictures stand in front of the first question, as in the chat
template. They are decoded once for the check and again when a row is used; in between a row holds paths or encoded
bytes. A bad row stops the reading, or with `skip_bad_rows` it is left out, reported and kept in `bad_rows`.

    rows, bad_rows = load_conversations("llava_v1_5_mix665k.json", image_folder="images")
    rows, bad_rows = load_conversations("outputs/train", skip_bad_rows=True)  # what minibench.export writes
    rows, bad_rows = load_conversations("huge.jsonl", image_folder="images", streaming=True)  # checked as they come
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from tqdm import tqdm

from dpvr.data.picture_column import Picture, outside_of
from dpvr.data.texts import fault_of_part

Row = dict[str, Any]

MARK = "<image>"
PICTURE = {"type": "image", "text": None}
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}
ROLES = {role: role for role in SPEAKERS.values()}
IMAGES = Features({"images": [Image()]})["images"]  # as a data set has them
FEATURES = Features(
    {
        "images": [Picture()],
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
    }
)
TEACHER_IMAGES = "teacher_images"
LISTED = 20
KINDS = {dict: "dictionary", list: "list", str: "string"}
BATCH = 1000  # rows held as Python objects before they become Arrow

MOST_PICTURES = 64  # of a row; each is decoded to be checked


class Conversations(NamedTuple):
    """Rows for training, and why rows were left out, by their index in the source.

    `bad_rows` of a stream fills while it is read, in the process that reads it: not with `dataloader_num_workers`.
    """

    rows: Dataset | IterableDataset
    bad_rows: dict[int, str]


class _BadRow(Exception):
    """Why a row is not trained on."""


class _Source(NamedTuple):
    """`rows()` starts the raw rows anew, `read` checks one and turns it into TRL's, `table` holds a data set's.

    `pictures` are the columns of pictures.
    """

    name: str
    rows: Callable[[], Iterable[Any]]
    read: Callable[[Any], Row]
    table: Dataset | IterableDataset | None = None
    pictures: tuple[str, ...] = ("images",)


def load_conversations(
    data: str,
    *,
    split: str = "train",
    image_folder: str | None = None,
    skip_bad_rows: bool = False,
    streaming: bool = False,
    allow_remote_images: bool = False,
) -> Conversations:
    """Read rows with the columns images, a list of `Picture`, and messages, whose content is a list of parts.

    Args:
        data: a Hub id or a folder that `load_dataset` or `load_from_disk` reads, with the columns images and messages
            (content as parts or as a string) and perhaps teacher_images, or LLaVA's rows in a .json (one list) or
            .jsonl (one row a line) file.
        split: of a data set; a JSON file has only one.
        image_folder: what the names in a JSON file are relative to; no picture outside of it is opened.
        skip_bad_rows: leave bad rows out and warn, in place of raising.
        streaming: check rows when they are asked for; the first bad one is reported then. A .json is still read whole.
        allow_remote_images: of a data set: also open web addresses and files outside of its folder.

    Raises:
        ValueError: there are bad rows, or no good ones, or nothing to read.
    """
    if not data.strip() or (Path(data).exists() and not Path(data).is_dir() and not Path(data).is_file()):
        raise ValueError(f"{data!r} is no data: name a data set, its folder, or a .json or .jsonl file.")
    is_json = data.endswith((".json", ".jsonl"))
    source = _open_json(data, image_folder) if is_json else _open_dataset(data, split, image_folder, streaming)
    if not is_json and not allow_remote_images:
        source = source._replace(read=partial(source.read, inside=data))
    bad_rows: dict[int, str] = {}
    if not streaming:
        return Conversations(_read_all(source, bad_rows, skip_bad_rows), bad_rows)
    rows = IterableDataset.from_generator(
        partial(_read_on, source, bad_rows, skip_bad_rows), features=_features(source.pictures)
    )
    rows.info.description = f"{data}, {os.path.getsize(data)} bytes" if is_json else f"{data}, split {split}"
    return Conversations(rows, bad_rows)


def data_fingerprint(rows: Dataset | IterableDataset) -> str:
    """Return 16 hex digits that stand for what was read, wherever the files of a table's pictures lie.

    They hash messages and pictures in order: an embedded picture by its bytes, one in a file by its name and size,
    which spares a second reading. A stream of `load_conversations` is hashed by where it comes from: `data` with the
    split or the size of the file.
    """
    if isinstance(rows, IterableDataset):
        return hashlib.sha256(rows.info.description.encode()).hexdigest()[:16]
    digest, pictures_in = hashlib.sha256(), [name for name in ("images", TEACHER_IMAGES) if name in rows.column_names]
    for row in _raw_rows(rows.select_columns([*pictures_in, "messages"])):
        pictures = [_identify(picture) for name in pictures_in for picture in row[name]]
        digest.update(json.dumps([pictures, row["messages"]], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _identify(picture: Row) -> str:
    if picture["bytes"] is not None:
        return hashlib.sha256(picture["bytes"]).hexdigest()
    path = picture["path"]
    return f"{os.path.basename(path)}, {os.path.getsize(path)} bytes" if os.path.isfile(path) else path


# Sources


def _open_json(path: str, image_folder: str | None) -> _Source:
    if not os.path.isfile(path):
        raise ValueError(f"There is no JSON file {path!r}: check the path.")
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"The image_folder {image_folder!r} is not a folder: check the path.")
    folder = None if image_folder is None else os.path.realpath(image_folder)
    rows = _read_lines if path.endswith(".jsonl") else _read_list
    return _Source(path, partial(rows, path), partial(_from_llava, image_folder=folder))


def _read_list(path: str) -> list[Any]:
    form = "LLaVA's form is [{...}, {...}], and the name of a file with one row per line ends in .jsonl."
    with open(path, "rb") as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path!r} is not a JSON list of rows ({error}): {form}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path!r} is not a JSON list of rows but a {type(rows).__name__}: {form}")
    return rows


def _read_lines(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = line  # which is no row, and is reported as a bad one
            yield row


def _open_dataset(data: str, split: str, image_folder: str | None, streaming: bool) -> _Source:
    if image_folder is not None:
        raise ValueError(
            f"The image_folder {image_folder!r} goes with a .json or .jsonl file, and {data!r} is a data set: leave "
            "it out, or name LLaVA's JSON file."
        )
    try:
        if os.path.isfile(os.path.join(data, "dataset_dict.json")):  # save_to_disk of several splits
            table = load_from_disk(os.path.join(data, split))
        elif os.path.isfile(os.path.join(data, "state.json")):  # and of one
            table = load_from_disk(data)
        else:
            table = load_dataset(data, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{data!r} cannot be read as a data set with the split {split!r}: {error}. Check the name, the split and "
            "the connection, or name a .json or .jsonl file."
        ) from error
    features = table.features or {}
    if features.get("images") != IMAGES or "messages" not in features:
        raise ValueError(
            f"{data!r} has the columns {dict(features)}, and training needs images, {IMAGES}, and "
            "messages: rename and cast the columns, or give LLaVA's JSON file and its image_folder."
        )
    pictures = ("images", TEACHER_IMAGES) if TEACHER_IMAGES in features else ("images",)
    if features[pictures[-1]] != IMAGES:
        raise ValueError(
            f"{data!r} has {TEACHER_IMAGES} of the type {features[TEACHER_IMAGES]}, and {IMAGES} is needed: cast or "
            "drop the column."
        )
    table = table.select_columns([*pictures, "messages"])
    return _Source(data, partial(_raw_rows, table), _from_messages, table, pictures)


def _features(pictures: tuple[str, ...]) -> Features:
    return Features({name: FEATURES.get(name, FEATURES["images"]) for name in (*pictures, "messages")})


def _raw_rows(table: Dataset | IterableDataset) -> Iterator[Row]:
    """Yield rows with their pictures as they are stored, {"bytes", "path"}; `datasets` would decode them."""
    messages = Features({"messages": table.features["messages"]})
    for batch in table.with_format("arrow").iter(batch_size=16):
        for row in batch.to_pylist():  # content that is a string in one row, parts in another, is stored as JSON
            yield {**row, **messages.decode_example({"messages": row["messages"]})}


# Reading: all rows at once, or one when it is asked for


def _read_all(source: _Source, bad_rows: dict[int, str], skip_bad_rows: bool) -> Dataset:
    """Check all rows. The pictures of a data set stay where they are; only the messages are written anew."""
    columns = list(FEATURES) if source.table is None else ["messages"]
    features = Features({column: FEATURES[column] for column in columns})
    rows = source.rows()
    bar = tqdm(rows, desc="Checking rows", unit="row", total=None if source.table is None else len(source.table))
    checked = ({column: row[column] if row else [] for column in columns} for row in _check(bar, source, bad_rows))
    batches = [Dataset.from_list(batch, features) for batch in iter(lambda: list(islice(checked, BATCH)), [])]
    total = sum(map(len, batches))
    report_bad_rows(source.name, bad_rows, total, skip_bad_rows)
    table = concatenate_datasets(batches)
    if source.table is not None:
        table = concatenate_datasets([source.table.select_columns(list(source.pictures)), table], axis=1)
    table = Dataset(
        table.data, info=DatasetInfo(features=_features(source.pictures))
    )  # the same storage, read by `Picture`
    return table.select([index for index in range(total) if index not in bad_rows]) if bad_rows else table


def _read_on(source: _Source, bad_rows: dict[int, str], skip_bad_rows: bool) -> Iterator[Row]:
    """Yield good rows. Bad ones are reported when met, the first few, and together at the end of a pass."""
    total = 0
    for total, row in enumerate(_check(source.rows(), source, bad_rows), start=1):
        if row is not None:
            yield row
        elif not skip_bad_rows:
            report_bad_rows(source.name, bad_rows, total, skip_bad_rows)
        elif len(bad_rows) <= LISTED:
            warnings.warn(f"Left out row {total - 1} of {source.name!r}: {bad_rows[total - 1]}", stacklevel=2)
    report_bad_rows(source.name, bad_rows, total, skip_bad_rows)


def _check(rows: Iterable[Any], source: _Source, bad_rows: dict[int, str]) -> Iterator[Row | None]:
    """Yield each row as training wants it, or None where `bad_rows` now says why not."""
    for index, raw in enumerate(rows):
        try:
            row = source.read(raw)
        except _BadRow as bad:
            row, bad_rows[index] = None, str(bad)
        yield row


def report_bad_rows(name: str, bad_rows: dict[int, str], total: int, skip_bad_rows: bool) -> None:
    """Raise or warn if there are bad rows; raise in either case if there is no good one."""
    if total == 0:
        raise ValueError(f"{name!r} has no rows: name other data.")
    if not bad_rows:
        return
    lines = [f"row {index}: {reason}" for index, reason in islice(bad_rows.items(), LISTED)]
    if len(bad_rows) > LISTED:
        lines.append(f"and {len(bad_rows) - LISTED} more")
    listed = "\n".join(lines)
    if skip_bad_rows and len(bad_rows) < total:
        warnings.warn(f"Left out {len(bad_rows)} of {total} rows of {name!r}:\n{listed}", stacklevel=4)
        return
    way_out = "Mend them." if skip_bad_rows else "Mend them, or leave them out with --skip_bad_rows."
    raise ValueError(f"{len(bad_rows)} of {total} rows read from {name!r} cannot be trained on:\n{listed}\n{way_out}")


# One row


def _from_llava(row: Any, image_folder: str | None) -> Row:
    turns = _dicts(_typed(row, dict, "the row").get("conversations"), "conversations")
    messages = [_message(turn.get("from"), _typed(turn.get("value"), str, "value"), SPEAKERS) for turn in turns]
    image = row.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if names and image_folder is None:
        raise ValueError(
            f"The rows have pictures such as {names[0]!r}, and no image_folder is given: name the folder that their "
            "names are relative to."
        )
    _check_conversation(messages, len(names))
    return {"images": [_check_picture(_find(name, image_folder)) for name in names], "messages": messages}


def _from_messages(row: Row, inside: str | None = None) -> Row:
    """Return a data set's row in TRL's form; its pictures must lie in the data set `inside`, if that is given."""
    images, raw = _typed(row["images"], list, "images"), _dicts(row["messages"], "messages")
    messages = [_message(message.get("role"), message.get("content"), ROLES) for message in raw]
    marked = any(PICTURE in message["content"] for message in messages)
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is not None and isinstance(raw[first]["content"], str) and not marked:
        messages[first]["content"] = [PICTURE] * len(images) + messages[first]["content"]
    _check_conversation(messages, len(images))
    checked = {"images": [_check_picture(picture, inside) for picture in images]}
    if TEACHER_IMAGES in row:
        teacher = _typed(row[TEACHER_IMAGES], list, TEACHER_IMAGES)
        checked[TEACHER_IMAGES] = [_check_picture(picture, inside) for picture in teacher]
        sizes = [[_size(picture) for picture in pictures] for pictures in checked.values()]
        if sizes[0] != sizes[1]:
            raise _BadRow(
                f"its images have the sizes {sizes[0]} and its {TEACHER_IMAGES} {sizes[1]}: the base must see as "
                "many pictures, of the same sizes"
            )
    return {**checked, "messages": messages}


def _size(picture: Row) -> tuple[int, int]:
    return Picture().decode_example(picture).size


def _message(speaker: Any, content: Any, roles: dict[str, str]) -> Row:
    """Return {"role", "content"} with pictures before text; `roles` go by what the source calls the speakers."""
    if speaker not in list(roles):
        raise _BadRow(f"a message is from {speaker!r:.60}, and only {', '.join(roles)} speak")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else _dicts(content, "content")
    pieces = [piece for part in parts for piece in _split(part)]
    return {"role": roles[speaker], "content": sorted(pieces, key=lambda piece: piece != PICTURE)}


def _split(part: Row) -> list[Row]:
    """Return a part as pictures, one for each mark, and the text without the marks."""
    if (fault := fault_of_part(part)) is not None:
        raise _BadRow(fault)
    if part["type"] == "image":
        return [PICTURE]
    text = part["text"]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold and Arrow cannot
        raise _BadRow(f"the text {text!r:.60} is not valid Unicode") from error
    count = text.count(MARK)
    return [PICTURE] * count + [{"type": "text", "text": text.replace(MARK, "").strip() if count else text}]


def _check_conversation(messages: list[Row], num_images: int) -> None:
    roles = [message["role"] for message in messages]
    if not roles:
        raise _BadRow("it has no messages")
    if "assistant" not in roles:
        raise _BadRow(f"no message is from the assistant, so there is nothing to train on: {', '.join(roles):.80}")
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(turns)):
        raise _BadRow(f"user and assistant do not take turns: {', '.join(roles):.80}")
    marks = [message["content"].count(PICTURE) for message in messages]
    first = marks[roles.index("user")]
    if num_images > MOST_PICTURES:
        raise _BadRow(f"it has {num_images} images, and at most {MOST_PICTURES} are read")
    if first != num_images or sum(marks) != first:
        raise _BadRow(
            f"it has {_counted(num_images, 'image')} but {_counted(first, MARK + ' mark')} in the first user message "
            f"and {sum(marks) - first} elsewhere: put one per image into the first user message"
        )
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not "".join(part["text"] for part in message["content"]).strip():
            raise _BadRow(f"the reply in message {number} is empty")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _find(name: Any, image_folder: str) -> Row:
    """Return the picture of a name, which must lie in the folder also after `..` and symbolic links."""
    try:
        path = os.path.realpath(os.path.join(image_folder, _typed(name, str, "image")))
        inside = os.path.commonpath([image_folder, path]) == image_folder
    except ValueError as error:  # such as a null byte
        raise _BadRow(f"{name!r:.60} is not the name of a picture: {error}") from error
    if not inside:
        raise _BadRow(f"the picture {name!r} lies outside of {image_folder!r}")
    return {"bytes": None, "path": path}


def _check_picture(picture: Any, inside: str | None = None) -> Row:
    """Decode the picture as training will, and return it still encoded."""
    picture = _typed(picture, dict, "an image")
    path = picture["path"]
    if inside is not None and picture["bytes"] is None and path is not None and outside_of(inside, path):
        raise _BadRow(
            f"the picture {path!r:.200} is a web address or lies outside of {inside!r}: move it there, or "
            "allow it with --allow_remote_images"
        )
    try:
        Picture().decode_example(picture)
    except ValueError as error:
        raise _BadRow(str(error)) from error
    # beside bytes the path is only a name, but `datasets` would prefer a file of that name in the working folder
    return picture if picture["bytes"] is None else {**picture, "path": None}


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise _BadRow(f"{what} is {value!r:.60}, not a {KINDS[kind]}")
    return value


def _dicts(value: Any, what: str) -> list[Row]:
    return [_typed(entry, dict, f"an entry of {what}") for entry in _typed(value, list, what)]
