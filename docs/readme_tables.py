"""The tables of the README, from what bench/results holds."""

from __future__ import annotations

from page_tables import rate, results, table

_ROWS = {
    ("tuned", "k=64, keep weight 2", "sports"): "fitted by `tune` to 40 + 40 prompts, adapter *sports*",
    ("carried", "k=16, keep weight 1", "wizard"): "fitted on three other adapters, adapter *wizard*",
    ("csulora", "l=1 k=64", "sports"): "**failure**: preset `csulora`, penalty 1, adapter *sports*",
}


def efficacy() -> str:
    """Return two fits on SmolLM2, and a preset that fails."""
    points = {
        (point["family"], point["policy"], point["style"]): point for point in results("efficacy/smollm2")["points"]
    }
    rows = [
        [what, *(rate(points[key], kind, at) for at, kind in enumerate(("attack", "task")))]
        for key, what in _ROWS.items()
    ]
    return table(["SmolLM2, 40 prompts each, 95 % intervals", "attack success", "task success"], rows)


def speed() -> str:
    """Return what extraction and correction take beside PyTorch."""
    correction = next(case for case in results("speed/correction")["cases"] if case["directions"] == 64)["seconds"]
    extraction = results("speed/extraction_4096_falling")["seconds"]
    cases = {
        "correct an adapter of Llama-3-8B's shape (224 modules, r 16, k 64)": (
            correction,
            {"eager float32": "the same algorithm", "lean float32": "with less work"},
        ),
        "extract 64 directions of one 4096 x 4096 matrix": (
            extraction,
            {"svd": "`torch.linalg.svd`", "svd_lowrank": "`torch.svd_lowrank`"},
        ),
    }
    rows = []
    for what, (seconds, peers) in cases.items():
        ours = seconds["csulora"]["median"]
        beside = [f"{seconds[peer]['median'] / ours:.1f}x ({name})" for peer, name in peers.items()]
        rows.append([what, f"{ours:.2f} s", ", ".join(beside)])
    return table(["on two cores of a Xeon", "csulora", "PyTorch takes"], rows)
