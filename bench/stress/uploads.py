"""What a soak test uploads: adapters of a tiny model, good and broken in many ways, all at once or in pieces."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import inputs
import safetensors.torch

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.0.mlp.down_proj": (48, 64)}
RANK = 4


def make_adapter(directory: Path, seed: int, rank: int = RANK, settings: Mapping[str, object] | None = None) -> Path:
    """Write a good adapter, unless its settings are not."""
    return inputs.make_adapter(directory, SHAPES, seed, rank, settings)


def with_nan(directory: Path, seed: int) -> None:
    """Make an adapter that holds a NaN."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)


def truncated(directory: Path, seed: int) -> None:
    """Make an upload that never finishes."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(directory: Path, seed: int) -> None:
    """Make an adapter without its weights."""
    (make_adapter(directory, seed) / "adapter_model.safetensors").unlink()


def linked(directory: Path, seed: int) -> None:
    """Make an adapter whose weights are a symbolic link to somewhere else."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    elsewhere = directory.parent / f".{directory.name}.safetensors"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def with_number_beyond_json(directory: Path, seed: int) -> None:
    """Make an adapter whose configuration holds a number that no float holds, in a field without effect."""
    file = make_adapter(directory, seed) / "adapter_config.json"
    file.write_text(file.read_text()[:-1] + ', "runtime_config": {"x": 1e999}}')


def nested(directory: Path, seed: int) -> None:
    """Make an adapter whose configuration would grow a thousandfold by indentation."""
    file = make_adapter(directory, seed) / "adapter_config.json"
    file.write_text(file.read_text()[:-1] + f', "auto_mapping": {{"x": {"[" * 900 + "]" * 900}}}}}')


def with_escapes(directory: Path, seed: int) -> None:
    """Make an adapter with a tensor whose name would forge lines of a log."""
    file = make_adapter(directory, seed) / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    tensors["x\nadapter-000: corrected, change 0.0%\x1b[2J" + "x" * 100_000] = tensors.pop(next(iter(tensors)))
    safetensors.torch.save_file(tensors, file)


def with_settings(**settings: object) -> Callable[[Path, int], object]:
    """Return what makes an adapter with further settings."""
    return lambda directory, seed: make_adapter(directory, seed, settings=settings)


BROKEN: tuple[Callable[[Path, int], object], ...] = (
    with_nan,
    truncated,
    without_weights,
    linked,
    with_number_beyond_json,
    nested,
    with_escapes,
    with_settings(use_dora=True),
    with_settings(use_dora="none"),
    with_settings(kasa_config={}),
    with_settings(ensure_weight_tying=""),
    with_settings(r=RANK + 1),
    with_settings(lora_dropout=2.0),
    with_settings(task_type="BOGUS"),
    with_settings(layers_to_transform=[]),
    with_settings(target_modules="((.*a)*.*)*_projection"),  # takes longer to match than it may
)
RANK_ABOVE_THE_MATRIX = 2000


def make_sources(directory: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Make good and broken adapters, three in ten broken; of the good ones one in ten of a rank above the matrix."""
    good: list[Path] = []
    broken: list[Path] = []
    for seed in range(count):
        path = directory / f"adapter-{seed:03}"
        if seed % 10 in (2, 5, 8):
            BROKEN[len(broken) % len(BROKEN)](path, seed)
            broken.append(path)
        else:
            good.append(make_adapter(path, seed, RANK_ABOVE_THE_MATRIX if seed % 10 == 0 else RANK))
    return good, broken


def upload(sources: list[Path], incoming: Path, rng: random.Random, longest_pause: float) -> None:
    """Copy adapters one after the other: some at once, some in pieces with pauses, files in any order."""
    for source in sources:
        target = incoming / source.name
        slow = rng.random() < 0.3
        target.mkdir()
        for file in rng.sample(sorted(source.iterdir()), k=len(list(source.iterdir()))):
            if file.is_symlink():
                (target / file.name).symlink_to(file.resolve())
                continue
            data = file.read_bytes()
            pieces = rng.randint(2, 5) if slow else 1
            with (target / file.name).open("wb") as out:
                for i in range(pieces):
                    out.write(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
                    out.flush()
                    if slow:
                        time.sleep(rng.uniform(0.0, longest_pause))
        time.sleep(rng.uniform(0.0, 0.1))
