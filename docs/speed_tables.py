"""The tables of the page on performance, from what bench/results/speed holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from page_tables import RESULTS, Record, results, table

_PROCESSORS = {"": "Xeon, AVX-512 and AMX", "_avx2": "EPYC, AVX2", "_zen4": "EPYC (Zen 4), AVX-512"}
_ITERATIONS = (2, 4, 10)  # of svd_lowrank beside a bulk
_PEERS = ("svd", "svd_lowrank", "randomized_svd")


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
    for suffix, processor in _PROCESSORS.items():
        for case in ("matrix", "tall", "experts-bulk", "experts-falling"):
            if (RESULTS / f"speed/bulk_{case}{suffix}.json").is_file():
                rows.append([processor, *_bulk_row(case, results(f"speed/bulk_{case}{suffix}"))])
    peers = [f"`svd_lowrank`, {n} iterations" for n in _ITERATIONS]
    return table(["processor", "matrices", "csulora", "`rank auto`", *peers], rows)


def _bulk_row(case: str, found: Record) -> list[str]:
    names = "csulora", *(f"svd_lowrank, {iterations} iterations" for iterations in _ITERATIONS)
    cells = [f"{found['seconds'][name]['median']:.2f} s, {found['captured_share'][name]:.1%}" for name in names]
    auto = found["seconds"].get("csulora, rank auto")
    cells.insert(1, f"{auto['median']:.2f} s" if auto else "")
    many = f"{found['matrices']} of " if found["matrices"] > 1 else ""
    spectrum = "falling" if case.endswith("falling") else "bulk"
    return [f"{many}{found['shape'][0]} x {found['shape'][1]}, k {found['rank']}, {spectrum}", *cells]


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
        for kind, spectrum in (("", "falling"), ("_bulk", "bulk")):
            name = f"speed/extraction_model_pair{kind}{suffix}"
            if (RESULTS / f"{name}.json").is_file():
                found = results(name)
                seconds = f"{found['seconds']['extract']['median']:.0f} s"
                rows.append([processor, spectrum, str(found["layers"]), seconds, f"{found['multiple_of_floor']:.2f}"])
    return table(["processor", "spectrum", "layers", "time", "multiple of the floor"], rows)


def memory() -> str:
    """Return the table of the peak memory of extraction."""
    rows = []
    for run in results("speed/memory")["runs"]:
        modules = ", ".join(f"`{pattern}`" for pattern in run["modules"]) or "all"
        multiples = run["multiples_beyond_baseline"]
        figures = [f"{multiples[name]:.2f}" for name in ("total", "anonymous")]
        rows.append([str(run["layers"]), modules, str(run["rank"]), *figures])
    return table(["layers", "modules", "rank", "peak", "of it not page cache"], rows)


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
            peers = [
                f"{seconds[name] / ours:.1f}x" if name in seconds else ""
                for name in ("other core", "lean float32", "eager float32")
            ]
            rows.append([processor, what, f"{ours:.2f} s", reading, floor, *peers, dense])
    head = ["processor", "case", "csulora", "reading", "floor", "core before", "lean PyTorch", "eager PyTorch", "dense"]
    return table(head, rows)


def busy() -> str:
    """Return the table of what takes longer where other processes compute."""
    found = results("speed/busy")
    rows = [
        [name.replace("svd_lowrank", "`svd_lowrank`, 10 iterations"), *times, f"{found['ratios'][name]:.1f}x"]
        for name in found["ratios"]
        for times in [[f"{found[state][name]['median']:.2f} s" for state in ("quiet", "busy")]]
    ]
    return table(["", "quiet", "busy", "ratio"], rows)


def vllm_load() -> str:
    """Return the table of what the guard costs vLLM."""
    rows = []
    for name, found in results("speed/vllm_load")["milliseconds"].items():
        requests = " and ".join(dict.fromkeys(str(found[kind]["requests"]) for kind in ("plain", "guarded")))
        times = [f"{found[kind][rank]:.1f}" for rank in ("p50", "p99") for kind in ("plain", "guarded")]
        what = {"load": "`/v1/load_lora_adapter`", "others": "reply of the base model during loads"}.get(name, name)
        rows.append([what, requests, *times, f"{found['ratio']['p50']:.2f}", f"{found['ratio']['p99']:.2f}"])
    times = [f"{kind}, {rank}" for rank in ("p50", "p99") for kind in ("plain", "guarded")]
    return table(["milliseconds", "requests", *times, "ratio, p50", "ratio, p99"], rows)


_GUARD_PASSES = {
    "copying": "reading and writing the files alone",
    "hashing": "hashing them twice alone",
    "correcting": "correcting in memory alone",
    "floor": "floor: the sum of these three, over the cores",
    "correct": "`csulora correct ADAPTER... -o DIR`",
    "guard": "`csulora guard`, a job for each core",
}


def guard() -> str:
    """Return the table of many adapters: adapters per second beside floors, and peak memory."""
    found: dict[tuple[str, int], Record] = {(run["what"], run["cores"]): run for run in results("speed/guard")["runs"]}
    cores = sorted({number for _, number in found})
    alone = sum(found[what, 1]["seconds"] / found[what, 1]["adapters"] for what in ("copying", "hashing", "correcting"))
    rows = []
    for what, name in _GUARD_PASSES.items():
        runs = [found.get((what, number)) for number in cores]
        rates = [
            run["adapters"] / run["seconds"] if run else number / alone for run, number in zip(runs, cores, strict=True)
        ]
        is_route = what in ("correct", "guard")
        memory = [f"{run['peak_bytes'] / 1e6:.0f} MB" if run and is_route else "" for run in runs]
        rows.append([name, *(f"{rate:.2f}" for rate in rates), *memory])
    heads = [f"{number} core{'s' if number > 1 else ''}" for number in cores]
    return table(["adapters a second", *heads, *(f"memory, {head}" for head in heads)], rows)


def guard_memory() -> str:
    """Return the table of peak memory by the number of adapters."""
    runs: dict[tuple[str, int], Record] = {
        (run["what"], run["adapters"]): run for run in results("speed/guard_memory")["runs"]
    }
    counts = sorted({count for _, count in runs})
    rows = [
        [_GUARD_PASSES[what], *(f"{runs[what, count]['peak_bytes'] / 1e6:.0f} MB" for count in counts)]
        for what in ("correct", "guard")
    ]
    return table(["peak memory", *(f"{count:,} adapters" for count in counts)], rows)


def vllm_adapter() -> str:
    """Return the table of an adapter of Llama-3-8B's shape in vLLM's own loading function."""
    document = results("speed/vllm_adapter")
    rows = []
    for what, found in document["milliseconds"].items():
        times = [f"{found[kind]['median']:.0f} ms" for kind in ("plain", "guarded")]
        rows.append([what, *times, f"{found['ratio']:.2f}"])
    alone, floor = document["alone"], document["floor"]
    rows.append(["hashing alone, on one core", "", f"{alone['hashing']:.0f} ms", ""])
    rows.append(["correcting alone, on all cores", "", f"{alone['correcting']:.0f} ms", ""])
    rows.append(
        ["floor of a first load: plain's and these two", "", f"{floor['guarded']:.0f} ms", f"{floor['ratio']:.2f}"]
    )
    rows.append(["plain's load and hashing, no correction", "", "", f"{document['hashing_ratio']:.2f}"])
    return table(["", "plain", "guarded", "ratio"], rows)


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


def tune_world() -> str:
    """Return the table of `tune` for one adapter of world (a) beside the tree before its speed was worked on."""
    rows = []
    for seed, found in results("speed/tune")["seeds"].items():
        before, after = (found["cpu_seconds"][tree]["median"] for tree in ("peer", "csulora"))
        rows.append([seed, f"{before:.0f} s", f"{after:.0f} s", f"{before / after:.1f}x"])
    return table(["seed", "before", "after", "ratio"], rows)


def tune_smollm2() -> str:
    """Return the table of `tune` for one adapter of SmolLM2 beside the tree before its speed was worked on."""
    found = results("speed/tune_smollm2")
    before, now, whole = found["cpu_seconds"]["peer"], found["cpu_seconds"]["csulora"], found["default_options"]
    rows = [
        [title, *(f"{seconds:.{digits}f} s" for seconds in times), f"{times[0] / times[1]:.1f}x"]
        for title, digits, times in (
            ("all replies", 0, (before["replies"]["median"], now["replies"]["median"])),
            ("one measurement", 1, (before["measurement"]["median"], now["measurement"]["median"])),
            ("one step", 1, (before["step"]["median"], now["step"]["median"])),
            ("default options, the first weight keeps all", 0, (whole["peer"], whole["csulora, one weight"])),
            ("default options, all weights are tried", 0, (whole["peer"], whole["csulora, all weights"])),
        )
    ]
    return table(["", "before", "now", "ratio"], rows)


def half_precision() -> str:
    """Return the table of a model's passes in bfloat16 on a CPU without instructions for it."""
    found = results("speed/half_precision")
    rows = []
    for kind, seconds in found["cpu_seconds"].items():
        times = [seconds[part]["median"] for part in ("forward", "backward")]
        logits, gradient = found["deviations"][kind]
        rows.append([kind, *(f"{time:.2f} s" for time in (*times, sum(times))), f"{logits:.3f}", f"{gradient:.3f}"])
    return table(["", "forward", "backward", "both", "logits off by", "gradient off by"], rows)
