"""From a line of the log alone: every file that took part is found, and the outcome is made again, bit by bit."""

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import csulora
import factories
import gguf_files
from csulora.errors import RefusedError, UndoTogetherError
from csulora.hooks import peft as hook
from csulora.hooks.llama_cpp.cache import CorrectedCache
from csulora.hooks.sglang.placement import fitted
from csulora.models.gguf_base import BaseModel
from csulora.serving.admission import Admission, Terms
from csulora.serving.again import Sources, decide_again, find
from csulora.serving.decisions import DecisionLog
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Found missing adapter keys"
)

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}
POLICY = csulora.Policy.protect(1.0, max_undo=0.9)


@dataclass
class World:
    directory: Path
    subspace: Path
    policy: Path

    @property
    def log(self) -> Path:
        return self.directory / "log.jsonl"

    def gate(self, route: str, policy: object = None) -> Gate:
        return Gate.open(self.subspace, policy or self.policy, self.log, route=route)

    def line(self) -> dict:
        return json.loads(self.log.read_text().splitlines()[-1])


@pytest.fixture
def world(tmp_path: Path) -> World:
    csulora.extract(*factories.model_pair(tmp_path), rank=4, output=tmp_path / "subspace.safetensors")
    POLICY.save(tmp_path / "policy.toml")
    return World(tmp_path, tmp_path / "subspace.safetensors", tmp_path / "policy.toml")


