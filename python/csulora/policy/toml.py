"""Policies as TOML: the file, the tables of its overrides, and the whole in one line."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from csulora.errors import InputError, MissingFileError
from csulora.io.files import read_regular, write_text
from csulora.policy.overrides import GAINS, PENALTIES, SIDES, Directions, Override

PRESETS = ("csulora", "project", "protect", "none")
POLICY_CHOICES = f"choose a preset ({', '.join(PRESETS)}) or a policy file (TOML); `csulora tune` fits one to prompts"
_LARGEST_FILE = 128 << 20  # bytes; a policy with gains of 64 directions has about 3 KiB a module


def data_of(path: Path) -> bytes:
    """Return a policy file's bytes, or raise `InputError`."""
    if not path.exists():
        raise MissingFileError(f"{path}: no such policy; {POLICY_CHOICES}")
    return read_regular(path, _LARGEST_FILE)


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """Return the TOML document that ``path`` holds as ``data``, or raise `InputError`."""
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from error


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a TOML document, complete or not at all."""
    write_text(path, tomli_w.dumps(document))


def one_line(document: dict[str, Any]) -> str:
    """Return a policy's document as a card or a table shows it: ``off=1, rank=keep, 2 overrides``."""
    counted = ("strengths", "overrides")
    fields = {key: value for key, value in document.items() if key not in counted}
    texts = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in fields.items()]
    for key in counted:
        count = len(document.get(key, ()))
        texts += [f"{count} {key if count > 1 else key.removesuffix('s')}"] if count else []
    return ", ".join(texts)


def override_document(override: Override) -> dict[str, Any]:
    """Return an override as its TOML table."""
    if override.gains is not None:
        return {"match": override.match, "gains": dict(zip(GAINS, override.gains, strict=True))}
    if override.directions is not None:
        lists = {name: list(values) for name, values in asdict(override.directions).items()}
        if not lists["reinforced"]:
            del lists["reinforced"]
        return {"match": override.match, "directions": lists}
    assert override.penalties is not None
    return {"match": override.match, "penalties": dict(zip(PENALTIES, override.penalties, strict=True))}


def read_override(entry: Any) -> Override:
    """Read an override from its TOML table, or raise `InputError`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
        raise InputError("policy: every override must be a table with a `match`")
    known = ("match", "penalties", "gains", "directions")
    if unknown := set(entry) - set(known):
        raise InputError(
            f"policy override {entry['match']!r}: unknown field {min(unknown)!r}; the fields are {', '.join(known)}"
        )
    values: dict[str, Any] = {}
    for kind, keys in (("penalties", PENALTIES), ("gains", GAINS)):
        if kind in entry:
            table = entry[kind]
            if not isinstance(table, dict) or set(table) != set(keys):
                raise InputError(f"policy override {entry['match']!r}: {kind} must be a table of {', '.join(keys)}")
            values[kind] = tuple(table[key] for key in keys)
    if "directions" in entry:
        values["directions"] = _directions(entry["directions"], f"policy override {entry['match']!r}")
    return Override(entry["match"], **values)


def _directions(table: Any, where: str) -> Directions:
    is_table = isinstance(table, dict) and set(table) - {"reinforced"} == set(SIDES)
    if not is_table or not all(isinstance(values, list) for values in table.values()):
        raise InputError(f"{where}: directions must be a table of the lists left and right, and perhaps reinforced")
    return Directions(**{name: tuple(values) for name, values in table.items()})
