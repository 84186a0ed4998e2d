"""`csulora extract`: the subspace file of a model pair."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

import csulora
from csulora.cli.arguments import Device, Dtype, Json, Quiet, check_outputs
from csulora.cli.console import deliver, progress_bar
from csulora.cli.interruption import interruptible
from csulora.views import tables


def _rank(text: str | None) -> int | Literal["auto"]:
    """Return what --rank says."""
    if text is None:
        return 64
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--rank is {text}; give a number from 1 on, or auto")
    return int(text)


def _cut_off(subspace: csulora.Subspace, most: int) -> str:
    """Say in a line of how many modules more directions stand out than are kept, if there are any."""
    full = sum(module.rank == most < min(module.shape) for module in subspace.values())
    if not full:
        return ""
    return f"\n{full} modules have {most} directions, the most that --max-rank allows; more may stand out"


def _left_out(found: Mapping[str, Collection[str]]) -> str:
    """Say how many weights of each kind are left out, and how to have them.

    >>> _left_out({"head": ["lm_head"], "stacked": ["conv1d", "conv2d"]})
    "1 head, 2 stacked; --modules '*' takes all but stacked weights, such as convolutions"
    """
    counts = ", ".join(f"{len(modules)} {kind}" for kind, modules in found.items())
    but = " but stacked weights, such as convolutions" if "stacked" in found else ""
    return f"{counts}; --modules '*' takes all{but}"


def _sketch_size(subspace: csulora.Subspace) -> int:
    return sum(module.sketch.nbytes for module in subspace.values() if module.sketch is not None)


def extract(
    base: Annotated[str, typer.Argument(help="Checkpoint before alignment: a directory, a GGUF file or a hub id.")],
    aligned: Annotated[str, typer.Argument(help="Checkpoint after alignment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Subspace file to write.")],
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="K|auto",
            help="Directions per module; auto: those that stand out. [default: 64]",
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep the fewest directions that capture this share of |D|^2.")
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Most directions per module. [default: 256 with --energy, 64 with --rank auto]"),
    ] = None,
    expert_rank: Annotated[
        int, typer.Option(min=1, help="Most directions per projection of an expert, of which there may be thousands.")
    ] = 16,
    modules: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Modules to extract; repeatable. [default: all linear ones]"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Storage type of the factors.")] = Dtype.f16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random start block.")] = 0,
    keep_noise: Annotated[
        bool, typer.Option("--keep-noise", help="Keep directions that do not stand out of storage rounding.")
    ] = False,
    sketch: Annotated[
        int,
        typer.Option(
            metavar="COLUMNS",
            min=0,
            help="Keep a sketch of every aligned matrix, so that servers can limit annihilation. [default: none]",
            show_default=False,
        ),
    ] = 0,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Estimate the subspace in which alignment moved each weight matrix.

    Under torchrun the processes share the modules, and the output must lie where all of them see it.
    """
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy (with --max-rank), not both")
    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"--energy is {energy:g}; it must lie in (0, 1]")
    if max_rank is not None and energy is None and rank != "auto":
        raise typer.BadParameter("--max-rank goes with --energy or --rank auto; without them give --rank")
    check_outputs([output, json], [base, aligned])
    from csulora.extraction.distributed import joined

    reason = "finished modules are kept; run the same command to continue"
    with (
        interruptible(reason),
        joined() as processes,
        progress_bar("extracting", quiet or not processes.is_first) as progress,
    ):
        subspace = csulora.extract(
            base,
            aligned,
            output=output,
            progress=progress,
            rank=_rank(rank),
            energy=energy,
            max_rank=max_rank,
            expert_rank=expert_rank,
            modules=modules or [],
            dtype=dtype.value,
            device=device.value,
            seed=seed,
            keep_noise=keep_noise,
            sketch=sketch,
            processes=processes,
        )
    if not processes.is_first:
        return
    summary = f"wrote {output}: alignment from {base} to {aligned}, {len(subspace)} modules, sha256 {subspace.sha256}"
    from csulora.models.checkpoint import Checkpoint

    left_out = Checkpoint.open(aligned).left_out(subspace)
    if left_out:
        summary += f"\nleft out: {_left_out(left_out)}"
    if sketch:
        summary += f"\nits sketches take {_sketch_size(subspace) / 1e6:.1f} MB"
    if rank == "auto":
        summary += _cut_off(subspace, subspace.provenance.options["max_rank"])
    document = subspace.to_dict() | {"left_out": left_out}
    deliver(tables.subspace_table(subspace), summary, document, json, quiet)
