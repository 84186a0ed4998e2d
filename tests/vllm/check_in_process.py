"""What can be shown of a vLLM that needs a device to serve: its own classes, in one process, on the CPU.

Run by `make check-vllm`. CSULORA_RECORD names a JSON file to which the figures are written.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import TOLERANCE

Effects = dict[str, list[float]]

FRONT_END = ["add_request", "add_lora", "reload_after_eviction", "async_add_request", "async_add_lora"]
FRONT_END += ["load_lora_adapter", "load_in_place", "resolve_lora", "init_static_loras"]
PAST_IT = ["add_adapter", "set_active_adapters", "from_local_checkpoint", "from_lora_tensors"]


def deviation(found: Effects, expected: Effects) -> float:
    assert found.keys() == expected.keys()
    return max(abs(a - b) for name in found for a, b in zip(found[name], expected[name], strict=True))


@pytest.fixture(scope="module")
def found(files: SimpleNamespace) -> dict:
    """What `in_process.py` found."""
    named = files.root / "every"
    named.mkdir()
    for path in (*files.raw.values(), *files.bad.values()):
        (named / path.name).symlink_to(path)
    request = files.root / "in-process.json"
    request.write_text(
        json.dumps(
            {
                "model": str(files.model),
                "plain": [str(path) for path in (*files.raw.values(), *files.corrected.values())],
                "guarded": [str(path) for path in files.raw.values()],
                "bad": [str(path) for path in files.bad.values()],
            }
        )
    )
    script = Path(__file__).with_name("in_process.py")
    variables = {"CSULORA_SUBSPACE": str(files.subspace), "CSULORA_ADAPTERS": str(named)}
    run = subprocess.run(
        [sys.executable, script, request], capture_output=True, text=True, check=False, env=os.environ | variables
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULTS ")]
    assert len(lines) == 1, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads(lines[0].removeprefix("RESULTS "))
    if record := os.environ.get("CSULORA_RECORD"):
        Path(record).write_text(json.dumps(figures(results, files), indent=2) + "\n")
    return results


def figures(results: dict, files: SimpleNamespace) -> dict:
    """Return the largest deviations of the layers' outputs, and how many adapters each route refused."""

    def largest(route: dict, expected: dict[str, Path], choose) -> float:
        return choose(deviation(route[str(files.raw[n])], results["plain"][str(p)]) for n, p in expected.items())

    return results["versions"] | {
        "layers": len(next(iter(results["plain"].values()))),
        "front_end": {
            name: {
                "largest_deviation_from_corrected": largest(route, files.corrected, max),
                "smallest_deviation_from_raw": largest(route, files.raw, min),
                "bad_adapters_refused": sum(isinstance(route[str(path)], str) for path in files.bad.values()),
                "of": len(files.bad),
            }
            for name, route in results["guarded"].items()
        },
        "past_the_front_end": {
            name: {"raw_adapters_refused": sum(isinstance(answer, str) for answer in way.values()), "of": len(way)}
            for name, way in results["worker"].items()
        },
    }


def test_every_route_and_way_was_taken(found: dict) -> None:
    assert list(found["guarded"]) == FRONT_END
    assert list(found["worker"]) == PAST_IT


@pytest.mark.parametrize("route", FRONT_END)
@pytest.mark.parametrize("name", ["one", "two"])
def test_layers_have_the_corrected_adapter(route: str, name: str, found: dict, files: SimpleNamespace) -> None:
    effects = found["guarded"][route][str(files.raw[name])]
    assert not isinstance(effects, str), effects

    assert deviation(effects, found["plain"][str(files.corrected[name])]) < TOLERANCE
    assert deviation(effects, found["plain"][str(files.raw[name])]) > 20 * TOLERANCE


@pytest.mark.parametrize("route", FRONT_END)
def test_refusals_say_who_refuses_and_why(route: str, found: dict, files: SimpleNamespace) -> None:
    for name, path in files.bad.items():
        answer = found["guarded"][route][str(path)]
        assert re.match(r"(VLLMValidationError|ValueError): (400: )?csulora: ", answer), answer
        assert files.reasons[name] in answer


@pytest.mark.parametrize("way", PAST_IT)
def test_raw_adapters_do_not_get_past_the_front_end(way: str, found: dict) -> None:
    for answer in found["worker"][way].values():
        assert answer.startswith("RefusedError: csulora: "), answer
        assert "nothing was loaded" in answer


def starts(files: SimpleNamespace, *options: str, before: str = "pass", **variables: str) -> str:
    """Start the server where there is no device, and return what it said before it ended."""
    arguments = ["vllm-serve", str(files.model), "--enable-lora", "--max-lora-rank", "16", *options]
    code = f"import sys; {before}; sys.argv = ['csulora', *{arguments!r}]; from csulora.cli.app import main; main()"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert run.returncode != 0
    return run.stdout + run.stderr


def test_server_starts_as_far_as_its_device(files: SimpleNamespace) -> None:
    log = "import logging; logging.basicConfig(level=logging.INFO)"  # vLLM shows nothing before it has a device
    output = starts(files, "--subspace", str(files.subspace), before=log)

    assert "csulora guards this process" in output
    assert "Failed to infer device type" in output


@pytest.mark.parametrize(
    ("before", "variables", "reason"),
    [
        ("import vllm; vllm.__version__ = '0.34.0'", {}, "vLLM 0.32 and 0.33, and this is 0.34.0"),
        ("pass", {"VLLM_PLUGINS": "another"}, "leaves csulora out"),
        ("pass", {"VLLM_USE_RUST_FRONTEND": "1"}, "Rust front end"),
    ],
)
def test_server_does_not_start(before: str, variables: dict[str, str], reason: str, files: SimpleNamespace) -> None:
    output = starts(files, "--subspace", str(files.subspace), before=before, **variables)

    assert reason in " ".join(output.split())
    assert "Failed to infer device type" not in output


def test_server_without_a_subspace_does_not_start(files: SimpleNamespace) -> None:
    absent = str(files.root / "absent.safetensors")

    assert "CSULORA_SUBSPACE is not set" in starts(files)
    assert "absent.safetensors" in starts(files, "--subspace", absent)
