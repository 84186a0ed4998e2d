"""Policies: what a correction does to each component of an update, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from csulora.errors import InputError
from csulora.policy import toml
from csulora.policy.globs import matches
from csulora.policy.override_index import OverrideIndex
from csulora.policy.overrides import LARGEST, PENALTIES, Override, check_number, check_penalty
from csulora.policy.provenance import PolicyProvenance
from csulora.policy.toml import POLICY_CHOICES, PRESETS

LIMITS = ("max_undo", "max_total_undo", "min_annihilation_ratio")
_UNCOVERED = ("keep_uncovered", "drop_uncovered")
_MOST_GLOBS = 1000

Rank = Literal["keep", "exact"] | int
Fate = Literal["refuse", "drop", "keep"]


@dataclass(frozen=True)
class Policy:
    """How much of each component of an update is kept, gain = 1 / (1 + penalty * relative energy), and what is refused.

    Attributes:
        aligned: penalty on the component inside the subspace on both sides; 0 or more, infinity removes it.
        partial: penalty on the component inside it on one side only.
        off: penalty on the component outside it on both sides.
        rank: ``keep`` the adapter's rank (and what `Directions` reinforce), ``exact`` (up to twice that; for filtered
            `Directions` one more for each that is changed on the left), or the most directions to keep.
        keep_uncovered: globs over the adapter's modules: of those that the subspace file does not cover, the ones that
            pass uncorrected. Modules that it does not cover and no glob names are a reason to refuse the adapter.
        drop_uncovered: those that are left out; it counts before ``keep_uncovered``.
        max_undo: refuse the adapter if any module undoes more than this share of its alignment; None: no limit.
        max_total_undo: the same of all modules together.
        min_annihilation_ratio: refuse the adapter if a module's annihilation ratio is smaller, see
            `csulora.correction.annihilation`, or if nobody can say: that takes the aligned checkpoint's weights,
            or sketches of them.
        overrides: other numbers for some modules; the first whose glob matches counts, and each must for some module.
        reference_energy: relative energy e, in (0, 1], of an adapter that gets the gains of `Directions` as they are;
            one with another e gets g / (g + (1 - g) x), x = (e / reference_energy)^2 and at least 0.4. e is the mean of
            the shares of an update's energy that are written and that are read along all these directions. None: every
            adapter gets the same gains, whatever it is padded with.
        filtered: whether the correction acts only on the inputs that the subspace file's input filters name, see
            `csulora.subspace.input_filter`; modules that have one need gains of `Directions`.
        subspace_sha256: the one subspace file that a tuned policy may be used with; None: any.
        strengths: pairs of an adapter's sha256 and how many times as much is reinforced in that adapter, as `csulora
            adjust` finds. If there are any, all other adapters are refused. None: every adapter gets the same.
        provenance: what a tuned policy was made from. It stands in the policy file alone, and no correction depends
            on it: policies that differ in nothing else are equal.

    >>> policy = csulora.Policy.csulora(2.0, max_undo=0.5)
    >>> policy.aligned, policy.partial, policy.off, policy.max_undo
    (0.0, 2.0, 2.0, 0.5)
    """

    obtained_by: ClassVar[str] = f"csulora.Policy.load(NAME or FILE); {POLICY_CHOICES}"

    aligned: float = 0.0
    partial: float = 1.0
    off: float = 1.0
    rank: Rank = "keep"
    keep_uncovered: tuple[str, ...] = ()
    drop_uncovered: tuple[str, ...] = ()
    max_undo: float | None = None
    overrides: tuple[Override, ...] = ()
    reference_energy: float | None = None
    filtered: bool = False
    subspace_sha256: str | None = None
    max_total_undo: float | None = None
    min_annihilation_ratio: float | None = None
    strengths: tuple[tuple[str, float], ...] = ()
    provenance: PolicyProvenance = field(default_factory=PolicyProvenance, compare=False)

    def __post_init__(self) -> None:
        """Check every field."""
        for name in PENALTIES:
            check_penalty(name, getattr(self, name))
        is_count = isinstance(self.rank, int) and not isinstance(self.rank, bool) and 1 <= self.rank <= LARGEST
        if not is_count and self.rank not in ("keep", "exact"):
            raise InputError(f"policy rank is {self.rank!r}; it must be keep, exact or a positive whole number")
        for name in _UNCOVERED:
            globs = getattr(self, name)
            if not isinstance(globs, tuple) or not all(isinstance(glob, str) and glob for glob in globs):
                raise InputError(f"policy {name} is {globs!r}; it must be a list of globs")
            if len(globs) > _MOST_GLOBS:
                raise InputError(f"policy {name} has {len(globs)} globs; at most {_MOST_GLOBS} may be given")
        for name in LIMITS:
            limit = getattr(self, name)
            if limit is not None:
                check_number(name, limit)
                if not math.isfinite(limit):
                    raise InputError(f"policy {name} is {limit}; it must be a finite number")
        if self.reference_energy is not None:
            check_number("reference_energy", self.reference_energy)
            if not 0 < self.reference_energy <= 1:
                raise InputError(f"policy reference_energy is {self.reference_energy}; it must lie in (0, 1]")
        if not isinstance(self.filtered, bool):
            raise InputError(f"policy filtered is {self.filtered!r}; it must be true or false")
        self._index  # noqa: B018 - it raises where there are too many overrides
        if self.subspace_sha256 is not None and not _is_sha256(self.subspace_sha256):
            raise InputError(f"policy subspace_sha256 is {self.subspace_sha256!r}; it must be 64 hexadecimal digits")
        self._check_strengths()

    def _check_strengths(self) -> None:
        pairs = self.strengths
        if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise InputError("policy strengths: must be a tuple of pairs, of an adapter's sha256 and a number")
        for adapter, strength in self.strengths:
            if not _is_sha256(adapter):
                raise InputError(f"policy strengths: {adapter!r} is no adapter's sha256, of 64 hexadecimal digits")
            check_number(f"strengths: that of {adapter}", strength)
            if not 0 <= strength < math.inf:
                raise InputError(f"policy strengths: that of {adapter} is {strength}; it must be a number from 0 on")
        if len(dict(self.strengths)) < len(self.strengths):
            raise InputError("policy strengths: an adapter has two; give each adapter one")
        if self.strengths:
            self.check_reinforcing()

    @classmethod
    def csulora(cls, penalty: float = 1.0, **rest: Any) -> Self:
        """Keep what is aligned, attenuate the rest: the paper's policy."""
        return cls(0.0, penalty, penalty, **rest)

    @classmethod
    def protect(cls, penalty: float = 1.0, **rest: Any) -> Self:
        """Keep updates out of the subspace: attenuate what is inside it on either side."""
        return cls(penalty, penalty, 0.0, **rest)

    @classmethod
    def project(cls, **rest: Any) -> Self:
        """Keep the aligned component alone: the hard projection."""
        return cls(0.0, math.inf, math.inf, **rest)

    @classmethod
    def none(cls, **rest: Any) -> Self:
        """Keep everything: X = dW."""
        return cls(0.0, 0.0, 0.0, **rest)

    def without_limits(self) -> Self:
        """Return the policy that refuses no adapter for what it undoes or annihilates.

        >>> Policy.none(max_undo=0.5).without_limits() == Policy.none()
        True
        """
        return replace(self, max_undo=None, max_total_undo=None, min_annihilation_ratio=None)

    def strengthened(self, strength: float) -> Self:
        """Return the policy that reinforces ``strength`` times as much; what it keeps of an update stays as it is.

        Raises:
            InputError: it reinforces nothing.

        >>> from csulora.policy.overrides import Directions
        >>> carried = Policy(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (2.0,))),))
        >>> carried.strengthened(0.5).overrides[0].directions.reinforced
        (1.0,)
        """
        self.check_reinforcing()
        return replace(self, overrides=tuple(override.strengthened(strength) for override in self.overrides))

    def check_reinforcing(self) -> None:
        """Raise `InputError` if the policy reinforces nothing."""
        if not any(override.directions and any(override.directions.reinforced) for override in self.overrides):
            raise InputError(
                "the policy reinforces nothing, so it has no strength; fit one for adapters to come, to several "
                "adapters or with --for-others (csulora tune)"
            )

    def strength_of(self, adapter_sha256: str) -> float | None:
        """Return an adapter's strength; None if it has none of its own."""
        return dict(self.strengths).get(adapter_sha256)

    def with_strength(self, adapter_sha256: str, strength: float | None) -> Self:
        """Return the policy with this strength for an adapter, or without one; others keep theirs.

        Raises:
            InputError: a value is out of range, or the policy reinforces nothing.

        >>> from csulora.policy.overrides import Directions
        >>> carried = Policy(overrides=(Override("*", directions=Directions((0.5,), (0.5,), (2.0,))),))
        >>> carried.with_strength("0" * 64, 1.5).strengths[0][1], carried.with_strength("0" * 64, None).strengths
        (1.5, ())
        """
        strengths = dict(self.strengths) | {adapter_sha256: strength}
        return replace(
            self, strengths=tuple(sorted((key, each) for key, each in strengths.items() if each is not None))
        )

    def fate_of(self, module: str) -> Fate:
        """Return what happens to a module that the subspace file does not cover, by its name in the adapter.

        >>> Policy.none(keep_uncovered=("vision_tower.*",)).fate_of("model.vision_tower.layers.0.mlp.fc1")
        'keep'
        """
        if any(matches(module, glob) for glob in self.drop_uncovered):
            return "drop"
        return "keep" if any(matches(module, glob) for glob in self.keep_uncovered) else "refuse"

    def override_of(self, module: str) -> Override | None:
        """Return the override that counts for a module, by its name in the subspace file."""
        at = self._index.find(module)
        return None if at is None else self.overrides[at]

    def check_overrides(self, modules: Collection[str]) -> None:
        """Raise `InputError` if an override counts for none of a subspace file's modules."""
        counting = {self._index.find(module) for module in modules}
        for at, override in enumerate(self.overrides):
            if at not in counting:
                is_late = any(matches(module, override.match) for module in modules)
                reason = (
                    "all that it matches is matched by one before it"
                    if is_late
                    else f"matches no module of the subspace file, which holds {min(modules)}, for instance"
                )
                raise InputError(f"policy override {override.match!r}: {reason}")

    @cached_property
    def _index(self) -> OverrideIndex:
        return OverrideIndex([override.match for override in self.overrides])

    def check_filtered(self, modules: Iterable[str]) -> None:
        """Raise `InputError` if the policy is filtered, and one of the modules that have input filters cannot be."""
        for module in modules if self.filtered else ():
            override = self.override_of(module)
            if override is None or override.directions is None:
                raise InputError(f"policy filtered: only gains of directions can be, and {module} has none")

    def to_dict(self) -> dict[str, Any]:
        """Return what decides about corrections, as in the TOML file.

        Fields that are None are left out, and so are ``filtered`` if it is false, and the provenance.
        """
        document = {key: value for key, value in asdict(self).items() if value is not None and value is not False}
        del document["provenance"]
        for name in _UNCOVERED:
            globs = document.pop(name)
            document |= {name: list(globs)} if globs else {}
        strengths = dict(document.pop("strengths"))
        document |= {"strengths": strengths} if strengths else {}
        document["overrides"] = [toml.override_document(override) for override in self.overrides]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """Read a policy from its TOML document.

        Raises:
            InputError: an unknown field, or a value out of range.
        """
        unknown = set(document) - {each.name for each in fields(cls)}
        if unknown:
            known = ", ".join(each.name for each in fields(cls))
            raise InputError(f"policy: unknown field {min(unknown)!r}; the fields are {known}")
        values = dict(document)
        overrides = values.pop("overrides", [])
        values["provenance"] = PolicyProvenance.from_dict(values.get("provenance", {}))
        if not isinstance(overrides, list):
            raise InputError("policy: overrides must be a list of tables")
        strengths = values.pop("strengths", {})
        if not isinstance(strengths, dict):
            raise InputError("policy: strengths must be a table of numbers by adapters' sha256")
        if not strengths and "strengths" in document:
            raise InputError("policy: strengths is empty; remove it to let all adapters through, or name one there")
        values["strengths"] = tuple(sorted(strengths.items()))
        for name in _UNCOVERED:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values, overrides=tuple(toml.read_override(entry) for entry in overrides))

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Return the policy of a preset's name, or read it from a TOML file.

        A file that is called as a preset is has to be named with its folder: ``./none``.

        Raises:
            InputError: there is no such preset or file, or the file is malformed.

        >>> Policy.load("project").off
        inf
        """
        if source in PRESETS:
            preset: Self = getattr(cls, str(source))()
            return preset
        path = Path(source)
        return cls.parse(toml.data_of(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Read a policy from the bytes of a TOML file.

        Raises:
            InputError: they are malformed; the message names ``path``.
        """
        document = toml.parse(data, path)
        try:
            return cls.from_dict(document)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the policy to a TOML file, with its provenance."""
        document, provenance = self.to_dict(), self.provenance.to_dict()
        overrides = document.pop("overrides")  # which are long, and come last
        toml.write(Path(path), document | ({"provenance": provenance} if provenance else {}) | {"overrides": overrides})


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
