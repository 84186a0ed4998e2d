"""How the commands that run a model load it: where, over how many GPUs, and in how many bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csulora.cli.arguments import Device
from csulora.cli.console import note, progress_bar
from csulora.errors import InputError, RefusedError

if TYPE_CHECKING:
    from csulora.subspace.subspace import Subspace
    from csulora.tuning.loading import Loading


class DeviceMap(StrEnum):
    """How accelerate spreads a model."""

    auto = "auto"
    balanced = "balanced"
    balanced_low_0 = "balanced_low_0"
    sequential = "sequential"


class LoadIn(StrEnum):
    """What bitsandbytes quantises linear layers to."""

    eight = "8bit"
    four = "4bit"


ModelDevice = Annotated[Device | None, typer.Option(help="Where the model runs. [default: auto]")]
ModelDeviceMap = Annotated[
    DeviceMap | None, typer.Option(help="Spread the model over all GPUs, in place of --device; needs accelerate.")
]
ModelLoadIn = Annotated[LoadIn | None, typer.Option(help="Quantise the model's linear layers; needs bitsandbytes.")]


def loading_of(device: Device | None, device_map: DeviceMap | None, load_in: LoadIn | None) -> Loading:
    """Return what the options say.

    Raises:
        typer.BadParameter: a device and a map of devices are given.
    """
    from csulora.tuning.loading import Loading

    if device and device_map:
        raise typer.BadParameter("--device and --device-map exclude each other; give one of them")
    return Loading((device or Device.auto).value, device_map, load_in)


def check_aligned(model: str, subspace: Subspace, *, quiet: bool) -> None:
    """Say so if a model is not the aligned one that a subspace file was made of, as far as its weights can be read.

    Raises:
        InputError: it is the checkpoint before alignment.
    """
    from csulora.models.checkpoint import Checkpoint
    from csulora.models.identity import compared, which

    try:
        found = which(Checkpoint.open(model), subspace)
    except (InputError, RefusedError):
        return  # transformers loads more than csulora reads, or says what is wrong
    if found == "base":
        raise InputError(f"{model}: is the checkpoint before alignment; name the aligned one")
    if found == "another":
        note(quiet, f"{model}: {compared(subspace)} is not the aligned checkpoint's; name that one or a converted copy")


def written_general(
    file: Path,
    model: str,
    loading: Loading,
    seed: int,
    refusals: Sequence[str] | None = None,
    seen: Collection[str] = (),
    *,
    quiet: bool,
) -> str:
    """Return the file of general prompts that the model writes, or wrote before, see `self_written.written`."""
    from csulora.tuning.self_written import written

    with progress_bar("writing general prompts", quiet):  # what transformers draws meanwhile is no line of ours
        return str(written(file, model, loading, seed, refusals, seen))
