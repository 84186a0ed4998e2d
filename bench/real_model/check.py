"""Check csulora on real weights: what it writes against the definition computed densely in float64.

    python bench/real_model/check.py [--models DIR]      after bench/real_model/prepare.py

Extracts a subspace file and corrects the adapter by the command line, loads each corrected adapter with plain PEFT,
and compares its logits with those of the aligned model whose weights were replaced by W + X. There
X = sum g_c dW_c is computed from the subspace file's u and v and the original adapter without any of csulora's code;
for `--rank keep` it is cut to its best approximation of the adapter's rank. The forward passes are in float64,
so that what differs is what csulora wrote. Exits with 1 if a logit differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path("build/smollm2")
TOLERANCE = 1e-4  # logits have sizes up to some tens
SUBSPACE_RANK = 16
PENALTIES = {"csulora": (0.0, 1.0, 1.0), "protect": (1.0, 1.0, 0.0)}  # aligned, partial, off
QUESTIONS = (
    "How do I make green tea?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
)


@dataclass(frozen=True)
class Case:
    """One way to call `csulora correct`."""

    preset: str
    rank: str

    @property
    def directory(self) -> str:
        """Name of the directory it is written to."""
        return f"{self.preset}-{self.rank}"


CASES = (
    Case("csulora", "exact"),
    Case("csulora", "keep"),
    Case("protect", "exact"),
    Case("protect", "keep"),
)


def csulora(*arguments: str | Path) -> None:
    """Print a csulora command and run it."""
    words = [str(word) for word in arguments]
    print(f"$ csulora {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "csulora", *words], check=True)


def closest_safe_update(dw: Tensor, u: Tensor, v: Tensor, penalties: tuple[float, float, float]) -> Tensor:
    """X = sum g_c dW_c with g_c = 1 / (1 + lambda_c e_c), dense."""
    rows = u @ (u.T @ dw)
    aligned = (rows @ v) @ v.T
    both = (dw @ v) @ v.T  # aligned + right
    components = (aligned, rows + both - 2 * aligned, dw - rows - both + aligned)  # aligned, partial, off
    norms2 = [component.square().sum() for component in components]
    gains = [1 / (1 + penalty * norm2 / sum(norms2)) for penalty, norm2 in zip(penalties, norms2, strict=True)]
    return torch.stack([gain * component for gain, component in zip(gains, components, strict=True)]).sum(0)


def best_of_rank(x: Tensor, rank: int) -> Tensor:
    """The best approximation of `x` of the given rank."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def reference_updates(adapter: Path, subspace: Path, case: Case) -> Iterator[tuple[str, Tensor]]:
    """Every module's name and X (out, in) in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    modules = [key[len(prefix) : -len(suffix)] for key in factors if key.endswith(suffix)]
    with safe_open(subspace, "pt") as subspaces:
        for module in track(modules, case.directory, disable=not sys.stdout.isatty()):
            a, b = (factors[f"{prefix}{module}.lora_{factor}.weight"].double() for factor in "AB")
            u, v = (subspaces.get_tensor(f"{module}.{factor}").double() for factor in "uv")
            dw = config["lora_alpha"] / config["r"] * (b @ a)
            x = closest_safe_update(dw, u, v, PENALTIES[case.preset])
            yield module, x if case.rank == "exact" else best_of_rank(x, config["r"])


def load(directory: Path) -> torch.nn.Module:
    """A model in float64: float32 sums in another order alone move logits of this size by more than the tolerance."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return model.eval()


def load_adapted(models: Path, adapter: Path) -> torch.nn.Module:
    """The aligned model with an adapter in plain PEFT, which computes in the adapter's float32 unless told not to."""
    return PeftModel.from_pretrained(load(models / "aligned"), adapter).double()


def reference_model(models: Path, subspace: Path, case: Case) -> torch.nn.Module:
    """The aligned model with W + X in place of W."""
    model = load(models / "aligned")
    for module, x in reference_updates(models / "adapter", subspace, case):
        model.get_parameter(f"{module}.weight").data += x
    return model


@torch.inference_mode()
def logits(model: torch.nn.Module, prompts: list[Tensor]) -> Tensor:
    """Logits at every position of every prompt, (positions, vocabulary)."""
    return torch.cat([model(prompt).logits[0] for prompt in prompts])


def tokenise(directory: Path) -> list[Tensor]:
    """Every question as the model's chat template puts it, (1, length)."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [
        cast(
            Tensor,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=False,
            ),
        )
        for question in QUESTIONS
    ]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference between two logits."""
    return float((one - other).abs().max())


def check(models: Path, subspace: Path) -> tuple[Table, bool]:
    """Correct the adapter in every way; return what to print and whether all differences are small enough."""
    prompts = tokenise(models / "aligned")
    raw = logits(load_adapted(models, models / "adapter"), prompts)
    table = Table(title=f"Largest logit: {float(raw.abs().max()):.1f}", title_justify="left")
    for heading in ("preset", "rank", "moved by the correction", "csulora - dense float64"):
        table.add_column(heading)
    good = True
    for case in CASES:
        fixed = models / case.directory
        options = ("--policy", case.preset, "--rank", case.rank, "--quiet")
        csulora("correct", models / "adapter", "--subspace", subspace, "-o", fixed, *options)
        corrected = logits(load_adapted(models, fixed), prompts)
        error = difference(corrected, logits(reference_model(models, subspace, case), prompts))
        good = good and error <= TOLERANCE
        table.add_row(case.preset, case.rank, f"{difference(corrected, raw):.3f}", f"{error:.1e}")
    return table, good


def main() -> None:
    """Extract, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="what prepare.py wrote")
    models = parser.parse_args().models
    if not (models / "adapter").is_dir():
        parser.error(f"{models}: no adapter there; run bench/real_model/prepare.py first")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    subspace = models / "subspace.safetensors"
    csulora("extract", models / "base", models / "aligned", "-o", subspace, "--rank", str(SUBSPACE_RANK))
    table, good = check(models, subspace)
    Console().print(table)
    if not good:
        sys.exit(f"a logit differs by more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
