"""A decision made again from its line in the log: are the files those that took part, and is the outcome the same?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from csulora.adapters.disk import load_adapter, save_with_hashes
from csulora.adapters.lora import Adapter
from csulora.correction.audit import Check
from csulora.correction.correct import correct
from csulora.errors import CsuloraError, InputError, MissingFileError, reason_code_of
from csulora.io.files import parse_json, sha256_of_file
from csulora.policy.policy import Policy
from csulora.serving.admission import cast as cast_to
from csulora.serving.admission import to_be_rounded_once
from csulora.serving.decisions import Form, schema, versions
from csulora.subspace.subspace import Subspace

Fit = Callable[[Adapter], Adapter]
_OF_MORE_THAN_FILES = frozenset(
    {
        "bug",
        "build",
        "changed-since-signed",
        "device",
        "device-memory",
        "error",
        "exhausting",
        "host",
        "host-limit",
        "internal",
        "log",
        "machine",
        "not-covered-by-signature",
        "other-signer",
        "uncovered-route",
        "undo-together",
        "unsafe-file",
        "unsafe-name",
        "unsigned",
    }
)
"""Reasons of a host, of what was served besides, of signatures, or of the moment."""


@dataclass(frozen=True)
class Sources:
    """Where the files lie now; None: where the line says.

    Attributes:
        adapter: the original.
        subspace: the subspace file.
        policy: the policy file.
    """

    adapter: Path | None = None
    subspace: Path | None = None
    policy: Path | None = None


def find(log: Path, identity: str) -> tuple[dict[str, Any], frozenset[tuple[str, str]]]:
    """Find the line of a log with that id, or the beginning of one; ``last`` is the last line.

    Returns:
        The line, and path and sha256 of each file that later lines say was written where the line's outputs were.

    Raises:
        InputError: the log cannot be read, or holds no such line, or several, or the line is damaged.
    """
    lines = _lines(log)
    if not lines:
        raise InputError(f"{log}: holds no decision; name the file that --decisions or CSULORA_DECISIONS named")
    wanted = f'"id": "{identity}'.encode(errors="backslashreplace")
    found = [len(lines) - 1] if identity == "last" else [at for at, line in enumerate(lines) if wanted in line]
    if not found:
        raise InputError(f"{log}: no decision has the id {identity}; take one from its lines, or `last`")
    if len(found) > 1:
        raise InputError(f"{log}: {len(found)} decisions have an id that begins with {identity!r}; give more of it")
    document = parse_json(lines[found[0]], log)
    damaged = [name for name, rule in schema()["properties"].items() if not _fits(document.get(name, ...), rule)]
    if damaged:
        raise InputError(f"{log}: a line has no usable `{damaged[0]}`, so it is no decision, or damaged; take another")
    return document, _replaced(document, lines[found[0] + 1 :], log)


def _replaced(line: Mapping[str, Any], later: Sequence[bytes], log: Path) -> frozenset[tuple[str, str]]:
    name = json.dumps(line["name"], ensure_ascii=False).encode(errors="backslashreplace")
    documents = (parse_json(text, log) for text in later if name in text)
    outputs = (document.get("outputs") for document in documents)
    return frozenset(
        (path, sha256)
        for written in outputs
        if isinstance(written, dict)
        for path, sha256 in written.items()
        if path in line["outputs"] and isinstance(sha256, str)
    )


def _lines(log: Path) -> list[bytes]:
    try:
        return log.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{log}: cannot be read: {error.strerror}") from error


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "object": dict,
    "array": list,
    "boolean": bool,
    "number": (int, float),
    "null": type(None),
}


def _fits(value: object, rule: Mapping[str, Any]) -> bool:
    """Whether a value is what a part of `schema` says, as far as lines are read here."""
    if "anyOf" in rule:
        return any(_fits(value, choice) for choice in rule["anyOf"])
    if "enum" in rule:
        return value in rule["enum"]
    types = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    if not any(isinstance(value, _TYPES[name]) for name in types):
        return False
    if isinstance(value, str):
        return re.fullmatch(rule.get("pattern", ".*"), value, re.DOTALL) is not None
    if isinstance(value, list):
        return rule["minItems"] <= len(value) <= rule["maxItems"] and all(_fits(each, rule["items"]) for each in value)
    if not isinstance(value, dict):
        return True
    if not set(rule.get("required", ())) <= value.keys():
        return False
    rules = {name: rule.get("properties", {}).get(name, rule["additionalProperties"]) for name in value}
    return all(_fits(child, rules[name]) if rules[name] else False for name, child in value.items())


def decide_again(
    line: Mapping[str, Any],
    sources: Sources | None = None,
    fit: Fit | None = None,
    replaced: Collection[tuple[str, str]] = (),
) -> list[Check]:
    """Compare the files that a line names with those that are there, and make its outcome again.

    Args:
        line: of the log, see `decision.schema.json`.
        sources: where the files lie now.
        fit: what the host's hook does to a corrected adapter, for a line whose form says ``fitted``.
        replaced: outputs of later decisions, see `find`; what is one of them is no output of this line.

    Returns:
        One `Check` per file, and per output. Outputs are compared bit by bit; those that are still there, with the
        line, too. Another version, or another kind of processor, may round otherwise.

    Raises:
        InputError: a file is missing, or the line says of a withdrawal or of an adapter in memory, or of a refusal that
            depends on more than files.
    """
    if line["verdict"] == "withdrawn" or not line["inputs"]:
        raise InputError(f"decision {line['id']} was made of no file; there is nothing to make again")
    where = _located(line, sources or Sources())
    if line["policy_text"] is not None and sources and sources.policy:
        raise InputError(f"decision {line['id']}: its policy stands in the line; name no other")
    checks = [
        _file(f"input {name}", sha256, _input(where.adapter, name)) for name, sha256 in sorted(line["inputs"].items())
    ]
    checks.append(_file("subspace", line["subspace_sha256"], where.subspace))
    text = line["policy_text"]
    if text is None:
        checks.append(_file("policy", line["policy_sha256"], where.policy))
    else:
        checks.append(_same("policy", line["policy_sha256"], hashlib.sha256(text.encode()).hexdigest()))
    outputs = [
        (output, _file(f"output {Path(output).name}", sha256, Path(output)))
        for output, sha256 in sorted(line["outputs"].items())
        if Path(output).is_absolute() and Path(output).exists()
    ]
    checks += [check for output, check in outputs if check.holds or (output, check.found) not in replaced]
    if all(check.holds for check in checks):
        checks += _outcome(line, where, fit)
    return checks


@dataclass(frozen=True)
class _Located:
    adapter: Path
    subspace: Path
    policy: Path


def _located(line: Mapping[str, Any], sources: Sources) -> _Located:
    subspace = sources.subspace or line["subspace"]
    if subspace is None:
        raise InputError(f"decision {line['id']}: the subspace was in no file; name one with its content")
    return _Located(sources.adapter or Path(line["path"]), Path(subspace), sources.policy or Path(line["policy"] or ""))


def _input(adapter: Path, name: str) -> Path:
    return adapter / name if adapter.is_dir() else adapter


def _file(what: str, stated: str, path: Path) -> Check:
    try:
        return _same(what, stated, sha256_of_file(path))
    except MissingFileError:
        return Check(what, stated, f"no file {path}", False)


def _same(what: str, stated: str, found: str) -> Check:
    return Check(what, stated, found, stated == found)


def _outcome(line: Mapping[str, Any], where: _Located, fit: Fit | None) -> list[Check]:
    text = line["policy_text"]
    policy = Policy.load(where.policy) if text is None else Policy.parse(text.encode(), Path("policy_text"))
    outputs: dict[str, str] = {}
    reason = "corrected now"
    try:
        outputs = _made_again(line, where, policy, fit)
    except CsuloraError as error:
        if line["verdict"] == "corrected":
            raise
        reason = reason_code_of(error)
    if line["verdict"] != "corrected":
        if reason != line["reason_code"] and line["reason_code"] in _OF_MORE_THAN_FILES:
            raise InputError(
                f"decision {line['id']}: the reason was `{line['reason_code']}`, which depends on more than the files "
                "that the line names; those are as stated, and nothing more can be made again"
            )
        return [_same("reason", line["reason_code"], reason)]
    made_by = "" if versions() == line["versions"] else f"; made by {line['versions']}, and here is {versions()}"
    checks = []
    for path, stated in sorted(line["outputs"].items()):
        found = outputs.get(Path(path).name, "not made")
        checks.append(
            Check(f"again {Path(path).name}", stated, found + (made_by if found != stated else ""), found == stated)
        )
    return checks


def _made_again(line: Mapping[str, Any], where: _Located, policy: Policy, fit: Fit | None) -> dict[str, str]:
    """Return name -> sha256 of what the host would be given now."""
    form = Form(**line["form"] or {})
    adapter = replace(load_adapter(where.adapter, line["base_model"]), path=Path(line["path"]))
    if form.dtype:
        adapter = to_be_rounded_once(adapter, _dtype(form.dtype, line))
    corrected, _ = correct(adapter, Subspace.open(where.subspace), policy, form.layout)
    if form.fitted:
        if fit is None:
            raise InputError(
                f"decision {line['id']}: the host's hook changed the corrected adapter; make it again there"
            )
        corrected = fit(corrected)
    if form.dtype:
        corrected = cast_to(corrected, _dtype(form.dtype, line))
    with TemporaryDirectory(prefix="csulora-again-") as directory:
        names = [Path(path).name for path in line["outputs"]]
        is_file = form.format == "gguf"
        path = Path(directory, names[0] if is_file and names else "adapter")
        _, hashes = save_with_hashes(corrected, path, form.format, base_model=line["base_model"])
    return {Path(path).name: sha256 for path, sha256 in hashes.items()}


def _dtype(name: str, line: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"decision {line['id']}: its form has the type {name}, which torch lacks")
    return found
