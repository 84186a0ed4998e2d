"""What the commands take: their choices, and the options that several of them share."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from csulora.cli.console import STDOUT
from csulora.errors import InputError, printable
from csulora.io.files import check_file, check_not_inputs, is_gguf_name, real_path
from csulora.policy.policy import Policy
from csulora.policy.toml import POLICY_CHOICES, PRESETS
from csulora.serving.variables import (
    DECISIONS_VARIABLE,
    POLICY_VARIABLE,
    RULES_SIGNATURE_VARIABLE,
    SIGNATURE_VARIABLE,
    SUBSPACE_SHA256_VARIABLE,
    SUBSPACE_VARIABLE,
)

_MOST_DIGITS = 10  # of a rank


class Dtype(StrEnum):
    """Storage types of factors."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Format(StrEnum):
    """Adapter formats that can be written."""

    peft = "peft"
    mlx = "mlx"
    gguf = "gguf"


class ColumnOrder(StrEnum):
    """Who ordered the columns of fused experts."""

    peft = "peft"
    unsloth = "unsloth"


class ExpertLayout(StrEnum):
    """How the experts of a written adapter are laid out."""

    per_expert = "per-expert"
    fused = "fused"


_WEIGHTS = ".safetensors"  # a file of it is no adapter, as reading it says


def is_gguf_written(output: Path, chosen: Format | None, adapter: str) -> bool:
    """Whether a GGUF file is to be written: it was chosen, else the name asks for it, else the adapter is one."""
    if chosen is not None and chosen is not Format.gguf and is_gguf_name(output):
        raise typer.BadParameter(f"--format {chosen.value} writes a directory, and {output} is named like a GGUF file")
    is_file = (Path(adapter).is_file() and not adapter.endswith(_WEIGHTS)) or is_gguf_name(adapter)
    is_gguf = chosen is Format.gguf or (chosen is None and (is_gguf_name(output) or is_file))
    if output.suffix == _WEIGHTS and not is_gguf:
        raise typer.BadParameter(f"a directory is written, and {output} is named like a file of weights")
    return is_gguf


def check_output(path: Path | None) -> Path | None:
    """Raise `InputError` now, and not after an hour's work, if the file cannot be written."""
    if path:
        check_file(path)
    return path