def sha256sum(*files: Path, text: str | None = None) -> list[str]:
    """The coreutils' own answer."""
    command = ["sha256sum", *map(str, files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=text)
    return [line.split()[0] for line in done.stdout.splitlines()]


def guard_once(world: World, incoming: Path) -> None:
    options = Options(settle=0.0, patience=0.0)
    guard = DirectoryGuard(incoming, world.directory / "out", world.gate("guard"), options, lambda _: None)
    assert guard.scan()


def by_guard(world: World) -> Path:
    path = factories.save_adapter(world.directory / "in" / "one", MODULES)
    guard_once(world, path.parent)
    return path


def by_guard_gguf(world: World) -> Path:
    model = gguf_files.save_model(world.directory / "model.gguf", factories.llama_weights())
    loaded = csulora.load_adapter(factories.save_adapter(world.directory / "peft", MODULES))
    (world.directory / "in").mkdir()
    path = world.directory / "in" / "one.gguf"
    csulora.save_adapter(loaded, path, "gguf", base_model=model)
    options = Options(settle=0.0, patience=0.0, base_model=model)
    guard = DirectoryGuard(path.parent, world.directory / "out", world.gate("guard"), options, lambda _: None)
    assert guard.scan()
    return path


def by_admission(route: str, dtype: torch.dtype, fit: Callable | None = None) -> Callable[[World], Path]:
    def admit(world: World) -> Path:
        path = factories.save_adapter(world.directory / "one", MODULES, dtype=torch.float16)
        admission = Admission(world.gate(route, "csulora"))
        admission.admit("id", lambda: path, Terms(dtype, 16, fit=fit), reload=False)
        world.admission = admission  # whose end removes what it published
        return path

    return admit


def by_llama_cpp(world: World) -> Path:
    model = gguf_files.save_model(world.directory / "model.gguf", factories.llama_weights())
    path = factories.save_adapter(world.directory / "one", MODULES)
    cache = CorrectedCache(world.directory / "cache")
    first = cache.corrected(path, BaseModel.open(model), world.gate("llama.cpp", POLICY))
    assert cache.corrected(path, BaseModel.open(model), world.gate("llama.cpp", POLICY)) == first
    assert world.line()["recalled"]
    return path


def by_peft(world: World) -> Path:
    path = factories.save_adapter(world.directory / "one", MODULES)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with hook.guard(world.subspace, world.policy, world.log):
        PeftModel.from_pretrained(model, path)
    return path


ROUTES = {
    "guard": by_guard,
    "guard, gguf": by_guard_gguf,
    "peft": by_peft,
    "vllm": by_admission("vllm", torch.bfloat16),
    "sglang": by_admission("sglang", torch.float16, fitted),
    "llama.cpp": by_llama_cpp,
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_file_is_identified_and_the_output_made_again(route: str, world: World) -> None:
    path = ROUTES[route](world)
    line = world.line()

    assert line["route"] == route.partition(",")[0]
    assert line["path"] == str(path)
    files = [path] if path.is_file() else [path / name for name in line["inputs"]]
    assert sha256sum(*files) == list(line["inputs"].values())
    content = "".join(f"{sha256}\n" for sha256 in line["inputs"].values())
    assert line["adapter_sha256"] == (line["inputs"][path.name] if path.is_file() else sha256sum(text=content)[0])
    assert sha256sum(Path(line["subspace"])) == [line["subspace_sha256"]]
    if line["policy_text"] is None:
        assert sha256sum(Path(line["policy"])) == [line["policy_sha256"]]
    else:
        assert sha256sum(text=line["policy_text"]) == [line["policy_sha256"]]
    for output, sha256 in line["outputs"].items():
        if Path(output).is_absolute():
            assert sha256sum(Path(output)) == [sha256]

    checks = decide_again(line, fit=fitted if route == "sglang" else None)
    assert all(check.holds for check in checks), checks
    again = {check.what for check in checks if check.what.startswith("again ")}
    assert len(again) == len(line["outputs"]) >= 1


def test_a_refusal_is_made_again(world: World) -> None:
    path = factories.save_adapter(world.directory / "one", MODULES)
    gate = world.gate("python", csulora.Policy.none(max_undo=-100.0))
    with pytest.raises(RefusedError), gate.decision(path) as decision:
        decision.correct(decision.read(path))

    line, _ = find(world.log, "last")
    assert line["reason_code"] == "undo-limit"
    assert [check.what for check in decide_again(line) if check.holds][-1] == "reason"


@pytest.mark.parametrize("changed", ["adapter", "subspace", "policy", "output"])
def test_what_was_changed_since_is_named(changed: str, world: World) -> None:
    path = by_guard(world)
    file = {
        "adapter": path / "adapter_config.json",
        "subspace": world.subspace,
        "policy": world.policy,
        "output": world.directory / "out" / "one" / "README.md",
    }[changed]
    file.write_bytes(file.read_bytes() + b"\n")

    failed = [check.what for check in decide_again(world.line()) if not check.holds]
    assert failed == [{"adapter": "input adapter_config.json", "output": "output README.md"}.get(changed, changed)]


def test_outputs_that_a_later_decision_replaced_are_made_again(world: World) -> None:
    incoming = by_guard(world).parent
    first = world.line()
    old = world.policy.rename(world.directory / "old.toml")
    csulora.Policy.protect(2.0, max_undo=0.9).save(world.policy)
    guard_once(world, incoming)
    found, replaced = find(world.log, first["id"])
    assert found == first
    weights = world.directory / "out" / "one" / "adapter_model.safetensors"
    assert (str(weights), sha256sum(weights)[0]) in replaced

    checks = decide_again(first, Sources(policy=old), replaced=replaced)
    assert all(check.holds for check in checks)
    assert f"again {weights.name}" in [check.what for check in checks]

    weights.write_bytes(weights.read_bytes() + b"x")
    checks = decide_again(first, Sources(policy=old), replaced=replaced)
    assert [check.what for check in checks if not check.holds] == [f"output {weights.name}"]


def test_files_may_have_moved(world: World) -> None:
    path = by_guard(world)
    moved = Sources(
        path.rename(world.directory / "elsewhere"),
        world.subspace.rename(world.directory / "s.safetensors"),
        world.policy.rename(world.directory / "p.toml"),
    )
    assert all(check.holds for check in decide_again(world.line(), moved))
    assert [check.what for check in decide_again(world.line()) if not check.holds][-2:] == ["subspace", "policy"]


def test_a_decision_is_found_by_the_beginning_of_its_id(world: World) -> None:
    by_guard(world)
    line = world.line()
    assert find(world.log, line["id"][:6]) == find(world.log, "last") == (line, frozenset())
    with pytest.raises(csulora.InputError, match="no decision has the id xyz; take one"):
        find(world.log, "xyz")
    world.log.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    with pytest.raises(csulora.InputError, match="have an id that begins with '';"):
        find(world.log, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no decision"),
        (b"\xff\xfe\n", "not readable as JSON"),
        (b'{"id": \n', "not readable as JSON"),
        (b"[1]\n", "not a JSON object"),
        (b"{}\n", "no usable `time`"),
        (json.dumps(factories.decision(subspace_sha256="2").to_dict()).encode(), "no usable `subspace_sha256`"),
        (json.dumps(factories.decision(inputs={"a": "1"}).to_dict()).encode(), "no usable `inputs`"),
        (json.dumps(factories.decision().to_dict() | {"form": {"format": "peft"}}).encode(), "no usable `form`"),
    ],
)
def test_a_damaged_log_says_so(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(csulora.InputError, match=reason):
        find(tmp_path / "log", "last")


def test_a_line_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    decision = factories.decision(policy="a\u2028b\x85c")
    DecisionLog(tmp_path / "log").record(decision)
    assert find(tmp_path / "log", "last")[0]["policy"] == decision.policy


def test_a_refusal_of_a_sum_is_not_called_false(world: World) -> None:
    path = factories.save_adapter(world.directory / "one", MODULES)
    with suppress(RefusedError), world.gate("python").decision(path) as decision:
        decision.correct(decision.read(path))
        raise UndoTogetherError("one + another: too much")
    assert world.line()["reason_code"] == "undo-together"
    with pytest.raises(csulora.InputError, match="`undo-together`, which depends on more than the files"):
        decide_again(world.line())


def test_a_type_that_torch_lacks_is_named(world: World) -> None:
    by_guard(world)
    form = {"format": "peft", "layout": None, "dtype": "float7", "fitted": False}
    with pytest.raises(csulora.InputError, match="the type float7, which torch lacks"):
        decide_again(world.line() | {"form": form})
