"""GGUF LoRA files, as llama.cpp, Ollama and their relatives load them.

What is written needs nothing of its reader but ``b @ a``: every scale is folded into ``lora_b`` and
``adapter.lora.alpha`` is 0, with which llama.cpp applies no alpha / rank. What would be ignored, or would end the
process, is refused: llama.cpp skips norms, and aborts on an update of a token embedding that is the output head
as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, Keys

from csulora import __version__
from csulora.adapters import experts
from csulora.adapters.factors import wide
from csulora.adapters.gguf import stacks
from csulora.adapters.gguf.factors import pair
from csulora.adapters.gguf.pieces import together
from csulora.adapters.lora import REPORT_FILE, Adapter, LoraModule, is_finite
from csulora.adapters.peft.config import base_model_name
from csulora.errors import HostLimitError, InputError, NotPlainLoraError
from csulora.io.files import atomic_file, is_gguf_name
from csulora.models import gguf_experts, gguf_layout, names
from csulora.models.gguf_base import BaseModel
from csulora.models.gguf_file import GGUFFile
from csulora.models.gguf_ignored import WAY_OUT
from csulora.models.gguf_layout import EMBEDDING, HEAD, Architecture
from csulora.models.names import parse_expert
from csulora.models.resolver import Resolver

OUTTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

LARGEST_FILE = 16 << 30  # bytes
VERSION, POLICY = "csulora.version", "csulora.policy"
ADAPTER_SHA256, SUBSPACE_SHA256 = "csulora.adapter.sha256", "csulora.subspace.sha256"

_HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_TENSOR = re.compile(r"(?P<name>.+)\.weight\.(?P<factor>lora_[ab])")

# Metadata that says nothing about the update: descriptions, and what task or prompt the adapter is meant for.
_DESCRIPTIVE = ("general.", "csulora.")
_KNOWN_KEYS = (Keys.Adapter.TYPE, Keys.Adapter.LORA_ALPHA, Keys.Adapter.LORA_TASK_NAME, Keys.Adapter.LORA_PROMPT_PREFIX)


def read(path: Path, base: BaseModel | None = None) -> Adapter:
    """Read a GGUF LoRA file. The bytes that are hashed are the bytes that are used.

    Updates of experts come as PEFT has them: gate and up in one, under the names of parameters.

    Args:
        path: the file.
        base: the model it is for. Needed where rows are reordered by heads, whose number the file does not hold.

    Raises:
        InputError: the file is malformed, contradicts itself or the base model, or needs a base model.
        RefusedError: it is more or other than plain LoRA, or for an architecture that is not supported.
    """
    file = GGUFFile.read(path, LARGEST_FILE)
    architecture = _check_metadata(file)
    if base is not None and base.architecture != architecture:
        raise InputError(f"{path}: is for {architecture.name}, but {base.path} is {base.architecture.name}")
    alpha = file.float32(Keys.Adapter.LORA_ALPHA) or 0.0
    if not math.isfinite(alpha):
        raise InputError(f"{path}: {Keys.Adapter.LORA_ALPHA} is {alpha}")
    modules = {}
    for module, update in sorted(_updates(file, architecture, base, alpha)):
        if base is not None:
            _check_fits(path, module, module, update, base)
            b, a = base.from_gguf(module, update.b, update.a)
            update = replace(update, b=b, a=a, scale=_unmultiplied(update.scale, module, base))
        modules[module] = update
    config = {
        "base_model_name_or_path": base_model_name(_base_model_name(file)),
        "task_type": "CAUSAL_LM",
        "target_parameters": _parameters(modules, architecture),
    }
    sha256 = hashlib.sha256(file.data).hexdigest()
    adapter = Adapter(modules, config, path, sha256, format="gguf", is_decoded=True, files={path.name: sha256})
    return experts.encoded(adapter, architecture.expert_layout)


def _parameters(modules: Iterable[str], architecture: Architecture) -> list[str]:
    """Return what PEFT adapts as parameters: experts, and routers, since most of them are no linear layers."""
    found: dict[str, None] = {}
    for module in modules:
        if of_expert := parse_expert(module):
            owner, _, projection = of_expert
            is_fused = projection != experts.DOWN and architecture.has_gates
            found[f"{owner}.{experts.GATE_UP if is_fused else projection}"] = None
        elif architecture.is_router(module):
            found[f"{module}{names.WEIGHT}"] = None
    return list(found)


def write(adapter: Adapter, path: Path, base: BaseModel, outtype: str | None = None) -> None:
    """Write an adapter for a base model, complete or not at all.

    Args:
        adapter: what to write; its scales are folded into B.
        path: the file; one that is there is replaced.
        base: the model that llama.cpp will run it with.
        outtype: ``f32``, ``f16`` or ``bf16``; None keeps each module's storage type.

    Raises:
        InputError: a shape differs from the base model's, or a value does not fit the type.
        RefusedError: llama.cpp would ignore a module, or die of it.
    """
    if outtype is not None and outtype not in OUTTYPES:
        raise InputError(f"outtype {outtype!r}: must be one of {', '.join(OUTTYPES)}")
    tensors = _tensors(adapter, base, OUTTYPES.get(outtype or ""))
    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, base.architecture.name)
        _add_metadata(writer, adapter, base)
        for name, tensor in tensors.items():
            _add_tensor(writer, name, tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:  # numpy's says neither where nor why
            reason = error.strerror or f"{error}; No space left on device"
            raise OSError(f"{path}: cannot be written: {reason}") from error


def _check_metadata(file: GGUFFile) -> Architecture:
    """Check all that llama.cpp looks at; return the architecture."""
    path = file.path
    if (kind := file.text(Keys.General.TYPE)) != "adapter":
        raise InputError(f"{path}: general.type is {kind!r}; a LoRA adapter says adapter")
    architecture = gguf_layout.architecture(file.text(Keys.General.ARCHITECTURE), str(path))
    if (kind := file.text(Keys.Adapter.TYPE)) != "lora":
        raise NotPlainLoraError(f"{path}: adapter.type is {kind!r}; only lora is supported")
    if Keys.Adapter.ALORA_INVOCATION_TOKENS in file.fields:
        raise NotPlainLoraError(f"{path}: an activated LoRA, which acts on some tokens only; it cannot be corrected")
    for key in file.fields:
        if key not in _KNOWN_KEYS and not key.startswith(_DESCRIPTIVE):
            raise NotPlainLoraError(f"{path}: metadata {key} is unknown; it may change what the adapter does")
    return architecture


def _unmultiplied(scale: float, module: str, base: BaseModel) -> float:
    factor = base.multipliers.get(module, 1.0)
    if factor == 0:
        raise InputError(f"{base.path}: multiplies outputs of {module} by 0; its updates cannot be read back from GGUF")
    return scale / factor


def _updates(
    file: GGUFFile, architecture: Architecture, base: BaseModel | None, alpha: float
) -> Iterator[tuple[str, LoraModule]]:
    """Yield every module with its update, the rows as they stand in the file."""
    pieces: dict[str, dict[str, LoraModule]] = {}
    for tensor, factors in _group(file, architecture).items():
        stack = gguf_experts.stack(tensor, architecture.experts)
        module = architecture.module_name(tensor) or ""
        if base is None:
            _check_file_tells_all(file, architecture, stack.modules(0)[0] if stack else module)
        a, b = pair(file, tensor if stack else module, factors, dimensions=3 if stack else 2)
        is_embedding = module == EMBEDDING  # stored as a (vocabulary, rank), b (width, rank)
        rank = b.shape[-1]
        if rank != a.shape[-1 if is_embedding else -2] or a.shape[:-2] != b.shape[:-2]:
            unlike = "number of experts or rank" if stack else "rank"
            raise InputError(
                f"{file.path}: {module or tensor} has factors {list(a.shape)} and {list(b.shape)} of unlike {unlike}"
            )
        # llama.cpp's rule, in its precision: alpha 0 means that there is no alpha.
        scale = float(torch.tensor(alpha) / rank) if alpha else 1.0
        if stack:
            if base is not None:
                stacks.check_number(tensor, len(a), base, file.path)
            yield from stacks.apart(stack, a, b, scale, f"{file.path}: {tensor}")
        elif architecture.spread_of(module):
            pieces.setdefault(module, {})[tensor] = LoraModule(b, a, scale)
        else:
            yield module, LoraModule(a, b.t(), scale, is_embedding=True) if is_embedding else LoraModule(b, a, scale)
    for module, found in pieces.items():
        assert base is not None
        yield module, together(module, found, base, file.path)


def _check_file_tells_all(file: GGUFFile, architecture: Architecture, module: str) -> None:
    """Raise `InputError` if a module's update in the model that it was made for does not follow from the file."""
    if architecture.is_reordered(module):
        unknown = "scale" if names.is_expert(module) else "order"
        raise InputError(
            f"{file.path}: the {unknown} of the rows of {module} follows from the model, of which the file does not "
            "tell enough; name the base model (--base-model)"
        )


