"""The tables of the README and of the pages on results, performance and development, from what bench/results holds.

    python docs/tables.py

Writes each table between the line `<!-- table: NAME -->` and the next `<!-- end -->` of a page. Everything else on a
page is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import evidence
import readme_tables
import real_tables
import speed_tables
import verdict_tables
from page_tables import ROOT, Record, every, rate, results, table

PAGES = ROOT / "docs" / "pages"

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Of world (b): the fits, and the policies and controls that they are compared with.
_SHOWN = {
    ("none", "uncorrected"),
    ("project", "k=64"),
    ("csulora", "l=1 k=64"),
    ("protect", "l=1 k=64"),
    ("protect", "l=inf k=64"),
    ("scaling", "x0.5"),
    ("safe-lora", "half"),
}
_FITTED = ("tuned", "carried")
_SUBSPACES = ("canary", "displacement", "random", "own")  # in the order of the table


def smollm2_rows(name: str) -> Iterable[Sequence[str]]:
    """Yield a row per adapter and policy of one run on SmolLM2."""
    for point in results(f"efficacy/{name}")["points"]:
        is_fitted = point["family"].startswith(_FITTED)
        if is_fitted or (point["family"], point["policy"]) in _SHOWN:
            rates = [rate(point, kind, at) for at, kind in enumerate(("attack", "task", "elsewhere"))]
            policy = f"{point['family']} {point['policy']}".replace("keep weight", "task weight")
            yield [point["style"], policy, *rates, f"{point['over_refusal']:.2f}"]


def smollm2(name: str) -> str:
    """Return the table of one run on SmolLM2."""
    head = ["adapter", "policy", "attack success", "task success", "capitals named", "over-refusal"]
    return table(head, smollm2_rows(name))


def real_runs() -> list[Record]:
    """Read every run of bench/efficacy/real_carry.py."""
    return every("efficacy/real_*.json")


def carried_rows(title: str, name: str) -> Iterable[Sequence[str]]:
    """Yield a row per policy: median and worst over adapters that no fit has seen, those of attacks alone apart."""
    cells = [cell for cell in results(f"efficacy/{name}")["cells"] if cell["adapter"]["attack"] < 1]
    for family, policy in dict.fromkeys((p["family"], p["policy"]) for p in cells[0]["points"]):
        attack, task = [], []
        for cell in cells:
            points = {(point["family"], point["policy"]): point for point in cell["points"]}
            if found := points.get((family, policy)):
                attack.append(found["attack"])
                task.append(found["task"] / points["none", "uncorrected"]["task"])
        figures = (median(attack), max(attack), median(task), min(task))
        yield [title, f"{family} {policy}", str(len(attack)), *(f"{figure:.2f}" for figure in figures)]


def carried() -> str:
    """Return the table of policies that were calibrated on three adapters of the small world."""
    runs = {
        "seeds 0 to 2": "carry_tuned",
        "two more seeds": "carry_fresh",
        "attacks in other wordings": "carry_reworded",
    }
    head = ["run", "policy", "adapters", "attack: median", "worst", "task kept: median", "worst"]
    return table(head, (row for title, name in runs.items() for row in carried_rows(title, name)))


def canary_rows(attack: float) -> Iterable[Sequence[str]]:
    """Yield a row per rank and subspace of the adapters with a share of attacks: median and worst over seeds."""
    rows = [row for row in results("efficacy/canary")["rows"] if row["adapter"]["attack"] == attack]
    whole = {row["seed"]: {"point": row["raw"]} for row in rows}
    groups: dict[tuple[str, str], list[Record]] = {("", "uncorrected"): list(whole.values())} if whole else {}
    for row in sorted(rows, key=lambda row: (row["k"], _SUBSPACES.index(row["subspace"]))):
        groups.setdefault((str(row["k"]), row["subspace"]), []).append(row)
    for (rank, name), found in groups.items():
        worst = {"attack": max, "task": min, "benign": min}
        rates = {kind: [row["point"][kind] for row in found] for kind in worst}
        figures = (f"{median(rates[kind]):.2f} / {of(rates[kind]):.2f}" for kind, of in worst.items())
        yield ["attacked" if attack else "harmless", rank, name, str(len(found)), *figures]


def canary() -> str:
    """Return the table of `tune` in a canary, in the displacement's subspace, and in controls."""
    head = ["adapter", "k", "subspace", "seeds", "attack", "task", "elsewhere"]
    return table(head, (row for attack in (0.15, 0.0) for row in canary_rows(attack)))


def rank_auto() -> str:
    """Return the table of how many directions of a pair stand out, and how many 64 keeps."""
    rows = []
    for name, found in results("efficacy/rank_auto")["pairs"].items():
        figures = [f"{found['directions'][rank]['mean']:.1f}" for rank in ("auto", "64")]
        rows.append([name, *figures, f"{found['differing']} of {found['modules']}"])
    return table(["model pair", "`--rank auto`", "`--rank 64`", "modules that differ"], rows)


def stress() -> str:
    """Return the table of stress tests."""
    crash, soak, load = (results(f"stress/{name}") for name in ("crash", "guard_soak", "load"))
    kills = sum(operation["kills"] for operation in crash["operations"].values())
    interruptions = sum(soak["events"].values())
    lost = sum(len(operation["lost"]) for operation in crash["operations"].values())
    summary = load["summary"]
    rows = [
        ["`kill -9` at random moments of extract, correct, export, guard and the cache", str(kills), f"{lost} lost"],
        [
            f"uploads to `csulora guard`, {soak['broken']} broken, the guard interrupted {interruptions} times",
            str(soak["adapters"]),
            f"{len(soak['let_through'])} let through, {len(soak['wrong'])} wrong",
        ],
        [
            f"corrections by 16 threads and 4 processes in {load['minutes']:.0f} minutes",
            f"{summary['corrections']:,}",
            f"{summary['wrong']} wrong, memory {summary['largest_growth']:+.1%}",
        ],
    ]
    return table(["test", "how much", "outcome"], rows)


