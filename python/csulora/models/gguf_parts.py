"""GGUF models that llama-gguf-split has spread over files called ``NAME-00001-of-0000N.gguf``."""

from __future__ import annotations

import re
from pathlib import Path

from gguf import Keys

from csulora.errors import InputError
from csulora.models.gguf_file import GGUFFile

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST_PARTS = 1000


def open_parts(path: Path) -> list[GGUFFile]:
    """Map a model's file, and where it is the first part of several the others that lie beside it.

    Raises:
        InputError: a file is malformed, it is not the first part, or another is missing or belongs to another model.
    """
    first = GGUFFile.map(path)
    count = first.integer(Keys.Split.LLM_KV_SPLIT_COUNT) or 1
    if count == 1:
        return [first]
    if (number := first.integer(Keys.Split.LLM_KV_SPLIT_NO)) != 0:
        raise InputError(f"{path}: is part {(number or 0) + 1} of {count}; name the first, which describes the model")
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) != count or not count <= _MOST_PARTS:
        raise InputError(
            f"{path}: is the first of {count} parts, and is not called so; rename it to NAME-00001-of-{count:05}.gguf, "
            "as llama.cpp wants it"
        )
    parts = [first]
    for number, part in enumerate(_named(path, found)[1:], 1):
        if not part.is_file():
            raise InputError(f"{part}: is missing; put all {count} parts into one directory, as llama.cpp wants them")
        parts.append(GGUFFile.map(part))
        _check_part(parts[-1], number, count)
    tensors = sum(len(part.tensors) for part in parts)
    if tensors != (stated := first.integer(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)):
        raise InputError(f"{path}: speaks of {stated} tensors, and its parts hold {tensors}; are they of one model?")
    return parts


def parts_beside(path: Path) -> list[Path]:
    """Return where the parts of a model lie, as the name of one of them says: that file alone if it says nothing."""
    found = _PART.fullmatch(path.name)
    return _named(path, found) if found and int(found["count"]) <= _MOST_PARTS else [path]


def _named(path: Path, found: re.Match[str]) -> list[Path]:
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _check_part(part: GGUFFile, number: int, count: int) -> None:
    stated = part.integer(Keys.Split.LLM_KV_SPLIT_NO), part.integer(Keys.Split.LLM_KV_SPLIT_COUNT)
    if stated != (number, count):
        raise InputError(f"{part.path}: says that it is part {stated[0]} of {stated[1]}; is it of another model?")
