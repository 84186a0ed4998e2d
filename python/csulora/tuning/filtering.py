"""The input filters of a policy for adapters to come, from the prompts of the adapters it is fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csulora.subspace.input_filter import InputFilter
from csulora.tuning.examples import Examples
from csulora.tuning.inputs import input_filter_between, safety_inputs, task_inputs
from csulora.tuning.replies import Reply
from csulora.tuning.splits import Split
from csulora.tuning.targets import Targets


def input_filters(
    examples: Examples, targets: Targets, numbers: Sequence[int], splits: Sequence[Split]
) -> dict[str, InputFilter]:
    """Return module in the subspace file -> the inputs that only safety prompts bring.

    All prompts are those of ``splits``. Task prompts of the adapters ``numbers`` do not bring them. Nor do general
    prompts, with these adapters or with none.
    """
    names, device = targets.updated(numbers), examples.language_model.device
    fitted = {number: examples.part(number, *splits) for number in numbers}
    safety = safety_inputs(examples.language_model, names.values(), fitted[numbers[0]].safety)
    kinds = [[_own_inputs(examples, targets, number, each.task) for number, each in fitted.items()]]
    if examples.request.general:
        kinds.append(
            [
                *(_own_inputs(examples, targets, number, each.general) for number, each in fitted.items()),
                _unadapted_inputs(examples, names, splits),
            ]
        )
    return {
        target: input_filter_between(
            safety[name].to(device),
            [[inputs[target].to(device) for inputs in kind if target in inputs] for kind in kinds],
        ).to(torch.device("cpu"))
        for target, name in names.items()
        if name in safety
    }


def _own_inputs(examples: Examples, targets: Targets, number: int, replies: Sequence[Reply]) -> dict[str, Tensor]:
    """Module in the subspace file -> its inputs from some of an adapter's replies."""
    names = targets.each[number]
    with examples.adapted(examples.request.adapters[number]):
        inputs = task_inputs(examples.language_model, names, replies)
    return {names[name]: each for name, each in inputs.items()}


def _unadapted_inputs(examples: Examples, names: Mapping[str, str], splits: Sequence[Split]) -> dict[str, Tensor]:
    """The same from general prompts, without an adapter."""
    inputs = task_inputs(examples.language_model, names.values(), examples.general_part(*splits))
    return {target: inputs[name] for target, name in names.items() if name in inputs}
