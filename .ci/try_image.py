"""Run the steps of the image without a registry: install from the wheel, then the guard of a manifest in a bare root.

    python .ci/try_image.py dist

The bare root holds the system's libraries, Python and the virtual environment, all of it read-only, and the volumes of
examples/containers/deployment.yaml. The guard runs there as the manifest says: without root, without capabilities.
Needs Linux and root (mounts); nothing outside a temporary directory is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ROOT / "examples" / "containers"
FIXTURE = ROOT / "bench" / "efficacy" / "fixture"
VENV = Path("/opt/csulora")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")


def main() -> None:
    """Install, prepare volumes as an operator would, run the guard, and verify what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the directory with the wheel")
    parser.add_argument("--venv", type=Path, help="an environment that install.sh made before")
    arguments = parser.parse_args()
    guard = container(CONTAINERS / "deployment.yaml", "csulora")
    with TemporaryDirectory(prefix="try-image-") as place:
        volumes, venv = Path(place, "volumes"), arguments.venv or Path(place, "venv")
        if arguments.venv is None:
            run("sh", CONTAINERS / "install.sh", venv, arguments.wheels)
        prepare(volumes, venv)
        user, group = guard["securityContext"]["runAsUser"], guard["securityContext"]["runAsGroup"]
        for mount in guard["volumeMounts"]:
            if not mount.get("readOnly"):
                Path(f"{volumes}{mount['mountPath']}").mkdir()
                os.chown(f"{volumes}{mount['mountPath']}", user, group)
        Path(place, "root").mkdir()
        script = Path(place, "enter.sh")
        script.write_text(entering(Path(place, "root"), volumes, venv, guard))
        entered = ["unshare", "--mount", "--", "sh", "-eu", str(script)]
        log = subprocess.run(entered, check=True, stdout=subprocess.PIPE, text=True).stdout
        verdicts = {decision["name"]: decision["verdict"] for decision in map(json.loads, log.splitlines())}
        print(verdicts)
        assert verdicts == {"support": "corrected", "unsigned": "refused"}
        run(venv / "bin" / "csulora", "verify", volumes / "adapters" / "support")
    print("the guard ran in a read-only root, without root")


def container(manifest: Path, name: str) -> dict[str, Any]:
    """Return an initContainer of a manifest's first document."""
    template = next(yaml.safe_load_all(manifest.read_text()))["spec"]["template"]
    found: dict[str, Any] = next(entry for entry in template["spec"]["initContainers"] if entry["name"] == name)
    return found


def prepare(volumes: Path, venv: Path) -> None:
    """Make what the operator and a publisher bring: keys, signed rules, a signed adapter and an unsigned one."""
    rules, incoming, keys = (volumes / name for name in ("rules", "incoming", "keys"))
    for directory in (rules, incoming, keys):
        directory.mkdir(parents=True)
    for name in ("publisher", "operator"):
        key = keys.parent / f"{name}.key"
        run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        run("openssl", "pkey", "-in", key, "-pubout", "-out", keys / f"{name}.pub")
    subspace, policy = rules / "subspace.safetensors", rules / "policy.toml"
    run(venv / "bin" / "csulora", "extract", FIXTURE / "base", FIXTURE / "aligned", "-o", subspace, "--rank", "8", "-q")
    policy.write_text((ROOT / "examples" / "policies" / "limit.toml").read_text())
    for name in ("support", "unsigned"):
        run("cp", "-r", FIXTURE / "adapter", incoming / name)
    sign = (venv / "bin" / "model_signing", "sign", "key", "--private_key")
    for file in (subspace, policy):
        run(*sign, volumes / "operator.key", "--signature", f"{file}.sig", file)
    run(*sign, volumes / "publisher.key", "--signature", incoming / "support" / "model.sig", incoming / "support")


def entering(root: Path, volumes: Path, venv: Path, guard: dict[str, Any]) -> str:
    """Return a script that makes the root in a mount namespace of its own, and runs the container's command in it."""
    python = Path(sys.base_prefix)
    lines = ["mount --make-rprivate /", f"mount -t tmpfs root {root}"]
    lines += bound(root, [(path, path) for path in SYSTEM if os.path.exists(path)] + [(str(python), str(python))], "ro")
    lines += bound(root, [(str(venv), str(VENV))], "ro")
    lines += [f"mkdir -p {root}/proc", f"mount -t proc proc {root}/proc", f"ln -s /proc/self/fd/1 {root}/dev/stdout"]
    for mount in guard["volumeMounts"]:
        kind = "ro" if mount.get("readOnly") else "rw"
        lines += bound(root, [(f"{volumes}{mount['mountPath']}", mount["mountPath"])], kind)
    lines.append(f"mount -o remount,ro {root}")
    context = guard["securityContext"]
    lines.append(f"chown {context['runAsUser']} /proc/self/fd/1")  # as container runtimes do
    ids = f"--reuid {context['runAsUser']} --regid {context['runAsGroup']} --clear-groups"
    drop = "setpriv --no-new-privs --bounding-set=-all --inh-caps=-all"
    variables = "PATH=/usr/bin:/bin HOME=/tmp HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1"
    # The entry point names the place that it was installed to; in the image that is this one.
    command = shlex.join([f"{VENV}/bin/python", "-m", "csulora", *guard["args"]])
    inside = f"! touch /x 2>/dev/null && ! touch /incoming/x 2>/dev/null && exec {command}"
    lines.append(f"exec chroot {root} {drop} {ids} env -i {variables} sh -c {shlex.quote(inside)}")
    return "\n".join(lines)


def bound(root: Path, paths: list[tuple[str, str]], kind: str) -> list[str]:
    """Return the commands that show paths in the root."""
    lines = []
    for source, target in paths:
        place = shlex.quote(f"{root}{target}")
        make = f"mkdir -p {place}" if os.path.isdir(source) else f"mkdir -p $(dirname {place}) && touch {place}"
        lines += [make, f"mount --bind {shlex.quote(source)} {place}"]
        if os.path.isdir(source):
            lines.append(f"mount -o remount,bind,{kind} {place}")
    return lines


def run(*command: str | Path) -> None:
    """Run a command, and say which."""
    print("+", *command, flush=True)
    subprocess.run([*map(str, command)], check=True)


if __name__ == "__main__":
    main()
