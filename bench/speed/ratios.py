"""Print the ratios that bench/results/speed holds, and draw how a correction's time grows.

python bench/speed/ratios.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import RESULTS


def load(pattern: str) -> list[dict[str, Any]]:
    """Return the results of a benchmark on every machine where it ran."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{pattern}.json"))]


def machine(results: dict[str, Any]) -> str:
    """Return what distinguishes the machine that results come from."""
    return f"{results['machine']['cpu']}, {results['machine']['capability']}"


def extraction_rows() -> list[tuple[str, str]]:
    """Return what to say of single matrices."""
    rows = []
    for results in load("extraction_[0-9]*"):
        shape = f"{results['rows']} x {results['columns']}"
        what = f"{machine(results)}: extraction, {shape}, k 64, {results['spectrum']}"
        for ours in ("csulora", "csulora, defaults"):
            median = results["seconds"][ours]["median"]
            ratios = ", ".join(
                f"{results['seconds'][peer]['median'] / median:.1f}x {peer}"
                for peer in ("svd", "svd_lowrank", "randomized_svd")
                if peer in results["seconds"]
            )
            share = results["share_of_gemm_rate"][ours]
            figures = f"{median:.2f} s: {ratios}; {share:.0%} of the GEMM rate"
            if "floor_seconds" in results:
                figures += f", {median / results['floor_seconds'][ours]:.1f} times the floor"
            rows.append((f"{what}, {ours}", figures))
    return rows


def model_pair_rows() -> list[tuple[str, str]]:
    """Return what to say of checkpoints."""
    rows = []
    for results in load("extraction_model_pair*"):
        what = f"{machine(results)}: extraction of {results['layers']} layers of Llama-3-8B's shape from disk"
        median = results["seconds"]["extract"]["median"]
        rows.append((what, f"{median:.1f} s: {results['multiple_of_floor']:.2f} times the floor"))
    return rows


def correction_rows() -> list[tuple[str, str]]:
    """Return what to say of corrections."""
    rows = []
    for results in load("correction*"):
        for case in results["cases"]:
            rows += correction_case_rows(case, results)
    return rows


def correction_case_rows(case: dict[str, Any], results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what to say of one rank and number of directions on one machine."""
    medians = {name: times["median"] for name, times in case["seconds"].items()}
    ours = medians.pop("csulora")
    ratios = [f"{medians[name] / ours:.1f}x {name} PyTorch" for name in ("eager float32", "eager float64")]
    if case["rank"] == 16:
        ratios += [f"{seconds / ours:.0f}x {name}" for name, seconds in results["dense_seconds"].items()]
    ratios.append(f"{ours / medians['read']:.1f} times reading the files")
    if "floor_seconds" in case:
        ratios.append(f"{ours / case['floor_seconds']:.1f} times the floor")
    modules, rank, directions = results["modules"], case["rank"], case["directions"]
    what = f"{machine(results)}: correction of {modules} modules, r {rank}, k {directions}"
    along = [name for name in medians if name.startswith("csulora, ")]
    return [
        (what, f"{ours:.3f} s: {', '.join(ratios)}"),
        *((f"{what}, {name}", f"{medians[name]:.3f} s") for name in along),
    ]


def draw(file: Path) -> None:
    """Plot time against directions and against layers, with the line of least squares."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    found = load("correction")
    if not found:
        raise SystemExit("bench/results/speed/correction.json is missing; run bench/speed/correction.py")
    (results,) = found
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, (key, series) in zip(axes, (("directions", "by_directions"), ("layers", "by_layers")), strict=True):
        x = np.array([point[key] for point in results[series]])
        y = np.array([point["seconds"]["median"] for point in results[series]])
        slope, intercept = np.polyfit(x, y, 1)
        axis.plot(x, y, "o", x, slope * x + intercept, "-")
        axis.set(xlabel=key, ylabel="seconds", ylim=(0, None), xlim=(0, None))
    figure.suptitle("Correction, r 16: 8 layers (left), 64 directions (right)")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Print the table, and draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw the growth of a correction's time into this file")
    arguments = parser.parse_args()
    for what, figures in (*extraction_rows(), *model_pair_rows(), *correction_rows()):
        print(f"| {what} | {figures} |")
    if arguments.plot:
        draw(arguments.plot)


if __name__ == "__main__":
    main()
