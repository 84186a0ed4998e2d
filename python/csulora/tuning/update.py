"""An adapter's update, split by the core into its four components, each still in factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from csulora.adapters.experts import decoded
from csulora.adapters.lora import Adapter
from csulora.correction.correct import cover
from csulora.correction.report import COMPONENTS
from csulora.errors import InputError, RefusedError
from csulora.native import _core
from csulora.policy.policy import Policy
from csulora.subspace.expert_layout import ExpertLayout
from csulora.subspace.input_filter import Factors, InputFilter
from csulora.subspace.subspace import Subspace
from csulora.tuning.stack import Stack, Triple, stacks


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one adapter in the coordinates of one subspace file.

    Attributes:
        name: the adapter's.
        targets: module in the model -> module in the subspace file, in the order of the tensors below.
        stacks: the factors of the update itself and the displacement's leading singular triples.
        components: factors of the four components side by side: b (out, 4 r) and a (4 r, in), float32.
        energies: (modules, 4) float32, relative energies of aligned, left, right, off; rows sum to 1.
        norms2: (modules) float32, |dW|^2.
        input_filters: per module, the inputs on which a filtered policy acts; none for one that acts on all.
        penalty_scale: by which a policy multiplies the penalties of its directions, see `with_penalty_scale`.
        untouched: factors of the modules that the subspace file does not cover, if they are to be kept.
    """

    name: str
    targets: dict[str, str]
    stacks: Sequence[Stack]
    components: dict[str, Factors]
    energies: Tensor
    norms2: Tensor
    input_filters: dict[str, InputFilter] = field(default_factory=dict)
    penalty_scale: float = 1.0
    untouched: dict[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, subspace: Subspace, policy: Policy | None = None) -> Update:
        """Split an adapter's update; ``policy`` says what happens to modules that the subspace file does not cover.

        Raises:
            RefusedError, InputError: the adapter does not fit the subspace file, or has an update that is not of a
            linear layer.

        >>> update = Update.of(csulora.load_adapter(adapter), csulora.Subspace.open(subspace))
        >>> update.energies.shape == (len(update.targets), 4)
        True
        """
        check_linear(adapter, "tune")
        policy = policy or Policy.none()
        adapter = decoded(adapter, subspace.provenance.experts)
        targets = cover(adapter, subspace, policy)
        if not any(subspace[target].rank for target in targets.values()):
            raise InputError(
                f"{adapter.path}: the subspace file has no direction of the alignment in any of the adapter's modules"
            )
        subspaces = subspace.to_core(targets.values())
        components: dict[str, list[Factors]] = {name: [] for name in targets}
        for component in range(len(COMPONENTS)):
            gains = _core.Components(*(float(component == other) for other in range(len(COMPONENTS))))
            results = _correct(adapter, targets, subspaces, gains)
            for name, result in zip(targets, results, strict=True):
                components[name].append((result.factors.b, result.factors.a))
        energies = torch.tensor(
            [[getattr(result.energies, component) for component in COMPONENTS] for result in results]
        )
        norms2 = torch.tensor([result.norm**2 for result in results])
        if not float(norms2.sum()) > 0:
            raise InputError(f"{adapter.path}: the adapter changes nothing; there is nothing to tune")
        factors = factors_of(adapter)
        triples = {
            name: (subspace[target].u.float(), subspace[target].s, subspace[target].v.float())
            for name, target in targets.items()
        }
        input_filters = {
            name: input_filter for name, target in targets.items() if (input_filter := subspace.input_filter(target))
        }
        is_filtered = {name: name in input_filters for name in targets}
        return cls(
            adapter.path.resolve().name,
            targets,
            stacks({name: factors[name] for name in targets}, triples, is_filtered),
            {
                name: (torch.cat([b for b, _ in found], 1), torch.cat([a for _, a in found]))
                for name, found in components.items()
            },
            energies,
            norms2,
            input_filters,
            untouched={
                name: each for name, each in factors.items() if name not in targets and policy.fate_of(name) == "keep"
            },
        )

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Per module, the update's factors b (out, r) and a (r, in), float32."""
        found = {name: each for stack in self.stacks for name, each in stack.factors.items()}
        return {name: found[name] for name in self.targets}

    @cached_property
    def triples(self) -> dict[str, Triple]:
        """Per module, the displacement's leading singular triples u (out, k), s (k) and v (in, k), float32."""
        found = {name: each for stack in self.stacks for name, each in stack.triples.items()}
        return {name: found[name] for name in self.targets}

    def mixed(self, gains: Tensor) -> dict[str, Factors]:
        """Return the components times gains (modules, 4), added up: per module b (out, 4 r) and a (4 r, in).

        >>> update = Update.of(csulora.load_adapter(adapter), csulora.Subspace.open(subspace))
        >>> kept = update.mixed(torch.ones(len(update.targets), 4))
        >>> round(float(update.relative_change2(kept)), 4)
        0.0
        """
        return {
            name: (b * gain.to(b.device).repeat_interleave(a.shape[0] // len(COMPONENTS)), a)
            for (name, (b, a)), gain in zip(self.components.items(), gains, strict=True)
        }

    def along(self, gains: Tensor) -> dict[str, Factors]:
        """Return the update times gains along its left and right leading singular directions, and what is reinforced.

        ``gains``: (modules, 2, directions), or (modules, 3, directions) with multiples of the singular triples.
        The result is per module b (out, r) and a (r, in) float32, with one more in r for each triple that is added.
        """
        found: dict[str, Factors] = {}
        for stack in self.stacks:
            found |= stack.along(gains[list(stack.rows)])
        return {name: found[name] for name in self.targets}

    def filtered(self, target: Mapping[str, Factors]) -> dict[str, Factors]:
        """Return what a filtered policy makes of the update, where ``target`` are the factors of X' in every module."""
        return {
            name: self.input_filters[name].applied(self.factors[name], each) if name in self.input_filters else each
            for name, each in target.items()
        }

    def energy_along(self, directions: int) -> float:
        """Return the relative energy e along so many leading directions of modules, see `Policy.reference_energy`."""
        everything = _core.Penalties(0, 0, 0)
        tasks = [
            _core.CorrectionTask(_core.LoraFactors(*self.factors[name]), _core.Subspace(*triple), everything, name)
            for name, triple in self.triples.items()
        ]
        energy = _core.energy_along(tasks, directions)
        return min(1.0, energy)  # which rounding exceeds where the directions are the update's own

    def with_penalty_scale(self, directions: int, reference_energy: float) -> Update:
        """Return the same with the penalty scale that `Policy.reference_energy` gives it."""
        return replace(self, penalty_scale=_core.penalty_scale(self.energy_along(directions), reference_energy))

    def relative_change2(self, corrected: Mapping[str, Factors]) -> Tensor:
        """Return |X - dW|^2 / |dW|^2 over all modules, a float32 scalar, for corrected factors of each."""
        distances2 = [stack.distance2(corrected).to(self.norms2.device) for stack in self.stacks]
        return (torch.stack(distances2).sum() / self.norms2.sum()).float()

    def to(self, device: torch.device, device_of: Callable[[str], torch.device]) -> Update:
        """Return the same with every module's tensors where ``device_of`` puts the module, and all else on ``device``.

        >>> update = Update.of(csulora.load_adapter(adapter), csulora.Subspace.open(subspace))
        >>> update.to(torch.device("cpu"), lambda module: torch.device("cpu")).energies.device
        device(type='cpu')
        """

        def moved(factors: dict[str, Factors]) -> dict[str, Factors]:
            return {name: (b.to(device_of(name)), a.to(device_of(name))) for name, (b, a) in factors.items()}

        return replace(
            self,
            stacks=[each for stack in self.stacks for each in stack.to_devices(device_of)],
            components=moved(self.components),
            energies=self.energies.to(device),
            norms2=self.norms2.to(device),
            input_filters={name: each.to(device_of(name)) for name, each in self.input_filters.items()},
            untouched=moved(self.untouched),
        )


def _correct(
    adapter: Adapter, targets: Mapping[str, str], subspaces: list[_core.Subspace], gains: _core.Components
) -> list[_core.Correction]:
    modules = [adapter.modules[name] for name in targets]
    return _core.correct(
        [
            _core.CorrectionTask(
                _core.LoraFactors(module.b.float(), module.a.float(), module.scale), subspace, gains, name
            )
            for name, module, subspace in zip(targets, modules, subspaces, strict=True)
        ],
        _core.CorrectionOptions(_core.RankRule.keep),
    )


def check_linear(adapter: Adapter, command: str) -> None:
    """Raise `RefusedError` if an adapter updates an embedding, which no command can add to a model that it runs."""
    for name, module in adapter.modules.items():
        if module.is_embedding:
            raise RefusedError(
                f"{adapter.path}: {name} is an embedding; {command} runs updates of linear layers alone, so correct "
                "the adapter by a preset and measure it in PEFT"
            )


def factors_of(adapter: Adapter, layout: ExpertLayout | None = None) -> dict[str, Factors]:
    """Return an adapter's factors b (out, r) and a (r, in) as they are, float32, its scale in b.

    Fused experts are taken apart as the model's ``layout`` says.

    Raises:
        RefusedError: the adapter's experts are fused, and there is no ``layout``.
        InputError: the factors do not fit the model's experts.

    >>> b, a = factors_of(csulora.load_adapter(adapter))["model.layers.0.self_attn.q_proj"]
    >>> b.shape[1] == a.shape[0]
    True
    """
    return {
        name: (module.b.float() * module.scale, module.a.float())
        for name, module in decoded(adapter, layout).modules.items()
        if not module.is_embedding
    }
