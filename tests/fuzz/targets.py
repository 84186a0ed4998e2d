"""What is fuzzed: functions that take the bytes of a file and return, or raise one `CsuloraError`.

Each one goes the whole way that such a file goes, through to the corrected adapter as it would be written. Files
lie in memory where there is a file system for that.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save

import csulora
import factories
from csulora.adapters.lora import Adapter
from csulora.adapters.peft import directory as peft
from csulora.adapters.weights_files import CONFIG_FILE
from csulora.errors import CsuloraError
from csulora.policy.overrides import Directions
from csulora.serving.gate import Gate
from csulora.subspace.expert_layout import ExpertLayout
from csulora.tuning import probes

_MOST_DATA = 1 << 16  # bytes that a structured input may ask for behind its header


@cache
def _directory() -> Path:
    memory = Path("/dev/shm")
    kept = TemporaryDirectory(prefix="csulora-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    _directory.kept = kept  # type: ignore[attr-defined] # removed when the process ends
    return Path(kept.name)


@cache
def _subspace() -> csulora.Subspace:
    return factories.subspace()


@cache
def _adapter() -> Path:
    return factories.save_adapter(_directory() / "adapter", factories.SHAPES)


def _write(name: str, data: bytes) -> Path:
    path = _directory() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _finish(adapter: Adapter, subspace: csulora.Subspace, policy: csulora.Policy) -> None:
    """Correct, and make what would be written; it must be readable, and plain."""
    fixed, report = csulora.correct(adapter, subspace, policy)
    json.dumps(report.to_dict(), allow_nan=False)
    config, tensors = peft.config_of(fixed), peft.tensors_of(fixed)
    again = peft.parse(json.loads(json.dumps(config)), tensors, fixed.path, "")
    assert all(module.scale == 1 for module in again.modules.values())
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def adapter_config(data: bytes) -> None:
    """The bytes of adapter_config.json, beside good weights."""
    directory = _write("configured/" + CONFIG_FILE, data).parent
    weights = directory / peft.WEIGHTS_FILE
    if not weights.exists():
        weights.write_bytes((_adapter() / peft.WEIGHTS_FILE).read_bytes())
    for policy in (csulora.Policy.csulora(), csulora.Policy.none(keep_uncovered=("*",))):
        _finish(peft.read(directory), _subspace(), policy)


def safetensors(data: bytes) -> None:
    """The bytes of adapter_model.safetensors, see `_container`, beside a good configuration."""
    directory = _write("weights/" + peft.WEIGHTS_FILE, _container(data, _values())).parent
    config = directory / CONFIG_FILE
    if not config.exists():
        config.write_bytes((_adapter() / CONFIG_FILE).read_bytes())
    _finish(peft.read(directory), _subspace(), csulora.Policy.none(keep_uncovered=("*",)))


def experts_config(data: bytes) -> None:
    """The bytes of adapter_config.json, beside good weights of fused experts."""
    _fused(data, _fused_weights())


def experts(data: bytes) -> None:
    """The bytes of adapter_model.safetensors, see `_container`, beside a good configuration of fused experts."""
    _fused(_fused_config(), _container(data, _values()))


def _fused(config: bytes, weights: bytes) -> None:
    """Correct experts, and write them in the layout that came in, fused, and one by one."""
    directory = _write("experts/" + CONFIG_FILE, config).parent
    _write("experts/" + peft.WEIGHTS_FILE, weights)
    found = peft.read(directory)
    for layout in (None, "fused", "per-expert"):
        fixed, report = csulora.correct(found, _experts_subspace(), csulora.Policy.none(rank="exact"), layout)
        json.dumps(report.to_dict(), allow_nan=False)
        again = peft.parse(peft.config_of(fixed), peft.tensors_of(fixed), fixed.path, "")
        assert all(module.scale == 1 for module in again.modules.values())


def gguf(data: bytes) -> None:
    """The bytes of a GGUF LoRA file."""
    _finish(
        csulora.load_adapter(_write("lora.gguf", data)), _gguf_subspace(), csulora.Policy.csulora(drop_uncovered=("*",))
    )


def subspace(data: bytes) -> None:
    """The bytes of a subspace file, see `_container`."""
    found = csulora.Subspace.open(_write("subspace.safetensors", _container(data, _file_data(_small_subspace()))))
    json.dumps(found.to_dict(), allow_nan=False)
    Gate.open(found, csulora.Policy.csulora())
    _finish(csulora.load_adapter(_adapter()), found, csulora.Policy.csulora(keep_uncovered=("*",)))


def policy(data: bytes) -> None:
    """The bytes of a policy."""
    found = csulora.Policy.load(_write("policy.toml", data))
    found.save(_directory() / "again.toml")
    assert csulora.Policy.load(_directory() / "again.toml") == found
    _finish(csulora.load_adapter(_adapter()), _subspace(), found)


def prompts(data: bytes) -> None:
    """The bytes of a file of prompts."""
    found = probes.read(_write("prompts.txt", data))
    lines = [json.dumps({"messages": [asdict(message) for message in chat]}) for chat in found]
    assert probes.read(_write("again.jsonl", "\n".join(lines).encode())) == found


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (adapter_config, safetensors, experts_config, experts, gguf, subspace, policy, prompts)
}


def survives(target: str, data: bytes) -> bool:
    """Run a target; True if the input was accepted, False if csulora refused it, anything else is a finding."""
    try:
        TARGETS[target](data)
    except CsuloraError as error:
        if not str(error):
            raise ValueError("an error without a message") from error
        return False
    return True


def _container(data: bytes, values: bytes) -> bytes:
    """Return a safetensors file: the input itself, unless it starts with a brace.

    Then it is the header alone: its length is put before it, and behind it as many bytes of ``values`` as it speaks
    of. So a mutation of the header is not wasted on a length that no longer fits.
    """
    if not data.startswith(b"{"):
        return data
    try:
        entries = [value for value in json.loads(data).values() if isinstance(value, dict)]
        size = max(int(entry["data_offsets"][1]) for entry in entries if "data_offsets" in entry)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        size = 0
    size = min(max(size, 0), _MOST_DATA)
    return struct.pack("<Q", len(data)) + data + (values + bytes(size))[:size]


@cache
def _values() -> bytes:
    return factories.gaussian(_MOST_DATA // 4, seed=3).numpy().tobytes()


@cache
def _small_subspace() -> bytes:
    factories.subspace({"model.layers.0.self_attn.q_proj": (40, 40)}, rank=2).save(_directory() / "small.safetensors")
    return (_directory() / "small.safetensors").read_bytes()


@cache
def _gguf_subspace() -> csulora.Subspace:
    return factories.subspace({"model.layers.0.mlp.down_proj": (40, 56), "model.layers.0.self_attn.q_proj": (40, 40)})


_EXPERTS, _HIDDEN, _WIDTH, _RANK = 3, 20, 12, 2


@cache
def _experts_subspace() -> csulora.Subspace:
    shapes = {
        f"model.layers.0.mlp.experts.{expert}.{projection}": shape
        for expert in range(_EXPERTS)
        for projection, shape in {
            "gate_proj": (_WIDTH, _HIDDEN),
            "up_proj": (_WIDTH, _HIDDEN),
            "down_proj": (_HIDDEN, _WIDTH),
        }.items()
    }
    found = factories.subspace(shapes, rank=4)
    return csulora.Subspace(dict(found), replace(found.provenance, experts=ExpertLayout(per_expert=True)))


def _fused_config() -> bytes:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 4, "target_modules": [], "target_parameters": parameters}
    return json.dumps(settings).encode()


def _fused_weights() -> bytes:
    owner, rank = "base_model.model.model.layers.0.mlp.experts", _EXPERTS * _RANK
    shapes = {f"{owner}.base_layer": (2 * _WIDTH, _HIDDEN), owner: (_HIDDEN, _WIDTH)}
    tensors = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        tensors[f"{name}.lora_A.weight"] = factories.gaussian(rank, columns, seed=seed)
        tensors[f"{name}.lora_B.weight"] = factories.gaussian(rows, rank, seed=seed + 2)
    return save(tensors)


def seeds() -> dict[str, dict[str, bytes]]:
    """Good files of every kind, from which the corpus was started."""
    config = (_adapter() / CONFIG_FILE).read_bytes()
    weights = (_adapter() / peft.WEIGHTS_FILE).read_bytes()
    tuned = csulora.Policy(rank=3, overrides=(csulora.Override("*", gains=(1, 0.5, 0.5, 0)),), max_undo=50.0)
    csulora.Policy.project().save(_directory() / "project.toml")
    tuned.save(_directory() / "tuned.toml")
    single = csulora.Override("*", directions=Directions(left=(0.5, 1), right=(0.25,)))
    csulora.Policy.none(overrides=(single,)).save(_directory() / "directions.toml")
    return {
        "adapter_config": {"plain": config, "patterned": _patterned()},
        "safetensors": {"header": _header(weights), "file": save({"a": torch.ones(1)}), "small": _header(_tiny())},
        "experts_config": {"fused": _fused_config(), "unsloth": _fused_config()[:-1] + b', "unsloth_fixed": true}'},
        "experts": {"header": _header(_fused_weights())},
        "gguf": {"qwen2": _gguf_lora("qwen2"), "llama": _gguf_lora("llama")},
        "subspace": {"header": _header(_small_subspace()), "file": _small_subspace()},
        "policy": {name: (_directory() / f"{name}.toml").read_bytes() for name in ("project", "tuned", "directions")},
        "prompts": _prompts(),
    }


def _header(file: bytes) -> bytes:
    return file[8 : 8 + struct.unpack("<Q", file[:8])[0]]


def _file_data(file: bytes) -> bytes:
    return file[8 + struct.unpack("<Q", file[:8])[0] :]


def _tiny() -> bytes:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    return save({f"{name}.lora_A.weight": torch.ones(4, 40), f"{name}.lora_B.weight": torch.ones(40, 4)})


def _patterned() -> bytes:
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3.5,
        "use_rslora": True,
        "target_modules": r".*\.(q|up|down)_proj",
        "exclude_modules": ["k_proj"],
        "rank_pattern": {"q_proj": 4, r"layers\.0\..*": 4},
        "alpha_pattern": {"^model.*up_proj": 1},
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "init_lora_weights": "gaussian",
        "bias": "none",
    }
    return json.dumps(settings).encode()


def _prompts() -> dict[str, bytes]:
    questions = [f"How is number {number} made?" for number in range(probes.FEWEST)]
    turns = [[("user", "Hello."), ("assistant", "Hello!"), ("user", question)] for question in questions]
    chats = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in turns]
    return {
        "text": "\n".join(questions).encode(),
        "prompts": "\n".join(json.dumps({"prompt": question}) for question in questions).encode(),
        "chats": "\n".join(map(json.dumps, chats)).encode(),
    }


def _gguf_lora(architecture: str) -> bytes:
    path = _directory() / "seed.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, (rows, columns) in {"blk.0.ffn_down": (40, 56), "blk.0.attn_q": (40, 40)}.items():
        writer.add_tensor(f"{name}.weight.lora_a", factories.gaussian(2, columns, seed=1).half().numpy())
        writer.add_tensor(
            f"{name}.weight.lora_b",
            factories.gaussian(rows, 2, seed=2).half().numpy(),
            raw_dtype=GGMLQuantizationType.F16,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