def _group(file: GGUFFile, architecture: Architecture) -> dict[str, dict[str, str]]:
    """Sort tensor names by what they update, a GGUF name less ``.weight``, and factor; none is left over."""
    if not file.tensors:
        raise InputError(f"{file.path}: holds no tensor")
    factors: dict[str, dict[str, str]] = {}
    for tensor in file.tensors:
        found = _TENSOR.fullmatch(tensor)
        if found is None:
            reason = "llama.cpp ignores it" if tensor.endswith("_norm.weight") else "it is neither lora_a nor lora_b"
            raise NotPlainLoraError(f"{file.path}: tensor {tensor} is not part of plain LoRA: {reason}")
        module = architecture.module_name(found["name"])
        is_known = module is not None or gguf_experts.stack(found["name"], architecture.experts) is not None
        if not is_known or (module and architecture.is_ignored(module)):
            reason = "llama.cpp ignores it" if module else f"no known weight of {architecture.name} has that name"
            raise NotPlainLoraError(f"{file.path}: tensor {tensor} cannot be used: {reason}; {WAY_OUT}")
        factors.setdefault(found["name"], {})[found["factor"]] = tensor
    return factors


def _base_model_name(file: GGUFFile) -> str | None:
    url = file.text(Keys.General.BASE_MODEL_REPO_URL.format(id=0))
    if url and url.startswith(_HUB):
        return url.removeprefix(_HUB)
    return file.text(Keys.General.BASE_MODEL_NAME.format(id=0))


