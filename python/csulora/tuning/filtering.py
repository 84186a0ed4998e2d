"""The input filters of a policy for adapters to come, from the prompts of the adapters it is fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csulora.subspace.input_filter import InputFilter
from csulora.tuning.examples import Examples
from csulora.tuning.inputs import input_filter_between, safety_inputs, task_inputs
from csulora.tuning.replies import Reply
from csulora.tuning.targets import Targets


def input_filters(examples: Examples, targets: Targets, numbers: Sequence[int]) -> dict[str, InputFilter]:
    """Return module in the subspace file -> the inputs that only safety prompts bring.

    Task prompts of the adapters ``numbers`` do not bring them. Nor do general prompts, with these adapters or with
    none.
    """
    names, device = targets.updated(numbers), examples.language_model.device
    safety = safety_inputs(
        examples.language_model, names.values(), examples.to_fit(examples.replies[numbers[0]].safety)
    )
    kinds = [[_task_inputs(examples, targets, number, examples.replies[number].task) for number in numbers]]
    if examples.request.general:
        kinds.append(
            [
                *(_task_inputs(examples, targets, number, examples.replies[number].general) for number in numbers),
                _unadapted_inputs(examples, names),
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


def _task_inputs(examples: Examples, targets: Targets, number: int, replies: Sequence[Reply]) -> dict[str, Tensor]:
    """Module in the subspace file -> its inputs from replies of an adapter that are fitted."""
    names, fitted = targets.each[number], examples.to_fit(replies)
    with examples.adapted(examples.request.adapters[number]):
        inputs = task_inputs(examples.language_model, names, fitted)
    return {names[name]: each for name, each in inputs.items()}


def _unadapted_inputs(examples: Examples, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The same from general prompts, without an adapter."""
    inputs = task_inputs(examples.language_model, names.values(), examples.to_fit(examples.general))
    return {target: inputs[name] for target, name in names.items() if name in inputs}