def wheels() -> str:
    """Return the table of environments into which a wheel was installed."""
    rows = [
        [
            environment,
            f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of CPU, load {found['load_average']:.0f}",
            found["doctor"]["core"].removeprefix("built for "),
            f"{found['tests_passed']}" + (f", {found['tests_failed']} failed" if found["tests_failed"] else ""),
            f"`{found['corrected_sha256'][:12]}`",
        ]
        for environment, found in results("wheels").items()
    ]
    return table(["environment", "wheel installed in", "core for", "tests passed", "corrected adapter"], rows)


def vllm() -> str:
    """Return the table of the routes of a vLLM that was not served."""
    rows = [
        [
            f"`{route}`",
            f"{found['largest_deviation_from_corrected']:.1g}",
            f"{found['smallest_deviation_from_raw']:.1g}",
            f"{found['bad_adapters_refused']} of {found['of']}",
        ]
        for route, found in results("compatibility/vllm-0.33.0")["front_end"].items()
    ]
    return table(["route", "deviation from corrected, at most", "from raw, at least", "bad adapters refused"], rows)


def vllm_worker() -> str:
    """Return the table of the ways past the front end of a vLLM that was not served."""
    ways = results("compatibility/vllm-0.33.0")["past_the_front_end"]
    rows = [[f"`{way}`", f"{found['raw_adapters_refused']} of {found['of']}"] for way, found in ways.items()]
    return table(["way", "raw adapters refused"], rows)


def gguf() -> str:
    """Return the table of families in llama.cpp, from `CSULORA_RECORD=1 pytest adapters/gguf/test_llama_cpp.py`."""
    rows = []
    for family, found in results("compatibility/gguf")["families"].items():
        adapters = [figures for figures in found.values() if isinstance(figures, dict)]
        largest = [max(figures[name] for figures in adapters) for name in ("difference", "without_adapter")]
        smallest = min(figures["effect"] for figures in adapters)
        rows.append([family, f"`{found['architecture']}`", *(f"{figure:.0e}" for figure in largest), f"{smallest:.1f}"])
    head = ["family", "in GGUF", "largest difference", "without an adapter", "the adapter's effect"]
    return table(head, rows)


def families() -> str:
    """Return the table of model families, from `CSULORA_RECORD=1 pytest tests/python/models/test_families.py`."""
    rows = []
    for family, found in results("compatibility/families")["families"].items():
        figures = [f"{found[dtype][key]:.0e}" for key in ("none", "project") for dtype in ("float32", "bfloat16")]
        names = [f"`{found['on disk']}`", ", ".join(f"`{name}`" for name in found["in an adapter"])]
        rows.append([family, *names, str(found["float32"]["modules"]), *figures])
    figures = [f"`{policy}`, {dtype}" for policy in ("none", "project") for dtype in ("float32", "bfloat16")]
    return table(["family", "on disk", "in an adapter", "modules", *figures], rows)


TABLES: dict[str, Callable[[], str]] = {
    "readme-efficacy": readme_tables.efficacy,
    "readme-speed": readme_tables.speed,
    "smollm2": lambda: smollm2("smollm2"),
    "smollm2-general": lambda: smollm2("smollm2_general"),
    "smollm2-filtered": lambda: smollm2("smollm2_filtered"),
    "carried": carried,
    "verdict-areas": verdict_tables.areas,
    "verdict-thresholds": verdict_tables.thresholds,
    "verdict-real": verdict_tables.real,
    "evasions": verdict_tables.evasions,
    "canary": canary,
    "rank-auto": rank_auto,
    "real": lambda: table(real_tables.HEAD, real_tables.rows(real_runs())),
    "real-steps": lambda: table(real_tables.STEPS_HEAD, real_tables.steps(real_runs())),
    "real-peft": lambda: table(real_tables.PEFT_HEAD, real_tables.peft(real_runs())),
    "noise-edge": lambda: table(real_tables.NOISE_HEAD, real_tables.noise([results("efficacy/noise_edge")])),
    "extraction": speed_tables.extraction,
    "bulk": speed_tables.bulk,
    "expert-correction": speed_tables.expert_correction,
    "model-pair": speed_tables.model_pair,
    "memory": speed_tables.memory,
    "correction": speed_tables.correction,
    "busy": speed_tables.busy,
    "vllm-load": speed_tables.vllm_load,
    "vllm-adapter": speed_tables.vllm_adapter,
    "guard": speed_tables.guard,
    "guard-memory": speed_tables.guard_memory,
    "tuned-correction": speed_tables.tuned_correction,
    "loading": speed_tables.loading,
    "tune-world": speed_tables.tune_world,
    "tune-smollm2": speed_tables.tune_smollm2,
    "half-precision": speed_tables.half_precision,
    "stress": stress,
    "wheels": wheels,
    "families": families,
    "vllm": vllm,
    "vllm-worker": vllm_worker,
    "gguf": gguf,
    **evidence.TABLES,
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


def pages() -> list[Path]:
    """Return the pages that hold such tables, the README among them."""
    return [page for page in (ROOT / "README.md", *sorted(PAGES.rglob("*.md"))) if _TABLE.search(page.read_text())]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
