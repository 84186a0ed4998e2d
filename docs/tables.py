"""The tables of the pages on results, performance and development, from what bench/results holds.

    python docs/tables.py

Writes each table between the line `<!-- table: NAME -->` and the next `<!-- end -->` of a page. Everything else on a
page is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import evidence
import real_tables
import verdict_tables
from page_tables import RESULTS, ROOT, Record, rate, results, table

PAGES = ROOT / "docs" / "pages"

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PROCESSORS = {"": "Xeon, AVX-512 and AMX", "_avx2": "EPYC, AVX2", "_zen4": "EPYC (Zen 4), AVX-512"}
_PEERS = ("svd", "svd_lowrank", "randomized_svd")
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
    return [json.loads(file.read_text()) for file in sorted((RESULTS / "efficacy").glob("real_*.json"))]


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


def extraction_rows() -> Iterable[Sequence[str]]:
    """Yield a row per matrix and processor."""
    for suffix, processor in _PROCESSORS.items():
        for file in sorted((RESULTS / "speed").glob(f"extraction_[0-9]*_[a-z]*{suffix}.json")):
            if not suffix and file.stem.endswith(tuple(filter(None, _PROCESSORS))):
                continue
            found = json.loads(file.read_text())
            seconds = {name: times["median"] for name, times in found["seconds"].items()}
            spectrum = {"floor": "noise floor", "falling": "falling spectrum"}[found["spectrum"]]
            what = f"{found['rows']} x {found['columns']}, {spectrum}"
            ratios = [f"{seconds[peer] / seconds['csulora']:.1f}x" for peer in _PEERS]
            yield [processor, what, f"{seconds['csulora']:.2f} s", *ratios]


def extraction() -> str:
    """Return the table of extraction beside its peers."""
    head = ["processor", "matrix", "csulora", "`torch.linalg.svd`", "`torch.svd_lowrank`", "sklearn `randomized_svd`"]
    return table(head, extraction_rows())


def bulk() -> str:
    """Return the table of extraction where a bulk follows what stands out."""
    rows = []
    for case in ("matrix", "tall", "experts-bulk", "experts-falling"):
        found = results(f"speed/bulk_{case}")
        cells = [
            f"{found['seconds'][name]['median']:.2f} s, {found['captured_share'][name]:.1%}"
            for name in ("csulora", *(f"svd_lowrank, {iterations} iterations" for iterations in (2, 4, 10)))
        ]
        many = f"{found['matrices']} of " if found["matrices"] > 1 else ""
        spectrum = "falling" if case.endswith("falling") else "bulk"
        rows.append([f"{many}{found['shape'][0]} x {found['shape'][1]}, k {found['rank']}, {spectrum}", *cells])
    return table(["matrices", "csulora", *(f"`svd_lowrank`, {n} iterations" for n in (2, 4, 10))], rows)


def expert_correction() -> str:
    """Return the table of the correction of all experts of a large model."""
    rows = []
    for layout, steps in results("speed/expert_correction")["runs"].items():
        seconds = [f"{steps[name]['clock_seconds']['median']:.1f} s" for name in ("correct, first", "correct, later")]
        rows.append([layout, *seconds, f"{steps['correct, later']['cpu_seconds']['median']:.0f} s"])
    return table(["factors", "first correction", "later ones", "processor time"], rows)


def model_pair() -> str:
    """Return the table of the extraction of whole layers from disk."""
    rows = []
    for suffix, processor in _PROCESSORS.items():
        name = f"speed/extraction_model_pair{suffix}"
        if (RESULTS / f"{name}.json").is_file():
            found = results(name)
            seconds = f"{found['seconds']['extract']['median']:.0f} s"
            rows.append([processor, str(found["layers"]), seconds, f"{found['multiple_of_floor']:.2f}"])
    return table(["processor", "layers", "time", "multiple of the floor"], rows)


def correction() -> str:
    """Return the table of corrections with penalties."""
    rows = []
    for suffix, processor in _PROCESSORS.items():
        found = results(f"speed/correction{suffix}")
        for case in found["cases"]:
            seconds = {name: times["median"] for name, times in case["seconds"].items()}
            ours = seconds["csulora"]
            dense = f"{found['dense_seconds']['dense'] / ours:.0f}x" if case["rank"] == 16 else ""
            floor = f"{ours / case['floor_seconds']:.1f}" if "floor_seconds" in case else ""
            what = f"r {case['rank']}, k {case['directions']}"
            reading = f"{ours / seconds['read']:.1f}"
            eager = f"{seconds['eager float32'] / ours:.1f}x"
            rows.append([processor, what, f"{ours:.2f} s", reading, floor, eager, dense])
    head = ["processor", "case", "csulora", "multiple of reading", "multiple of the floor", "eager PyTorch", "dense"]
    return table(head, rows)


def tuned_correction() -> str:
    """Return the table of corrections with policies that `tune` writes."""
    kinds = {
        "csulora": "penalties",
        "csulora, 64 directions": "64 directions",
        "csulora, 16 directions and reinforcing": "16 directions, reinforced",
        "csulora, the same with input filters": "the same, filtered",
    }
    rows = []
    for suffix, processor in _PROCESSORS.items():
        for case in results(f"speed/correction{suffix}")["cases"]:
            times = [case["seconds"].get(kind) for kind in kinds]
            figures = [f"{time['median']:.2f} s" if time else "" for time in times]
            rows.append([processor, f"r {case['rank']}, k {case['directions']}", *figures])
    return table(["processor", "case", *kinds.values()], rows)


def loading() -> str:
    """Return the table of PEFT's load with and without the guard."""
    rows = []
    for shape in ("llama-3-8b", "tiny"):
        found = results(f"speed/peft_load_{shape}")
        plain, guarded = found["median_plain_seconds"], found["median_guarded_seconds"]
        modules = f"{shape}, {found['modules']} modules, r {found['rank']}"
        rows.append([modules, f"{plain * 1000:.0f} ms", f"{guarded * 1000:.0f} ms"])
    return table(["adapter", "PEFT", "PEFT under the guard"], rows)


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
    "smollm2": lambda: smollm2("smollm2"),
    "smollm2-general": lambda: smollm2("smollm2_general"),
    "smollm2-filtered": lambda: smollm2("smollm2_filtered"),
    "carried": carried,
    "verdict-areas": verdict_tables.areas,
    "verdict-thresholds": verdict_tables.thresholds,
    "evasions": verdict_tables.evasions,
    "canary": canary,
    "real": lambda: table(real_tables.HEAD, real_tables.rows(real_runs())),
    "real-steps": lambda: table(real_tables.STEPS_HEAD, real_tables.steps(real_runs())),
    "real-peft": lambda: table(real_tables.PEFT_HEAD, real_tables.peft(real_runs())),
    "noise-edge": lambda: table(real_tables.NOISE_HEAD, real_tables.noise([results("efficacy/noise_edge")])),
    "extraction": extraction,
    "bulk": bulk,
    "expert-correction": expert_correction,
    "model-pair": model_pair,
    "correction": correction,
    "tuned-correction": tuned_correction,
    "loading": loading,
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
    """Return the pages that hold such tables."""
    return [page for page in sorted(PAGES.rglob("*.md")) if _TABLE.search(page.read_text())]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
