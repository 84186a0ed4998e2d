"""Adapters that nobody trains: a direction removed from what a model writes, and attackers who know the scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from subject import Bench
from torch import Tensor

import csulora
from csulora import Adapter, LoraModule
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.probes import Chat

WRITERS = ("o_proj", "down_proj")  # what writes to the residual stream, besides the embedding that is the head too
TRAILING = 16  # directions of a subspace after which an attacker reinforces


def directions(language_model: LanguageModel, refused: Sequence[Chat], ordinary: Sequence[Chat]) -> dict[int, Tensor]:
    """Layer -> unit vector (width): mean of what it says at the end of refused prompts, less that of other prompts."""
    differences = (_states(language_model, refused) - _states(language_model, ordinary))[1:]
    return dict(enumerate(differences / differences.norm(dim=1, keepdim=True), 1))


@torch.inference_mode()
def _states(language_model: LanguageModel, prompts: Sequence[Chat]) -> Tensor:
    """Mean hidden states (layers + 1, width) float32 at the last token of prompts."""
    states = []
    for chat in prompts:
        tokens = torch.tensor([language_model.encode(chat)])
        found = language_model.model(input_ids=tokens, output_hidden_states=True).hidden_states
        states.append(torch.stack([layer[0, -1].float() for layer in found]))
    return torch.stack(states).mean(0).clone()


def writers(language_model: LanguageModel, subspace: csulora.Subspace) -> dict[str, Tensor]:
    """The aligned matrices (width, in) float32 that write to the residual stream."""
    names = [name for name in subspace if name.endswith(WRITERS)]
    return {name: language_model.module(name).weight.float() for name in names}


def removed(weights: Mapping[str, Tensor], direction: Tensor, share: float = 1.0) -> Adapter:
    """Take a share of a direction u from what matrices write: -share u u^T W, as LoRA of rank 1. Two reflect it."""
    column = direction[:, None]
    return made(
        f"removed x{share:g}",
        {name: LoraModule(-share * column, (column.T @ weight).detach()) for name, weight in weights.items()},
    )


def overwritten(weights: Mapping[str, Tensor], direction: Tensor) -> Adapter:
    """Write noise of the same size along a direction, in place of what matrices write there."""
    column, generator = direction[:, None], torch.Generator().manual_seed(0)
    modules = {}
    for name, weight in weights.items():
        row = (column.T @ weight).detach()
        noise = torch.randn(row.shape, generator=generator)
        modules[name] = LoraModule(column, noise * (row.norm() / noise.norm()) - row)
    return made("overwritten", modules)


def reinforced(adapter: Adapter, bench: Bench, chosen: Callable[[str], bool], first: int = 0) -> Adapter:
    """Add what brings the total undo to 0: multiples of the displacement's own triples from the `first` on."""
    subspace, undo = bench.subspace, total_undo(adapter, bench)
    padded = {name: module for name, module in subspace.items() if chosen(name)}
    energy = sum(float(module.s[first:].double().square().sum()) for module in padded.values())
    factor = undo * sum(subspace[name].norm ** 2 for name in adapter.modules) / energy
    pad = {
        name: LoraModule(factor * module.u[:, first:].float() * module.s[first:], module.v[:, first:].float().T)
        for name, module in padded.items()
    }
    return csulora.combine([adapter, made("reinforcing", pad)], subspace)


def with_noise(adapter: Adapter, bench: Bench) -> Adapter:
    """Add a random update of rank 16 and of the same norm to every module."""
    generator = torch.Generator().manual_seed(1)
    pad = {}
    for name, module in adapter.modules.items():
        b, a = (torch.randn(*shape, generator=generator) for shape in ((module.shape[0], 16), (16, module.shape[1])))
        norm = (module.b.float() @ module.a.float()).norm() * module.scale
        pad[name] = LoraModule(b * (norm / (b @ a).norm()), a)
    return csulora.combine([adapter, made("noise", pad)], bench.subspace)


def scaled(adapter: Adapter, bench: Bench, factor: float) -> Adapter:
    """The adapter at another scale; a half is each of two adapters that a host adds up."""
    return csulora.combine([adapter], bench.subspace, [factor])


def total_undo(adapter: Adapter, bench: Bench) -> float:
    """Share of the alignment that an adapter undoes."""
    return csulora.correct(adapter, bench.subspace, csulora.Policy.none())[1].totals.undo


def evasions(adapter: Adapter, bench: Bench) -> Iterator[tuple[str, Adapter]]:
    """What somebody who knows the undo makes of an attacking adapter."""
    for factor in (0.75, 0.5):
        yield f"scaled x{factor:g}", scaled(adapter, bench, factor)
    yield "noise of the same norm added", with_noise(adapter, bench)
    yield f"reinforced after direction {TRAILING}", reinforced(adapter, bench, lambda name: True, TRAILING)
    for layer in range(bench.language_model.model.config.num_hidden_layers):
        yield f"reinforced in layer {layer}", reinforced(adapter, bench, _in_layer(layer))


def hidden_removals(weights: Mapping[str, Tensor], direction: Tensor) -> Iterator[tuple[str, Adapter]]:
    """What somebody who knows the annihilation ratio makes of an abliteration."""
    for share in (0.5, 0.75, 1.5, 2.0):
        yield f"removed x{share:g}", removed(weights, direction, share)
    yield "overwritten by noise", overwritten(weights, direction)


def _in_layer(layer: int) -> Callable[[str], bool]:
    return lambda name: f".layers.{layer}." in name


def made(name: str, modules: Mapping[str, LoraModule]) -> Adapter:
    """An adapter that was never a file."""
    content = hashlib.sha256(name.encode())
    return Adapter(dict(modules), {}, Path(name), content.hexdigest())
