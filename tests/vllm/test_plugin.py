"""The guard refuses to be put into a vLLM that it does not know, and nothing is half put in."""

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

import csulora_vllm_plugin

GOOD = "import csulora.hooks.vllm as hook; print(hook.activate())"
WRONG_SIGNATURE = """
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.engine.input_processor import InputProcessor
WorkerLoRAManager._load_adapter = lambda self, request, extra: None
before = InputProcessor.process_inputs
import csulora.hooks.vllm as hook
try:
    hook.activate()
finally:
    print("untouched" if InputProcessor.process_inputs is before else "touched")
"""
WRONG_VERSION = """
import vllm
vllm.__version__ = "0.34.0"
import csulora.hooks.vllm as hook
hook.activate()
"""
CLOSED = """
import csulora.hooks.vllm as hook
hook.activate()
from vllm.lora.lora_model import LoRAModel
LoRAModel.from_lora_tensors(1, {}, None)
"""
CACHE_KEYS = """
from types import SimpleNamespace
from vllm.v1.core import kv_cache_utils
request = SimpleNamespace(lora_request=SimpleNamespace(lora_name="name", lora_path="path"))
plain = kv_cache_utils._gen_lora_extra_hash_keys(request)
import csulora.hooks.vllm as hook
fingerprint = hook.activate()
guarded = kv_cache_utils._gen_lora_extra_hash_keys(request)
assert guarded == [*plain, ("csulora", fingerprint)], guarded
assert kv_cache_utils._gen_lora_extra_hash_keys(SimpleNamespace(lora_request=None)) == []
"""


def run(code: str, subspace: Path | None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = (
        os.environ | ({"CSULORA_SUBSPACE": str(subspace), "CSULORA_POLICY": "csulora"} if subspace else {}) | variables
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_entry_point_imports_nothing() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "csulora"]
    tree = ast.parse(Path(csulora_vllm_plugin.__file__).read_text())

    assert found.value == "csulora_vllm_plugin:activate"
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_activates_and_separates_cached_prefixes(files: SimpleNamespace) -> None:
    finished = run(CACHE_KEYS, files.subspace)

    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (WRONG_SIGNATURE, "takes (self, request, extra)"),
        (WRONG_VERSION, "vLLM 0.32 and 0.33, and this is 0.34.0"),
        (CLOSED, "does not know this way"),
    ],
)
def test_raises(code: str, reason: str, files: SimpleNamespace) -> None:
    finished = run(code, files.subspace)

    assert finished.returncode == 1
    assert reason in finished.stderr
    assert "touched" not in finished.stdout.replace("untouched", "")


def test_raises_without_configuration() -> None:
    assert "CSULORA_SUBSPACE is not set" in run(GOOD, None).stderr
    assert "Rust" in run(GOOD, None, VLLM_USE_RUST_FRONTEND="1").stderr
