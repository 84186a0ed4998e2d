"""Install a wheel of csulora beside one torch in a fresh environment, and see whether it works there.

    python .ci/try_wheel.py --python python3.13 --torch 2.15.0 [--tests tests/python/native ...] [--record FILE]

Everything is done with the installed wheel; of the source tree only the tests and a small model pair are used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "bench" / "efficacy" / "fixture"
TESTS = ["tests/python/native", "tests/python/subspace", "tests/python/correction"]
TOOLS = ("hypothesis", "jsonschema", "peft", "pytest", "transformers")


def main() -> None:
    """Install, check, correct an adapter, run the tests; end with 1 unless all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environment")
    parser.add_argument("--torch", default="2.13.0", help="the version of torch")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="the directory of the wheels")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    parser.add_argument("--record", type=Path, help="a JSON file in which to replace this environment's entry")
    arguments = parser.parse_args()
    environment = Environment(arguments.python, arguments.torch)
    found = {
        **environment.install(arguments.wheels),
        **environment.doctor(),
        **environment.correct(),
        **environment.test(arguments.tests),
    }
    print(json.dumps({environment.name: found}, indent=2))
    if arguments.record:
        record(arguments.record, environment.name, found)
    sys.exit(0 if found["torch_untouched"] and found["works"] and not found["tests_failed"] else 1)


class Environment:
    """A fresh environment with one Python and one torch."""

    def __init__(self, python: str, torch: str) -> None:
        """Make it and install torch, and nothing else."""
        version = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], **_TEXT)
        self.python_version = version.stdout.strip()
        self.name = f"Python {self.python_version}, torch {torch}"
        self.directory = ROOT / "build" / "wheel" / f"try-{self.python_version}-{torch}"
        self.python = self.directory / "bin" / "python"
        _run(python, "-m", "venv", "--clear", self.directory)
        self._pip("install", "--no-compile", f"torch=={torch}")  # most of torch is never imported

    def install(self, wheels: Path) -> dict[str, Any]:
        """Install the wheel and what it needs besides torch."""
        tag = f"cp{self.python_version.replace('.', '')}"
        (wheel,) = wheels.glob(f"csulora-*-{tag}-{tag}-*.whl")
        before, start, used = self._torch(), time.perf_counter(), _cpu_seconds()
        self._pip("install", wheel)
        return {
            "wheel_bytes": wheel.stat().st_size,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(_cpu_seconds() - used, 1),
            "load_average": round(os.getloadavg()[0], 1),
            "torch_untouched": self._torch() == before,
        }

    def doctor(self) -> dict[str, Any]:
        """Ask the installation itself."""
        report = self.directory / "doctor.json"
        done = subprocess.run([self.directory / "bin" / "csulora", "doctor", "--json", report], check=False)
        findings = {finding["what"]: finding["value"] for finding in json.loads(report.read_text())["findings"]}
        names = ("torch", "core", "cores carried", "GPU", "self-test")
        return {"works": done.returncode == 0, "doctor": {name: findings[name] for name in names if name in findings}}

    def correct(self) -> dict[str, Any]:
        """Extract a small pair's subspace and correct an adapter, in one thread; say what was written."""
        program = (
            "import sys, torch, csulora; torch.set_num_threads(1); base, aligned, adapter, place = sys.argv[1:];"
            "csulora.extract(base, aligned, rank=8).save(place + '/subspace.safetensors');"
            "subspace = csulora.Subspace.open(place + '/subspace.safetensors');"
            "fixed, _ = csulora.correct(csulora.load_adapter(adapter), subspace, csulora.Policy.csulora(1.0));"
            "csulora.save_adapter(fixed, place + '/corrected')"
        )
        pair = [FIXTURE / name for name in ("base", "aligned", "adapter")]
        _run(self.python, "-c", program, *pair, self.directory)
        written = {"subspace": "subspace.safetensors", "corrected": "corrected/adapter_model.safetensors"}
        return {f"{name}_sha256": _sha256(self.directory / file) for name, file in written.items()}

    def test(self, tests: list[str]) -> dict[str, Any]:
        """Run tests against the wheel, with the versions of the tools that development uses."""
        pyproject = (ROOT / "pyproject.toml").read_text()
        self._pip("install", "--no-compile", *re.findall(rf'"((?:{"|".join(TOOLS)})==[^"]+)"', pyproject))
        place = subprocess.run([self.python, "-c", "import csulora; print(csulora.__file__)"], cwd=ROOT, **_TEXT)
        if self.directory not in Path(place.stdout.strip()).parents:
            sys.exit(f"the tests would import csulora from {place.stdout.strip()} instead of the wheel")
        pytest = ["-m", "pytest", "-q", "-m", "not llama_cpp and not chromium", *tests]
        done = subprocess.run([self.python, *pytest], cwd=ROOT, check=False, capture_output=True, text=True)
        print(done.stdout if done.returncode else done.stdout.splitlines()[-1])
        counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
        return {
            "tests": tests,
            "tests_passed": counts.get("passed", 0),
            "tests_failed": counts.get("failed", 0) + counts.get("error", 0) or int(done.returncode != 0),
            "tests_skipped": counts.get("skipped", 0),
        }

    def _pip(self, *arguments: str | Path) -> None:
        _run(self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def _torch(self) -> list[str]:
        """The versions of torch and of the libraries that it brings."""
        done = subprocess.run([self.python, "-m", "pip", "list", "--format=freeze"], **_TEXT)
        return [line for line in done.stdout.splitlines() if line.startswith(("torch", "nvidia", "triton", "cuda"))]


_TEXT: dict[str, Any] = {"check": True, "capture_output": True, "text": True}


def record(file: Path, name: str, found: dict[str, Any]) -> None:
    """Replace one environment's entry in a JSON file."""
    entries = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted({**entries, name: found}.items())), indent=2) + "\n")


def _run(*command: str | Path) -> None:
    code = subprocess.run([str(part) for part in command], check=False).returncode
    if code:
        sys.exit(code)


def _cpu_seconds() -> float:
    """Return the processor time of all commands so far, which others' work on the machine lengthens less."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