def check_document(path: Path | None) -> Path | None:
    """The same for a file that may be stdout."""
    return path if path == STDOUT else check_output(path)


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Raise `InputError` if an output is, or lies in, an input or another output, see `check_not_inputs`."""
    check_not_inputs((output for output in outputs if output and output != STDOUT), filter(None, inputs))


def check_refusals(texts: Iterable[str] | None) -> None:
    """Raise `typer.BadParameter` if a text of refusals is empty."""
    if not all(map(str.strip, texts or ())):
        raise typer.BadParameter("--refusal is empty: every reply would count as a refusal")


def file_of(policy: str | None) -> str | None:
    """Return the file of a policy; a preset has none, whatever lies beside it under its name."""
    return None if policy in PRESETS else policy


def check_apart(output: Path, directories: Iterable[Path]) -> None:
    """Raise `InputError` if a file to be written lies in one of the directories, at whatever depth."""
    for directory in directories:
        if output != STDOUT and real_path(output).is_relative_to(real_path(directory)):
            raise InputError(f"{output}: lies in {directory}, which holds adapters alone; choose another place")


AdapterSource = Annotated[
    str, typer.Argument(help="PEFT or MLX directory, GGUF LoRA file, or hub id: org/name@revision:sub/folder.")
]
Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="PEFT or MLX directories, GGUF LoRA files, or hub ids.")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="DIR|GGUF", help="Model of a GGUF adapter that is read or written."),
]
PolicySource = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME|FILE",
        help=f"A preset ({', '.join(PRESETS)}) or a policy file (TOML), such as `csulora tune` writes.",
    ),
]
MaxUndo = Annotated[
    float | None,
    typer.Option(help="Refuse if a module, before its correction, undoes more than this share of its alignment."),
]
MaxTotalUndo = Annotated[
    float | None, typer.Option(help="The same of all modules together: refuse above this share of their alignment.")
]
MinAnnihilationRatio = Annotated[
    float | None,
    typer.Option(help="Refuse if a module's annihilation ratio is smaller; needs --aligned-model or sketches."),
]
AlignedModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The aligned checkpoint, for annihilation ratios: a directory or a hub id."),
]
WriteGeneral = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Let the model write general prompts to this file, or read those that it wrote before."
    ),
]
KeepUncovered = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Modules that may pass uncorrected if the subspace file lacks them; repeatable."),
]
DropUncovered = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Modules that are left out if the subspace file lacks them; repeatable."),
]
ExpertOrder = Annotated[
    ColumnOrder | None,
    typer.Option("--expert-layout", help="Who ordered an adapter's fused experts, where Unsloth's file does not say."),
]
EveryModule = Annotated[bool, typer.Option("--all", help="A row per module in place of one per kind of module.")]
Outtype = Annotated[Dtype | None, typer.Option(help="Type of a GGUF file's tensors. [default: the adapter's]")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=check_document, help="Write the report as JSON to this file; - for stdout, and no table."
    ),
]
SubspaceSha256 = Annotated[
    str | None,
    typer.Option(
        envvar=SUBSPACE_SHA256_VARIABLE, metavar="HEX", help="The one content of the subspace file that is accepted."
    ),
]
RequireSignature = Annotated[
    str | None,
    typer.Option(
        envvar=SIGNATURE_VARIABLE,
        metavar="PEM|IDENTITY",
        help="Who must have signed adapters: a PEM file of public keys or certificates, or "
        "identity=NAME,issuer=URL[,trust=FILE].",
    ),
]
RequireRulesSignature = Annotated[
    str | None,
    typer.Option(
        envvar=RULES_SIGNATURE_VARIABLE,
        metavar="PEM|IDENTITY",
        help="Who must have signed the subspace file and the policy file.",
    ),
]
SignWith = Annotated[
    Path | None,
    typer.Option(metavar="KEY", help="Private key (PEM, EC) that signs what is written, and what it was made of."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


ServedSubspace = Annotated[
    Path | None, typer.Option(envvar=SUBSPACE_VARIABLE, help="Subspace file of the served model.")
]
ServedPolicy = Annotated[
    str | None,
    typer.Option(
        envvar=POLICY_VARIABLE, metavar="NAME|FILE", help="A preset, or a policy file (TOML); there is no default."
    ),
]
ServedDecisions = Annotated[
    Path | None, typer.Option(envvar=DECISIONS_VARIABLE, help="Append a JSON line per decision to this file.")
]


def set_variables(
    subspace: Path | None,
    policy: str | None,
    decisions: Path | None,
    require_signature: str | None,
    require_rules_signature: str | None,
) -> None:
    """Let the processes of a server, which may work elsewhere, find what was chosen."""
    files = {SUBSPACE_VARIABLE: subspace, DECISIONS_VARIABLE: decisions}
    signers = {SIGNATURE_VARIABLE: require_signature, RULES_SIGNATURE_VARIABLE: require_rules_signature}
    for variable, signer in signers.items():
        if signer == "":
            raise typer.BadParameter("the name of who must sign is empty; name somebody, or leave the option out")
        if signer is not None and Path(signer).exists():
            files[variable] = Path(signer)
        elif signer is not None:
            os.environ[variable] = signer
    if policy in PRESETS:
        os.environ[POLICY_VARIABLE] = policy
    elif policy is not None:
        files[POLICY_VARIABLE] = Path(policy)
    os.environ.update({name: str(path.resolve()) for name, path in files.items() if path is not None})


def chosen_policy(source: str | None, signer: str | None = None) -> Policy:
    """Return the policy that was named; none is taken for granted, and of a tuned one it is said if it is no good.

    Args:
        source: a preset's name or a file.
        signer: who must have signed the file; None: nobody.
    """
    if source is None:
        raise typer.BadParameter(f"say which policy: --policy NAME|FILE; {POLICY_CHOICES}")
    policy = Policy.load(source) if signer is None else _signed_policy(source, signer)
    if policy.provenance.beats_plain_scaling is False:
        told = printable(f"csulora: {source}: csulora tune found it no better than plain scaling")
        print(told, file=sys.stderr, flush=True)
    return policy


def _signed_policy(source: str, signer: str) -> Policy:
    from csulora.serving.signatures import Verifier

    return Verifier.open(signer).load_policy(source).policy


def parse_rank(text: str | None) -> str | int | None:
    """Return a rank as `Policy` takes it."""
    return int(text) if text is not None and text.isdecimal() and len(text) < _MOST_DIGITS else text


def numbers(text: str | None) -> list[float] | None:
    """Return the numbers of a list such as 1,0.5."""
    try:
        found = None if text is None else [float(number) for number in text.split(",")]
        if found and not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,0.5") from None
