"""From an adapter, a subspace file and a policy to the corrected adapter and a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from csulora.adapters import experts
from csulora.adapters.expert_encoding import (
    Layout,
    check_layout,
    check_none_is_left_out,
    check_number,
    in_layout,
)
from csulora.adapters.factors import check_in_memory
from csulora.adapters.lora import REPORT_FILE, Adapter, LoraModule, TextsOnDemand
from csulora.adapters.mlx.directory import check_model
from csulora.correction.annihilation import AlignedWeights, Sketches, with_annihilation
from csulora.correction.copies import check_copies
from csulora.correction.core_policy import attenuation, core_options
from csulora.correction.host_meaning import host_notes, todays_names
from csulora.correction.joint_rank import is_written_fused, jointly_truncated
from csulora.correction.limits import check_limits
from csulora.correction.model_card import model_card
from csulora.correction.report import ModuleReport, Report
from csulora.correction.strength import as_adjusted
from csulora.correction.uncovered import its_own_file, of_another_family, why_uncovered
from csulora.errors import (
    AmbiguousError,
    InputError,
    LimitError,
    OtherFamilyError,
    OtherModelError,
    OtherSubspaceError,
    RefusedError,
    TooLargeError,
    UncoveredError,
    check_type,
)
from csulora.io.files import to_json
from csulora.models.resolver import Resolved, Resolver
from csulora.native import _core
from csulora.policy.policy import Policy
from csulora.subspace.subspace import Subspace

LARGEST_RANK = 512  # vLLM's largest, too


def correct(
    adapter: Adapter,
    subspace: Subspace,
    policy: Policy | None = None,
    layout: Layout | None = None,
    *,
    aligned: str | Path | None = None,
) -> tuple[Adapter, Report]:
    """Compute the closest safe update of every module (CSULoRA, arXiv 2605.30640).

    Args:
        adapter: what `load_adapter` returned; it is not modified. Its tensors may be on a GPU, all of them on one, in
            a build with CUDA; those of the result are where they are, and so are the factors of ``subspace`` from then
            on.
        subspace: the subspaces of the model the adapter is for.
        policy: what to keep and what to refuse. There is no default: a policy that fits one adapter leaves all of
            the undo in another.
        layout: of updates of experts. ``per-expert`` returns a pair of factors for each expert and projection,
            ``fused`` one for both parameters of each layer's experts, as PEFT writes them; None: as they came. Fused
            factors of gate and up have both ranks together, or the policy's where it asks for a number.
        aligned: the aligned checkpoint, for the annihilation ratios in the report. All of its matrices that the
            adapter updates are read. None: they are estimated from the subspace file's sketches, or absent.

    Returns:
        The corrected adapter, in the input's storage types with every scale 1, and the report. Modules that have the
        names of transformers 4 get those of today.

    Raises:
        RefusedError: a module is not covered or has a rank above 512, a limit of the policy is exceeded, a copy of a
            base matrix is not the aligned checkpoint's, ``aligned`` is another checkpoint, only some experts of a
            projection would be written, the policy was tuned for another subspace file, or it has strengths and none
            for this adapter.
        InputError: an argument is a path or missing, a factor is no dense tensor, a scale is no finite number, a shape
            differs from that in ``subspace``, an override of the policy matches none of its modules or has gains for
            more directions than it has, or the result does not fit the storage type.

    >>> policy = csulora.Policy.protect(1.0)
    >>> fixed, report = csulora.correct(csulora.load_adapter(adapter), csulora.Subspace.open(subspace), policy)
    >>> 0 < report.totals.relative_change < 1
    True
    """
    check_type(adapter, Adapter, "adapter")
    check_type(subspace, Subspace, "subspace")
    policy = check_type(policy, Policy, "policy")
    check_subspace(policy, subspace)
    policy = as_adjusted(policy, adapter)
    check_layout(layout)
    for name, module in adapter.modules.items():
        check_in_memory(name, module, adapter.path)
    adapter = experts.decoded(adapter, subspace.provenance.experts)
    covered = cover(adapter, subspace, policy)
    _check_ranks(adapter, covered, policy)
    if layout is None:
        kept = [name for name in adapter.modules if name in covered or policy.fate_of(name) == "keep"]
        check_none_is_left_out(adapter, kept, subspace)
    corrected = _corrected(adapter, subspace, policy, covered)
    if isinstance(policy.rank, int) and is_written_fused(adapter, layout):
        corrected |= jointly_truncated(corrected, subspace, covered, policy.rank)
    report = _report(adapter, subspace, policy, covered, corrected, layout)
    if aligned is not None:
        report = with_annihilation(report, adapter, corrected, covered, AlignedWeights(aligned, subspace))
    elif subspace.is_sketched:
        report = with_annihilation(report, adapter, corrected, covered, Sketches(subspace))
    try:
        check_limits(adapter, report, policy, covered)
    except LimitError as error:
        error.totals = asdict(report.totals)
        raise

    modules: dict[str, LoraModule] = {}
    renamed = todays_names(covered, subspace.names)
    # mlx-lm has names of its own, which its directories keep.
    in_peft, renamed = (renamed, {}) if adapter.format == "mlx" else ({}, renamed)
    for name, module in adapter.modules.items():
        if name in corrected:
            factors = corrected[name].factors
            modules[renamed.get(name, name)] = LoraModule(factors.b, factors.a, is_embedding=module.is_embedding)
        elif policy.fate_of(name) == "keep":
            modules[name] = module
    documents = TextsOnDemand(
        {REPORT_FILE: lambda: to_json(report.to_dict()), "README.md": lambda: model_card(report, _base_model(adapter))}
    )
    partial = adapter.partial or bool(renamed) or len(modules) < len(adapter.modules)
    result = replace(adapter, modules=modules, documents=documents, partial=partial, copies={}, names_in_peft=in_peft)
    return in_layout(result, subspace, layout), report


def _check_ranks(adapter: Adapter, covered: Iterable[str], policy: Policy) -> None:
    """Refuse what would take minutes for a matrix, unless nothing but the rank is asked to change."""
    if replace(policy.without_limits(), rank="keep", keep_uncovered=(), drop_uncovered=()) == Policy.none():
        return
    for name in covered:
        module = adapter.modules[name]
        if min(module.rank, *module.shape) > LARGEST_RANK:
            raise TooLargeError(
                f"{adapter.path}: module {name} has rank {module.rank}; ranks up to {LARGEST_RANK} are corrected. "
                f"Reduce it first, in some minutes: csulora correct {adapter.path} --policy none --rank {LARGEST_RANK} "
                "--subspace FILE -o SMALLER"
            )


def _corrected(
    adapter: Adapter, subspace: Subspace, policy: Policy, covered: Mapping[str, str]
) -> dict[str, _core.Correction]:
    label = str(adapter.path).encode(errors="backslashreplace").decode()  # a path need not be UTF-8
    device = _device(adapter, covered)
    tasks = [
        _core.CorrectionTask(
            _core.LoraFactors(adapter.modules[name].b, adapter.modules[name].a, adapter.modules[name].scale),
            core,
            attenuation(policy, target),
            f"{label}: {name}",
            input_filter.to_core()
            if policy.filtered and (input_filter := subspace.input_filter(target, device))
            else None,
        )
        for (name, target), core in zip(covered.items(), subspace.to_core(covered.values(), device), strict=True)
    ]
    return dict(zip(covered, _core.correct(tasks, core_options(policy)), strict=True))


def check_subspace(policy: Policy, subspace: Subspace) -> None:
    """Check that a policy fits a subspace file.

    Raises:
        RefusedError: it was tuned for another subspace file.
        InputError: an override matches none of the subspace file's modules, or a filtered policy finds no input
            filters.
    """
    if policy.subspace_sha256 not in (None, subspace.sha256):
        raise OtherSubspaceError(
            f"the policy was tuned for the subspace file {policy.subspace_sha256}, and this one is {subspace.sha256}; "
            "use that one, which `csulora tune` named at its end, or tune again"
        )
    if policy.filtered and not subspace.is_filtered:
        raise InputError(
            "the policy is filtered, and the subspace file has no input filters; use the one that tune wrote beside it"
        )
    policy.check_overrides(subspace)


def _device(adapter: Adapter, covered: Iterable[str]) -> torch.device:
    """Return the one device of an adapter's factors."""
    factors = [factor for name in covered for factor in (adapter.modules[name].b, adapter.modules[name].a)]
    devices = {factor.device for factor in factors}
    if len(devices) > 1:
        raise InputError(f"{adapter.path}: has factors on {sorted(map(str, devices))}; move them to one device")
    return devices.pop()