def _check_fits(path: Path, name: str, module: str, update: LoraModule, base: BaseModel) -> None:
    """Raise unless the base model in llama.cpp takes the update of ``module``, which the adapter calls ``name``."""
    if base.is_tied and module in (EMBEDDING, HEAD):
        raise HostLimitError(
            f"{path}: updates {name}, but token embedding and output head of {base.path} are one matrix, "
            "which llama.cpp cannot adapt"
        )
    if module not in base.shapes:
        raise InputError(f"{path}: {name} does not exist in {base.path}; the adapter is for another model")
    if update.is_embedding != (module == EMBEDDING):
        raise HostLimitError(f"{path}: {name} is updated as {'an' if update.is_embedding else 'no'} embedding")
    if update.shape != base.shapes[module]:
        raise InputError(
            f"{path}: {name} updates a {list(update.shape)} matrix, "
            f"but it is {list(base.shapes[module])} in {base.path}"
        )


def _tensors(adapter: Adapter, base: BaseModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the factors under llama.cpp's names, in its order of rows, in the type to be written."""
    tensors: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}

    def add(tensor: str, a: torch.Tensor, b: torch.Tensor) -> None:
        for key, matrix in ((f"{tensor}.weight.lora_a", a), (f"{tensor}.weight.lora_b", b)):
            tensors[key] = matrix.to(dtype or dtypes[tensor]).contiguous()
            if not is_finite(tensors[key]):
                raise InputError(f"{adapter.path}: {key} with its scale does not fit {tensors[key].dtype}")

    of_experts: dict[str, LoraModule] = {}
    for module, update in _placed(adapter, base):
        heights = base.heights(module)
        for tensor in heights:
            dtypes[tensor] = torch.promote_types(dtypes.get(tensor, update.b.dtype), update.b.dtype)
        multiplied = replace(update, scale=update.scale * base.multipliers.get(module, 1.0))
        if base.expert_tensor(module):
            of_experts[module] = multiplied
            continue
        widened = wide(multiplied)
        b, a = base.to_gguf(module, widened.b, widened.a)
        for tensor, rows in zip(heights, b.split_with_sizes([*heights.values()]), strict=True):
            add(tensor, *((rows, a.t()) if update.is_embedding else (a, rows)))
    for tensor, (a, b) in stacks.together(of_experts, base):
        add(tensor, a, b)
    return tensors


def _placed(adapter: Adapter, base: BaseModel) -> Iterator[tuple[str, LoraModule]]:
    """Yield every update with the base's module that it is for."""
    resolver = Resolver(base.shapes)
    seen: set[str] = set()
    for name, update in experts.decoded(adapter, base.architecture.expert_layout).modules.items():
        module = resolver.name_of(name)
        tensor = base.expert_tensor(module) or base.architecture.tensor_name(module)
        if tensor is None or base.architecture.is_ignored(module):
            reason = f"ignores updates of {name}" if tensor else f"has no {base.architecture.name} tensor for {name}"
            raise HostLimitError(f"{adapter.path}: llama.cpp {reason}; {WAY_OUT}")
        _check_fits(adapter.path, name, module, update, base)
        if module in seen:
            raise InputError(f"{adapter.path}: {name} is a second update of {module}")
        seen.add(module)
        yield module, update


def _add_metadata(writer: GGUFWriter, adapter: Adapter, base: BaseModel) -> None:
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(adapter.path.stem if is_gguf_name(adapter.path) else adapter.path.name)
    if base.license:
        writer.add_license(base.license)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.name)
    hub_id = adapter.config.get("base_model_name_or_path")
    if isinstance(hub_id, str) and _HUB_ID.fullmatch(hub_id):
        writer.add_base_model_repo_url(0, f"{_HUB}{hub_id}")
    writer.add_string(VERSION, __version__)
    writer.add_string(ADAPTER_SHA256, adapter.sha256)
    if REPORT_FILE in adapter.documents:
        report = json.loads(adapter.documents[REPORT_FILE])
        writer.add_string(SUBSPACE_SHA256, report["subspace_sha256"])
        writer.add_string(POLICY, json.dumps(report["policy"], sort_keys=True))


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
