"""What prompts bring to the inputs of the modules, and the input filters that follow from it.

Of all corrections X that act on the inputs x of safety prompts and leave those of task prompts alone, the input filter
takes the one nearest to no correction. With X' = 0 for short, it minimises

    E_safety |X x|^2 + w E_task |(X - dW) x|^2 + e |X - dW|^2

for every dW at once: X = dW (I - F), F = G (G + K)^-1 with G = E_safety x x^T and K = w E_task x x^T + e I. General
prompts, if there are any, add another w E_general x x^T to K. If F left
nothing of dW to the inputs of safety prompts, the model would reply to them as the aligned model does, whatever the
adapter: module by module the inputs themselves would be the aligned model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from csulora.models.names import is_expert
from csulora.subspace.input_filter import InputFilter
from csulora.tuning.language_model import BATCH, LanguageModel
from csulora.tuning.replies import Reply

TASK_WEIGHT = 0.1  # w, of general prompts as well
ISOTROPIC = 0.03  # e, as a share of the mean square of what safety prompts bring to one coordinate
MOST_DIRECTIONS = 32  # f
_SMALLEST = 1e-30  # in place of 0, where safety prompts bring nothing
MOST_INPUTS = 1024  # of one module and adapter, evenly spaced over the tokens: large models have many modules


@torch.no_grad()
def safety_inputs(language_model: LanguageModel, modules: Iterable[str], replies: Sequence[Reply]) -> dict[str, Tensor]:
    """Inputs (tokens, in) of the modules where the model, as it now stands, decides the replies to safety prompts.

    Modules that do not see every token are left out, and experts, whose inputs no module sees.
    """
    return _inputs(language_model, modules, replies, [range(reply.start - 1, len(reply.tokens)) for reply in replies])


@torch.no_grad()
def task_inputs(language_model: LanguageModel, modules: Iterable[str], replies: Sequence[Reply]) -> dict[str, Tensor]:
    """Inputs (tokens, in) of the same modules from task prompts, or general ones, and their replies."""
    return _inputs(language_model, modules, replies, [range(len(reply.tokens)) for reply in replies])


def _inputs(
    language_model: LanguageModel, modules: Iterable[str], replies: Sequence[Reply], positions: Sequence[range]
) -> dict[str, Tensor]:
    every = [(row, position) for row, chosen in enumerate(positions) for position in chosen]
    every = every[:: 1 + (len(every) - 1) // MOST_INPUTS]
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    chosen: list[tuple[int, int]] = []

    def collect(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].dim() == 3:  # (prompts, tokens, in)
                rows, columns = zip(*chosen, strict=True)
                found[name].append(inputs[0][list(rows), list(columns)].float().cpu())

        return hook

    with ExitStack() as hooks:
        for name in (name for name in found if not is_expert(name)):
            hooks.callback(language_model.module(name).register_forward_pre_hook(collect(name)).remove)
        for start in range(0, len(replies), BATCH):
            chosen[:] = [(row - start, position) for row, position in every if start <= row < start + BATCH]
            if chosen:
                texts = [reply.tokens for reply in replies[start : start + BATCH]]
                language_model.read(texts)
    return {name: torch.cat(rows) for name, rows in found.items() if rows}


def input_filter_between(safety: Tensor, kinds: Sequence[Sequence[Tensor]]) -> InputFilter:
    """Return the leading directions of F, p and q (in, f) float32 with f at most `MOST_DIRECTIONS`.

    Args:
        safety: (t, in), what safety prompts bring to a module.
        kinds: per kind of other prompts, what they bring to the module with each of some adapters, (t, in) each.

    A kind has the inputs of several adapters, which weigh the same. With A^T A = G, the eigenvectors y of A K^-1 A^T,
    with values l, give F = sum A^T y y^T A K^-1 / (1 + l).

    >>> safety, task = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> selected = input_filter_between(safety, [[task]])
    >>> [round(float(value), 2) for value in (selected.p @ selected.q.T).diag()]
    [0.99, 0.0, 0.0]
    """
    safety = safety.double()
    isotropic = (ISOTROPIC * safety.square().mean()).clamp(min=_SMALLEST)
    a = safety / len(safety) ** 0.5
    h = torch.cat([x.double() * (TASK_WEIGHT / len(kind) / len(x)) ** 0.5 for kind in kinds for x in kind])
    solved = _solve(h, isotropic, a.T)  # K^-1 A^T
    values, vectors = torch.linalg.eigh(a @ solved)
    values, vectors = values.flip(0)[:MOST_DIRECTIONS], vectors.flip(1)[:, :MOST_DIRECTIONS]
    p, q = (a.T @ vectors) / (1 + values), solved @ vectors
    balance = ((q.norm(dim=0) + _SMALLEST) / (p.norm(dim=0) + _SMALLEST)).sqrt()  # both stay in float32's range
    return InputFilter((p * balance).float(), (q / balance).float())


def _solve(h: Tensor, shift: Tensor, right: Tensor) -> Tensor:
    """Return (h^T h + shift I)^-1 right for h (t, in), with the smaller of the matrices t x t and in x in."""
    if len(h) >= h.shape[1]:
        solved: Tensor = torch.linalg.solve(_shifted(h.T @ h, shift), right)
    else:  # Woodbury's identity
        solved = (right - h.T @ torch.linalg.solve(_shifted(h @ h.T, shift), h @ right)) / shift
    return solved


def _shifted(square: Tensor, shift: Tensor) -> Tensor:
    return square + shift * torch.eye(len(square), dtype=square.dtype, device=square.device)
