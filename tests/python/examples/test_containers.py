"""The manifests of examples/containers: valid for Kubernetes, closed, and with a guard's command that works."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import csulora
import factories

CONTAINERS = Path(__file__).parents[3] / "examples" / "containers"
MANIFESTS = sorted(CONTAINERS.glob("*.yaml"))
NAMES = [path.stem for path in MANIFESTS]
MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}
KUBERNETES = "1.34.0"


def documents(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text()))


def pod(manifest: Path) -> dict[str, Any]:
    """Return a manifest's pod specification; that of KServe is one as it stands."""
    template = documents(manifest)[0]["spec"]["template"]
    return template.get("spec", template)


def containers(manifest: Path) -> Iterator[dict[str, Any]]:
    yield from pod(manifest)["initContainers"]
    yield from pod(manifest)["containers"]


def guard(manifest: Path) -> dict[str, Any]:
    return next(container for container in containers(manifest) if container["name"] == "csulora")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=NAMES)
def test_kubernetes_accepts_it(manifest: Path) -> None:
    """Of KServe's resource the pod alone is checked here."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    for document in documents(manifest):
        if document["kind"] == "LLMInferenceService":
            document = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod"},
                "spec": document["spec"]["template"],
            }
        kubernetes.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=NAMES)
def test_the_guard_has_no_more_than_it_needs(manifest: Path) -> None:
    found = guard(manifest)

    assert found["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in found["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/adapters", "/tmp"}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=NAMES)
def test_the_server_sees_corrected_adapters_alone(manifest: Path) -> None:
    server = next(container for container in containers(manifest) if container["name"] in ("vllm", "main"))
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    variables = {entry["name"]: entry["value"] for entry in server["env"]}

    assert "incoming" not in mounts
    assert mounts["adapters"] == {"name": "adapters", "mountPath": "/adapters", "readOnly": True}
    assert variables["HF_HUB_OFFLINE"] == "1"
    volumes = {volume["name"] for volume in pod(manifest)["volumes"]}
    assert all(mount["name"] in volumes for container in containers(manifest) for mount in container["volumeMounts"])


def test_the_lora_sidecar_loads_nothing_from_elsewhere() -> None:
    config = yaml.safe_load(documents(CONTAINERS / "inference-extension.yaml")[1]["data"]["configmap.yaml"])

    assert [model["source"] for model in config["vLLMLoRAConfig"]["ensureExist"]["models"]] == ["/adapters/support"]


def test_kserve_loads_no_adapter_by_itself() -> None:
    spec = documents(CONTAINERS / "kserve.yaml")[0]["spec"]

    assert spec["model"].keys() == {"name", "uri"}


def test_guards_differ_in_whether_they_go_on() -> None:
    commands = {manifest.stem: guard(manifest)["args"] for manifest in MANIFESTS}
    once = commands["deployment"]

    assert commands["kserve"] == once
    assert commands["sidecar"] == commands["inference-extension"] == [*once, "--watch", "--health=/tmp/health"]
    watching = [manifest.stem for manifest in MANIFESTS if guard(manifest).get("restartPolicy") == "Always"]
    assert watching == ["inference-extension", "sidecar"]


def test_the_command_of_the_manifests_works(tmp_path: Path) -> None:
    """With the volumes at other places."""
    signing = pytest.importorskip("signing")
    for name in ("incoming", "rules", "keys", "adapters"):
        (tmp_path / name).mkdir()
    csulora.extract(*factories.model_pair(tmp_path / "pair"), rank=4, output=tmp_path / "rules/subspace.safetensors")
    csulora.Policy.protect().save(tmp_path / "rules/policy.toml")
    operator, publisher = (signing.key_pair(tmp_path / "keys", name)[0] for name in ("operator", "publisher"))
    for file in ("subspace.safetensors", "policy.toml"):
        signing.sign(tmp_path / "rules" / file, operator)
    signing.sign(factories.save_adapter(tmp_path / "incoming/support", MODULES), publisher)
    factories.save_adapter(tmp_path / "incoming/unsigned", MODULES)

    arguments = guard(CONTAINERS / "deployment.yaml")["args"]
    for volume in ("incoming", "rules", "keys", "adapters"):
        arguments = [argument.replace(f"/{volume}", f"{tmp_path}/{volume}") for argument in arguments]
    command = [sys.executable, "-m", "csulora", *arguments, "--settle=0", "--patience=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)

    assert [line.count('"verdict": "corrected"') for line in done.stdout.splitlines()] == [1, 0]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir() if not path.name.startswith(".")) == [
        "support",
        "unsigned.refused.json",
    ]


def test_the_image_copies_what_is_there_and_runs_as_the_manifests_say() -> None:
    lines = (CONTAINERS / "Containerfile").read_text().splitlines()

    assert "COPY examples/containers/install.sh /install.sh" in lines
    assert [line for line in lines if line.startswith("USER")] == ["USER 65532:65532"]
    subprocess.run(["sh", "-n", str(CONTAINERS / "install.sh")], check=True)
