"""Whether a corrected adapter follows from the adapter, the subspace file and the policy that its report names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from csulora.adapters.disk import config_as_written, load_adapter, modules_as_written
from csulora.adapters.expert_encoding import LAYOUTS, Layout
from csulora.adapters.lora import CORRECTED_SHA256, REPORT_FILE, Adapter, LoraModule, has_same_bits
from csulora.adapters.weights_files import CONFIG_FILE, LARGEST_CONFIG
from csulora.correction.correct import correct
from csulora.correction.report import spell_infinity
from csulora.correction.strength import as_adjusted
from csulora.errors import InputError
from csulora.io.files import parse_json, read_regular
from csulora.native import _core
from csulora.policy.policy import Policy
from csulora.policy.toml import one_line
from csulora.subspace.subspace import Subspace

_LARGEST_REPORT = 64 << 20  # bytes
_PENALTIES = ("aligned", "partial", "off")

# Other processors and versions of torch round otherwise, and the result is rounded to its storage type.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Check:
    """One statement of a report and what was found instead or as well.

    Attributes:
        what: ``content``, ``original``, ``subspace``, ``policy``, ``configuration`` or ``update``.
        stated: a sha256 or a policy's document; None for the configuration and the update, which are made again.
        found: the same of what was found; of a policy the one that is required, or ``any``; otherwise a sentence.
        holds: whether both agree.
    """

    what: str
    stated: str | dict[str, Any] | None
    found: str | dict[str, Any]
    holds: bool

    @property
    def reason(self) -> str:
        """What does not hold, in one line."""
        if self.stated is None:
            return f"{self.what} {self.found}"
        verb = "required" if isinstance(self.found, dict) else "found"
        return f"{self.what}: {_line(self.stated)} is stated, and {_line(self.found)} is {verb}"


def audit(
    corrected: str | Path,
    original: str | Path | None = None,
    subspace: Subspace | None = None,
    base_model: str | Path | None = None,
    policy: Policy | None = None,
    *,
    expert_layout: str | None = None,
) -> list[Check]:
    """Compare a corrected adapter with its report, and with what the report says it was made from.

    Args:
        corrected: the directory that `save_adapter` wrote.
        original: the adapter it was made from.
        subspace: the one it was made with; with both, the correction is made again.
        base_model: the model that the original is for, if that is a GGUF file; see `load_adapter`.
        policy: the one it must have been corrected with; None: whichever the report states, which may keep everything.
        expert_layout: who ordered the original's fused experts; see `load_adapter`.

    Returns:
        One `Check` per statement. Without ``original`` and ``subspace`` they say that the directory is as it was
        written, and nothing about what wrote it: anybody can write a report.

    Raises:
        InputError: the directory holds no report of csulora's, or one that says nothing of its content.
        CsuloraError: an adapter is malformed or refused.

    >>> found = csulora.Subspace.open(subspace)
    >>> fixed, _ = csulora.correct(csulora.load_adapter(adapter), found, csulora.Policy.project())
    >>> sha256 = csulora.save_adapter(fixed, "audited")
    >>> all(check.holds for check in csulora.audit("audited", adapter, found))
    True
    """
    corrected = Path(corrected)
    report = _read_report(corrected / REPORT_FILE)
    adapter = load_adapter(corrected)
    checks = [_same("content", report[CORRECTED_SHA256], adapter.sha256)]
    source = load_adapter(original, base_model, expert_layout=expert_layout) if original is not None else None
    if source is not None:
        checks.append(_same("original", report["adapter_sha256"], source.sha256))
    if subspace is not None:
        checks.append(_same("subspace", report["subspace_sha256"], subspace.sha256))
    if source is not None and subspace is not None and all(check.holds for check in checks[1:]):
        stated = _policy(report["policy"], corrected / REPORT_FILE)
        again, _ = correct(source, subspace, stated, _layout(report, corrected / REPORT_FILE))
        checks += [
            _same_policy(stated, policy and as_adjusted(policy, source)),
            _configuration(corrected / CONFIG_FILE, config_as_written(again, adapter.format)),
            _update(adapter, modules_as_written(again, adapter.format)),
        ]
    return checks


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent}: holds no {REPORT_FILE}; only what csulora has corrected can be verified")
    report = parse_json(read_regular(path, _LARGEST_REPORT), path)
    for field in (CORRECTED_SHA256, "adapter_sha256", "subspace_sha256"):
        if not isinstance(report.get(field), str):
            raise InputError(f"{path}: does not state {field}; it is no report of this csulora")
    if not isinstance(report.get("policy"), dict):
        raise InputError(f"{path}: does not state the policy; it is no report of this csulora")
    return report


def _policy(stated: dict[str, Any], path: Path) -> Policy:
    """Read a policy as a report states it: infinity, which JSON lacks, is the text ``inf``."""
    overrides = stated.get("overrides")
    entries = overrides if isinstance(overrides, list) else []
    tables = [entry.get("penalties") for entry in entries if isinstance(entry, dict)]
    for table in [stated, *(table for table in tables if isinstance(table, dict))]:
        table |= {name: math.inf for name in _PENALTIES if table.get(name) == "inf"}
    try:
        return Policy.from_dict(stated)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _layout(report: dict[str, Any], path: Path) -> Layout | None:
    """Read which layout of experts was asked for: it decides names and shapes, and nothing about the update."""
    stated = report.get("layout")
    if stated is None or stated in LAYOUTS:
        return stated
    raise InputError(f"{path}: layout must be {' or '.join(LAYOUTS)}")


def _configuration(path: Path, wanted: dict[str, Any]) -> Check:
    """Compare every field of a configuration with what csulora writes."""
    found = parse_json(read_regular(path, LARGEST_CONFIG), path)
    different = [field for field in sorted(found.keys() | wanted.keys()) if found.get(field) != wanted.get(field)]
    return Check("configuration", None, f"differs in {', '.join(different) or 'nothing'}", not different)


def _same(what: str, stated: str, found: str) -> Check:
    return Check(what, stated, found, stated == found)


def _same_policy(stated: Policy, required: Policy | None) -> Check:
    document = spell_infinity(stated.to_dict())
    if required is None:
        return Check("policy", document, "any", True)
    return Check("policy", document, spell_infinity(required.to_dict()), required == stated)


def _line(value: str | dict[str, Any]) -> str:
    return one_line(value) if isinstance(value, dict) else value


def _update(adapter: Adapter, again: Mapping[str, LoraModule]) -> Check:
    """Compare the updates of two adapters module by module."""
    if adapter.modules.keys() != again.keys():
        different = min(adapter.modules.keys() ^ again.keys())
        return Check("update", None, f"{different} is in one of both only", False)
    distances = {name: _distance(module.folded(), again[name].folded()) for name, module in adapter.modules.items()}
    allowed = {name: _TOLERANCE[module.b.dtype] for name, module in adapter.modules.items()}
    worst = max(distances, key=lambda name: distances[name] / allowed[name])
    holds = distances[worst] <= allowed[worst]
    return Check("update", None, f"differs by {distances[worst]:.1e} of its norm, most in {worst}", holds)


def _distance(one: LoraModule, other: LoraModule) -> float:
    """|X - Y| / |Y|, in factors of scale 1: the norm of [B1, -B2] times [A1; A2]."""
    if has_same_bits(one.b, other.b) and has_same_bits(one.a, other.a):
        return 0.0
    if one.shape != other.shape:
        return math.inf
    difference = _norm(torch.cat([one.b, -other.b], 1).float(), torch.cat([one.a, other.a]).float())
    whole = _norm(other.b, other.a)
    return difference / whole if whole else math.inf


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """|b a|; infinity where that is not finite, as a scale that nobody corrected can make it."""
    norm = _core.norm(_core.LoraFactors(b, a))
    return norm if math.isfinite(norm) else math.inf