def _base_model(adapter: Adapter) -> str | None:
    name = adapter.config.get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def cover(adapter: Adapter, subspace: Subspace, policy: Policy) -> dict[str, str]:
    """Map each covered module to the subspace file's name for it, in the adapter's order.

    Raises:
        RefusedError: a module is not covered, or a copy of a base matrix is not the aligned checkpoint's.
        InputError: a shape or a number of experts differs from that in ``subspace``.
    """
    check_copies(adapter, subspace)
    check_number(adapter, subspace)
    if adapter.format == "mlx":
        check_model(subspace.keys(), adapter.path, subspace.provenance.model_type)
    covered: dict[str, str] = {}
    owners: dict[Resolved, str] = {}
    resolver = Resolver(subspace, subspace.aliases, subspace.names)
    for name, module in adapter.modules.items():
        try:
            found = resolver.resolve(name)
        except RefusedError as error:
            raise AmbiguousError(f"{adapter.path}: {error}") from error
        if found is None:
            if policy.fate_of(name) == "refuse":
                raise UncoveredError(f"{adapter.path}: {why_uncovered(adapter, name, subspace, resolver)}")
            continue
        target = found.module
        if module.shape != subspace[target].shape:
            raise OtherModelError(
                f"{adapter.path}: module {name} updates a {list(module.shape)} matrix, but {target} is "
                f"{list(subspace[target].shape)} in the subspace file; the adapter is for a model of another size, so "
                f"{its_own_file(adapter)}"
            )
        # A tied weight may be updated under both of its names, each of them once.
        earlier = owners.setdefault(found, name)
        if earlier != name:
            raise AmbiguousError(
                f"{adapter.path}: modules {earlier} and {name} both update {target}; servers disagree on which of "
                "them they apply"
            )
        covered[name] = target
    if not covered:
        raise OtherFamilyError(f"{adapter.path}: {of_another_family(adapter)}")
    return covered


def _report(
    adapter: Adapter,
    subspace: Subspace,
    policy: Policy,
    covered: dict[str, str],
    corrected: Mapping[str, _core.Correction],
    layout: Layout | None,
) -> Report:
    modules = []
    for name, module in adapter.modules.items():
        if name in corrected:
            modules.append(ModuleReport.corrected(name, module.rank, subspace[covered[name]].norm, corrected[name]))
        elif policy.fate_of(name) == "keep":
            norm = _core.norm(_core.LoraFactors(module.b, module.a, module.scale))
            modules.append(ModuleReport(name, "kept", module.rank, module.rank, norm))
        else:
            modules.append(ModuleReport(name, "dropped", module.rank, 0))
    return Report(
        adapter=adapter.path.resolve().name,
        adapter_sha256=adapter.sha256,
        subspace_sha256=subspace.sha256,
        fingerprints=subspace.fingerprints,
        policy=policy.to_dict(),
        modules=tuple(modules),
        copies=tuple(adapter.copies),
        host_notes=host_notes(adapter, covered, subspace, layout),
        layout=layout,
    )
