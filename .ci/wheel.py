"""Build the sdist, and from it the wheel for this Python, with one core for each torch that is named.

    python .ci/wheel.py 2.13.0 2.14.1 2.15.0

The tools are the dependency group "wheel". Of each torch only the wheel is fetched, without what it needs to run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheel" / f"cp{sys.version_info.major}{sys.version_info.minor}"
VERSION = "torch/version.py"
LINKED = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
# They come with torch; a second OpenMP beside torch's would be worse than none.
PROVIDED = ("libtorch*", "libc10*", "libgomp.so.1")


def main() -> None:
    """Build a wheel per torch, merge them, and say on which systems the result runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torches", nargs="+", metavar="TORCH", help="a version of torch: 2.13.0")
    parser.add_argument("--dest", type=Path, default=ROOT / "dist", help="the directory for the wheel")
    arguments = parser.parse_args()
    sources = sdist(arguments.dest)
    wheels = [build(sources, torch, headers(torch)) for torch in arguments.torches]
    repair(merge(wheels), arguments.dest)


def sdist(dest: Path) -> Path:
    """Make the archive of the sources and return what is in it: a wheel built from that shows that nothing is missing.

    A build directory remembers where its sources lay, so they are always unpacked to the same place. The archive gives
    all of them one old time, by which a build would take what changed for what it has compiled already.
    """
    made = fresh(BUILD / "made-sdist")
    program = (
        "import sys; sys.path.insert(0, 'cpp/bindings'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    )
    run(sys.executable, "-c", program, made)
    archive = single(made)
    dest.mkdir(parents=True, exist_ok=True)
    shutil.copy2(archive, dest)
    sources = fresh(BUILD / "sources")
    shutil.unpack_archive(archive, sources, filter="data")
    for file in sources.rglob("*"):
        file.touch()
    return single(sources)


def headers(torch: str) -> Path:
    """Return torch's package directory with what compiling and linking needs."""
    unpacked = BUILD / f"torch-{torch}"
    if not (unpacked / VERSION).exists():
        with ZipFile(download(torch)) as archive:
            needed = filter(_needed, archive.namelist())
            archive.extractall(unpacked, members=sorted(needed, key=VERSION.__eq__))  # the last says that all are there
    return unpacked / "torch"


def download(torch: str) -> Path:
    """Return torch's wheel for this Python."""
    fetched = BUILD / "fetched" / torch
    if not list(fetched.glob("*.whl")):
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fetched, f"torch=={torch}")
    return single(fetched)


def _needed(name: str) -> bool:
    """Whether a file of torch's wheel takes part in a build."""
    return name.startswith("torch/include/") or name in {VERSION, *(f"torch/lib/{file}" for file in LINKED)}


def build(sources: Path, torch: str, directory: Path) -> Path:
    """Compile the core for one torch; the CUDA part needs the GPU's own toolkit and is left to builds from source."""
    made = fresh(BUILD / f"made-{torch}")
    settings = {
        "build-dir": BUILD / f"core-{torch}",
        "cmake.define.CSULORA_CUDA": "OFF",
        "cmake.define.CSULORA_TORCH_DIR": directory,
        "cmake.define.CSULORA_WERROR": "ON",
    }
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip_wheel, *options, "--wheel-dir", made, sources)
    return single(made)


def merge(wheels: Iterable[Path]) -> Path:
    """Put the cores of all wheels into one; the rest of them is the same."""
    first, *others = (unpack(wheel) for wheel in wheels)
    for other in others:
        for core in (other / "csulora").glob("_core_*.so"):
            shutil.copy2(core, first / "csulora")
    merged = fresh(BUILD / "merged")
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", merged, first)
    return single(merged)


def unpack(wheel: Path) -> Path:
    """Return the directory of the unpacked wheel."""
    unpacked = fresh(wheel.parent / "unpacked")
    run(sys.executable, "-m", "wheel", "unpack", "--dest", unpacked, wheel)
    return single(unpacked)


def repair(wheel: Path, dest: Path) -> None:
    """Name the oldest system that the wheel runs on, and check that it needs nothing but that and torch."""
    excluded = [f"--exclude={library}" for library in PROVIDED]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", dest, wheel)


def fresh(directory: Path) -> Path:
    """Return the directory, empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def single(directory: Path) -> Path:
    """Return the one entry of a directory."""
    (entry,) = directory.iterdir()
    return entry


def run(*command: str | Path) -> None:
    """Run a command, with the environment's tools on the path; end with its code if it fails."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
