"""Adapters corrected where PEFT or transformers load them.

    model, report = csulora.hooks.peft.load(model, "my-adapter", "subspace.safetensors", "protect")  # one adapter
    with csulora.hooks.peft.guard("subspace.safetensors", "protect"):  # whatever loads an adapter here
        model = PeftModel.from_pretrained(model, "my-adapter")

The host never sees the adapter it was asked to load: it is given a private directory that holds the corrected
one, made from a single reading of the original's bytes.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora import model as xlora
from peft.utils import save_and_load as peft_save_and_load
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.peft_utils import find_adapter_config_file

from csulora.adapters.lora import Adapter
from csulora.correction.report import Report
from csulora.errors import HostLimitError, InputError, UncoveredRouteError
from csulora.hooks.peft.arrival import check_arrived
from csulora.hooks.peft.base_models import BaseModels
from csulora.hooks.peft.hotswap import check_hotswap, hotswap_replacements
from csulora.hooks.peft.loading import (
    by_name,
    check_name_is_free,
    check_nothing_overrides,
    corrected_for,
    host_loads,
    loads_corrected,
    local_directory,
    of_model,
    taken_from_hub,
    without_initialising,
)
from csulora.hooks.peft.together import check_together_host, together_replacements
from csulora.hooks.signature import check_signature
from csulora.policy.policy import Policy
from csulora.serving.gate import Gate
from csulora.subspace.subspace import Subspace

SubspaceSource = Subspace | str | Path
Rules = Policy | str | Path | None

_one_guard = threading.Lock()


def load(
    model: Any,
    path: str | Path,
    subspace: SubspaceSource,
    policy: Rules = None,
    adapter_name: str = "default",
    *,
    require_signature: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Report]:
    """Load an adapter corrected.

    Args:
        model: a ``PeftModel``, which gets one more adapter, or the model to wrap.
        path: PEFT adapter directory or hub id.
        subspace: subspace file of the model.
        policy: what to keep and what to refuse: a preset's name, a TOML file or a `Policy`; there is no default.
        adapter_name: name of the adapter in the model.
        require_signature: who must have signed the adapter, see `csulora.serving.trust.Trust.open`; None: nobody.
        options: further arguments of ``PeftModel.from_pretrained`` or ``load_adapter``, such as ``torch_device``; none
            that change the configuration or the names of modules.

    Returns:
        The ``PeftModel``, and the report.

    Raises:
        CsuloraError: the adapter is refused or malformed; the model is as it was.

    >>> model = AutoModelForCausalLM.from_pretrained(aligned)
    >>> model, report = csulora.hooks.peft.load(model, adapter, subspace, csulora.Policy.protect(1.0))
    >>> list(model.peft_config)
    ['default']
    """
    check_nothing_overrides(options, path)
    gate = Gate.open(subspace, policy, route="peft", require_signature=require_signature)
    location = local_directory(path, options)
    with gate.decision(location) as decision:
        corrected, report = corrected_for(model, decision, decision.read_directory(location))
        with (
            host_loads(decision, corrected) as directory,
            without_initialising(corrected, model, adapter_name, options) as options,
        ):
            if isinstance(model, (PeftModel, PeftMixedModel)):
                check_name_is_free(model.peft_config, adapter_name)
                model.load_adapter(str(directory), adapter_name, **options)
                check_arrived(model, adapter_name, corrected, lambda: model.delete_adapter(adapter_name))
                return model, report
            wrapped = PeftModel.from_pretrained(model, directory, adapter_name, **options)
            check_arrived(wrapped, adapter_name, corrected, wrapped.unload)
            return wrapped, report


def correct_model(
    model: Any, adapter_name: str, new_adapter_name: str, subspace: SubspaceSource, policy: Rules = None
) -> Report:
    """Correct an adapter that a ``PeftModel`` holds: a new adapter is added, and the old one left as it is.

    Args:
        model: the ``PeftModel``.
        adapter_name: the adapter to correct.
        new_adapter_name: name of the corrected one; it is not activated.
        subspace: subspace file of the model.
        policy: what to keep and what to refuse: a preset's name, a TOML file or a `Policy`; there is no default.

    Raises:
        InputError: there is no such adapter, or the new name is taken.
        CsuloraError: the adapter is refused or malformed; the model is as it was.

    >>> model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), adapter)
    >>> report = csulora.hooks.peft.correct_model(model, "default", "safe", subspace, csulora.Policy.protect(1.0))
    >>> list(model.peft_config)
    ['default', 'safe']
    """
    if adapter_name not in model.peft_config:
        raise InputError(f"the model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}")
    check_name_is_free(model.peft_config, new_adapter_name)
    gate = Gate.open(subspace, policy, route="peft")
    with gate.decision(adapter_name) as decision:
        corrected, report = decision.correct(of_model(model, adapter_name))
        with host_loads(decision, corrected) as directory:
            model.load_adapter(directory, new_adapter_name)
        check_arrived(model, new_adapter_name, corrected, lambda: model.delete_adapter(new_adapter_name))
    return report


@contextmanager
def guard(
    subspace: SubspaceSource,
    policy: Rules = None,
    decisions: str | Path | None = None,
    base_models: Sequence[str | Path] = (),
    require_signature: str | Path | None = None,
) -> Iterator[Gate]:
    """Correct or refuse every adapter that is loaded within the block, in all threads of the process.

    Covers ``PeftModel.from_pretrained`` and ``load_adapter`` (also of mixed and auto models), PEFT's
    ``hotswap_adapter``, and ``load_adapter`` and ``from_pretrained`` of transformers. What cannot be corrected is
    refused: adapters that are not LoRA, weights or configurations handed over in memory, mappings of module names,
    and PEFT's other readers of adapter files.

    Where several adapters are activated or merged, or made into a weighted one, the policy's ``max_undo`` limits their
    sum, too.

    Where a program names an adapter alone (``AutoPeftModel``, transformers' auto classes, ``pipeline``), the hosts load
    the base model that the adapter names: refused unless it is one of ``base_models``. transformers ignores the
    revision that an adapter names, so there an adapter with a revision is refused.

    Not covered:

    - ``get_peft_model`` and ``add_adapter``, which make a new adapter from a configuration in memory: no weights come
      from outside. Take no configuration from an upload for them.
    - Code that sets parameters by itself.
    - Functions of PEFT, such as ``hotswap_adapter_from_state_dict`` or ``load_peft_weights``, that a program has
      imported by name before the block.
    - Prompts, which PEFT's ``MultitaskPromptTuningConfig`` reads from the file that its
      ``prompt_tuning_init_state_dict_path`` names.

    Args:
        subspace: subspace file of the model.
        policy: what to keep and what to refuse: a preset's name, a TOML file or a `Policy`; there is no default.
        decisions: file to append a JSON line per decision to.
        base_models: base models that adapters may choose, as they name them; ``name@revision`` for one with a revision.
            A slash at the end does not count.
        require_signature: who must have signed adapters, see `csulora.serving.trust.Trust.open`; None: nobody.

    Raises:
        HostError: the installed PEFT or transformers is not one this module knows.
        InputError: another guard is active, or ``base_models`` is no list of names.

    >>> model = AutoModelForCausalLM.from_pretrained(aligned)
    >>> with csulora.hooks.peft.guard(subspace, csulora.Policy.protect(1.0)):
    ...     model = PeftModel.from_pretrained(model, adapter)
    """
    gate = Gate.open(subspace, policy, decisions, route="peft", require_signature=require_signature)
    _check_host()
    if not _one_guard.acquire(blocking=False):
        raise InputError("a guard is active already; guards cannot be nested")
    try:
        with ExitStack() as stack:
            allowed = stack.enter_context(closing(BaseModels(base_models)))
            for owner, name, replacement in chain(_replacements(gate), allowed.replacements()):
                stack.enter_context(patch.object(owner, name, replacement))
            yield gate
    finally:
        _one_guard.release()


def _check_host() -> None:
    check_signature(PeftModel.load_adapter, "self", "model_id", "adapter_name")
    check_signature(PeftModel.from_pretrained, "model", "model_id", "adapter_name", "is_trainable", "config")
    check_signature(PeftMixedModel.from_pretrained, "model", "model_id", "adapter_name", "is_trainable", "config")
    check_signature(peft_save_and_load.load_peft_weights, "model_id", "device", "key_mapping")
    check_hotswap()
    check_together_host()
    check_signature(find_adapter_config_file, "model_id")
    check_signature(PeftConfig.from_pretrained, "pretrained_model_name_or_path", "subfolder")
    check_signature(
        PeftAdapterMixin.load_adapter, "self", "peft_model_id", "adapter_name", "peft_config", "adapter_state_dict"
    )


def _replacements(gate: Gate) -> Iterator[tuple[Any, str, Any]]:
    """Everything the guard puts in the host's place: owner, attribute, replacement."""
    yield PeftModel, "load_adapter", _load_adapter(gate, PeftModel.load_adapter)
    for model in (PeftModel, PeftMixedModel):
        yield model, "from_pretrained", classmethod(_from_pretrained(gate, vars(model)["from_pretrained"].__func__))
    yield PeftAdapterMixin, "load_adapter", _transformers_load_adapter(gate, PeftAdapterMixin.load_adapter)
    reader = peft_save_and_load.load_peft_weights
    yield from hotswap_replacements(gate)
    yield from together_replacements(gate)
    # X-LoRA would put an adapter's configuration into the model before it reads the weights.
    yield xlora, "_load_adapter_into_lora_model", _refusing_x_lora
    # Under all the names that PEFT has for it; reached only by routes that none of the above covers.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and getattr(module, "load_peft_weights", None) is reader:
            yield module, "load_peft_weights", _refusing(reader)


def _loaded(gate: Gate, original: Callable[..., Any], model: Any, name: str, given: dict[str, Any]) -> Any:
    """Let PEFT load the corrected form of the adapter that a call's arguments name."""
    source = given.pop("model_id")
    check_nothing_overrides(given, source)
    location = local_directory(source, given)
    with gate.decision(location) as decision:
        corrected, _ = corrected_for(model, decision, decision.read_directory(location))
        with host_loads(decision, corrected) as directory, without_initialising(corrected, model, name, given) as given:
            loaded = original(model_id=directory, **given)
        if isinstance(loaded, (PeftModel, PeftMixedModel)):
            check_arrived(loaded, name, corrected, loaded.unload)
        else:  # load_adapter, which returns no model
            check_arrived(model, name, corrected, lambda: model.delete_adapter(name))
        return loaded


def _load_adapter(gate: Gate, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(*args: Any, **options: Any) -> Any:
        if loads_corrected.get():
            return original(*args, **options)
        given = by_name(original, *args, **options)
        model, name = given["self"], given["adapter_name"]
        check_name_is_free(model.peft_config, name)
        return _loaded(gate, original, model, name, given)

    return load_adapter


def _from_pretrained(gate: Gate, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(*args: Any, **options: Any) -> Any:
        if loads_corrected.get():
            return original(*args, **options)
        given = by_name(original, *args, **options)
        return _loaded(gate, original, given["model"], given.get("adapter_name", "default"), given)

    return from_pretrained


def _transformers_load_adapter(gate: Gate, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(*args: Any, **options: Any) -> Any:
        if loads_corrected.get():
            return original(*args, **options)
        given = by_name(original, *args, **options)
        config, source = given.get("load_config"), given.pop("peft_model_id", None)
        source = source or getattr(config, "pretrained_model_name_or_path", None)
        if source is None or given.get("peft_config") is not None or given.get("adapter_state_dict") is not None:
            raise UncoveredRouteError("under a guard an adapter is loaded from a directory or hub id, not from memory")
        check_nothing_overrides(given | _mapping(given["self"], config), source)
        location = local_directory(source, taken_from_hub(given))
        with gate.decision(location) as decision:
            corrected, _ = corrected_for(given["self"], decision, decision.read_directory(location))
            _check_swap(given["self"], given.get("adapter_name"), corrected)
            with host_loads(decision, corrected) as directory:
                loaded = original(peft_model_id=str(directory), **given)
            model, name = given["self"], given.get("adapter_name") or "default"
            check_arrived(model, name, corrected, lambda: model.delete_adapter(name))
            return loaded

    return load_adapter


def _check_swap(model: Any, adapter_name: Any, corrected: Adapter) -> None:
    """Let transformers load over an adapter only what it replaces entirely: the scales are those of the old one."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }
    if layers and not (
        layers.keys() == corrected.modules.keys()
        and all(layer.scaling[adapter_name] == 1 for layer in layers.values())
        and not any(
            adapter_name in layer.lora_variant or layer.lora_bias.get(adapter_name) for layer in layers.values()
        )
    ):
        raise HostLimitError(
            f"{corrected.path}: under a guard transformers swaps it in only for plain LoRA of scale 1 on the same "
            f"modules, and the model's adapter {adapter_name!r} is other than that; delete it first"
        )


def _mapping(model: Any, config: Any) -> dict[str, Any]:
    """Return transformers' ``key_mapping`` if there is one: what a load does to names beyond what the model wants."""
    if config is None:
        return {}
    own = get_model_conversion_mapping(model, hf_quantizer=config.hf_quantizer)
    known = [(mapping.source_patterns, mapping.target_patterns) for mapping in own]
    mappings = [(mapping.source_patterns, mapping.target_patterns) for mapping in config.weight_mapping or []]
    return {"key_mapping": [mapping for mapping in mappings if mapping not in known]}


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_peft_weights(model_id: Any, *args: Any, **options: Any) -> Any:
        if not loads_corrected.get():
            raise UncoveredRouteError(f"{model_id}: csulora's guard does not cover this way of loading adapter weights")
        return original(model_id, *args, **options)

    return load_peft_weights


def _refusing_x_lora(lora_model: Any, adapter_name: str, model_id: Any, *args: Any, **options: Any) -> None:
    raise UncoveredRouteError(
        f"{model_id}: under a guard no adapter is loaded into X-LoRA, which mixes several by the token"
    )
