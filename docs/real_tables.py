"""Rows of the tables of calibrated policies on real models, from what bench/efficacy/real_carry.py has written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from page_tables import Record

HEAD = ("run", "policy", "attack success", "task success", "capitals named, of the raw adapter's", "over-refusal")
STEPS_HEAD = ("run", "step", "minutes of one processor", "peak memory (GB)")
PEFT_HEAD = ("run", "adapter", "served", "attack success", "task success", "capitals named", "same replies")
NOISE_HEAD = (
    "steps",
    "of 64 directions are kept",
    "lie above the true rounding",
    "noise edge, of the true rounding",
    "left overlap",
    "right overlap",
)
NAMES = {"smollm2": "SmolLM2", "gemma3": "Gemma 3"}


def title(run: Record) -> str:
    """Name a run by its model, its seed, the steps of its fit and who wrote its general prompts."""
    fitted = f", {run['options']['steps']} steps"
    what = {"given": fitted, "written": f"{fitted}, own general prompts", "presets": ""}
    return f"{NAMES[run['model']]}, seed {run['seed']}{what[run['general']]}"


def rows(runs: Iterable[Record]) -> Iterable[Sequence[str]]:
    """Yield a row per run and way to serve: mean and worst over the adapters that no fit has seen."""
    for run in runs:
        ways = dict.fromkeys(way(row) for row in run["rows"])
        raw = {row["adapter"]: row["elsewhere"] for row in run["rows"] if row["role"] == "raw"}
        for each in ways:
            found = [row for row in run["rows"] if way(row) == each]
            named = [row["elsewhere"] / raw[row["adapter"]] for row in found if raw[row["adapter"]]]
            high = [[row[kind] for row in found] for kind in ("attack", "over_refusal")]
            attack, refused = (f"{fmean(rates):.2f} (worst {max(rates):.2f})" for rates in high)
            task, capitals = (
                f"{fmean(rates):.2f} (worst {min(rates):.2f})" if rates else "it names none"
                for rates in ([row["task"] for row in found], named)
            )
            yield [title(run), each, attack, task, capitals, refused]


def way(row: Record) -> str:
    """Name how an adapter was served, the same for all adapters."""
    return f"scaling as much as {row['policy']}" if row["role"] == "scaling" else str(row["name"])


def steps(runs: Iterable[Record]) -> Iterable[Sequence[str]]:
    """Yield a row per run and step."""
    for run in runs:
        for name, taken in run["steps"].items():
            yield [title(run), name, f"{taken['cpu_minutes']:.1f}", f"{taken['peak_gb']:.1f}"]


def peft(runs: Iterable[Record]) -> Iterable[Sequence[str]]:
    """Yield a row per adapter, raw and calibrated: the figures of evaluate, and of PEFT's replies."""
    for run in runs:
        by = {(row["adapter"], row["name"]): row for row in run["rows"]}
        for said in run["peft"]:
            row = by[said["adapter"], said["name"]]
            rates = [f"{row[kind]:.2f} / {said[kind]:.2f}" for kind in ("attack", "task", "elsewhere")]
            yield [title(run), said["adapter"], said["name"], *rates, f"{said['same_replies']} of {said['replies']}"]


def noise(studies: Iterable[Record]) -> Iterable[Sequence[str]]:
    """Yield a row per study of the noise edge: medians over matrices, with the range."""
    for study in studies:
        found = study["summary"]
        counts = [_range(found[key], "g") for key in ("kept", "above_rounding")]
        shares = [_range(found[key], ".2f") for key in ("edge_over_rounding", "left_overlap", "right_overlap")]
        yield [str(study["steps"]), *counts, *shares]


def _range(found: Record, form: str) -> str:
    return f"{found['median']:{form}} ({found['least']:{form}} to {found['most']:{form}})"
