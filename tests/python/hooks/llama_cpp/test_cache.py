import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import csulora
import factories
import gguf_files
from csulora.adapters.lora import Adapter
from csulora.errors import InputError, RefusedError
from csulora.hooks.llama_cpp import cache as gguf_cache
from csulora.hooks.llama_cpp.cache import CorrectedCache, default_directory
from csulora.models.gguf_base import BaseModel
from csulora.policy.policy import Policy
from csulora.serving import gate, open_decision
from csulora.serving.gate import Gate
from csulora.subspace.subspace import Subspace

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.up_proj": (64, 48)}


class Cache:
    """A cache with everything that its only method needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "cache"
        self.model = gguf_files.save_model(directory / "model.gguf", factories.llama_weights())
        csulora.extract(*factories.model_pair(directory / "pair"), rank=4, output=directory / "subspace")
        factories.save_adapter(directory / "adapter", SHAPES)
        self.base = BaseModel.open(self.model)
        self.subspace = Subspace.open(directory / "subspace")
        self.adapter = directory / "adapter"
        self.decisions = directory / "decisions.jsonl"

    def get(
        self,
        adapter: Path | None = None,
        base: BaseModel | None = None,
        subspace: Subspace | None = None,
        policy: Policy | None = None,
    ) -> Path:
        cache = CorrectedCache(self.directory)
        gate = Gate.open(subspace or self.subspace, policy or Policy.project(), self.decisions)
        return cache.corrected(adapter or self.adapter, base or self.base, gate)

    @property
    def verdicts(self) -> list[tuple[str, bool]]:
        """Each decision that was logged, and whether it has figures."""
        lines = map(json.loads, self.decisions.read_text().splitlines())
        return [(line["verdict"], line["totals"] is not None) for line in lines]

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


@pytest.fixture
def corrections(monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    """What was corrected since the test began."""
    done: list[Adapter] = []

    def recording(adapter: Adapter, *rest: object) -> object:
        done.append(adapter)
        return csulora.correct(adapter, *rest)

    monkeypatch.setattr(open_decision, "correct", recording)
    return done


def test_an_entry_is_what_the_command_line_writes(cache: Cache, tmp_path: Path) -> None:
    fixed, _ = csulora.correct(csulora.load_adapter(cache.adapter), cache.subspace, Policy.project())
    csulora.save_adapter(fixed, tmp_path / "lora.gguf", "gguf", base_model=cache.model)
    assert cache.get().read_bytes() == (tmp_path / "lora.gguf").read_bytes()


def test_corrects_once(cache: Cache, corrections: list[Adapter]) -> None:
    assert cache.get() == cache.get()
    assert len(corrections) == 1
    assert len(cache.files) == 1


def test_every_load_is_a_decision(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get()
    cache.get()
    with pytest.raises(RefusedError, match="undoes"):
        cache.get(policy=Policy.csulora(max_undo=-100.0))
    with pytest.raises(InputError, match="no such adapter"):
        cache.get(tmp_path / "absent")
    assert cache.verdicts == [("corrected", True), ("corrected", False), ("refused", True), ("invalid", False)]
    adapters = [json.loads(line)["path"] for line in cache.decisions.read_text().splitlines()]
    assert adapters == [str(cache.adapter)] * 3 + [str(tmp_path / "absent")]


def test_what_llama_cpp_has_no_place_for_is_not_let_through(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RefusedError("no place for it")

    monkeypatch.setattr(gguf_cache.gguf, "write", refuse)
    with pytest.raises(RefusedError, match="no place for it"):
        cache.get()
    assert cache.verdicts == [("refused", False)]
    assert cache.files == []


def test_everything_that_matters_makes_another_entry(
    cache: Cache, corrections: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get()
    cache.get(policy=Policy.protect())
    cache.get(adapter=factories.save_adapter(tmp_path / "other", SHAPES, seed=5))
    cache.get(subspace=csulora.extract(*factories.model_pair(tmp_path / "2"), rank=3))
    metadata = {"general.name": "another"}
    renamed = gguf_files.save_model(tmp_path / "2.gguf", factories.llama_weights(), metadata=metadata)
    cache.get(base=BaseModel.open(renamed))
    monkeypatch.setattr(gate, "__version__", "next")
    cache.get()
    assert len(corrections) == 6


def damage(entry: Path) -> None:
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)


def truncate(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:100])


def replace_by_another_adapter(entry: Path) -> None:
    """Another adapter's file, under a name that fits it and the key."""
    tensors = {"blk.0.attn_q.weight.lora_a": factories.gaussian(2, 48, seed=1)}
    tensors["blk.0.attn_q.weight.lora_b"] = factories.gaussian(48, 2, seed=2)
    foreign = gguf_files.save_lora(entry.with_name("foreign"), tensors)
    key = entry.name.partition("-")[0]
    entry.unlink()
    foreign.rename(entry.with_name(f"{key}-{csulora.io.files.sha256_of_file(foreign)}.gguf"))


def replace_by_a_pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


@pytest.mark.parametrize("spoil", [damage, truncate, replace_by_another_adapter, replace_by_a_pipe])
def test_a_spoiled_entry_is_not_served(spoil: Callable[[Path], None], cache: Cache, corrections: list[Adapter]) -> None:
    entry = cache.get()
    intact = entry.read_bytes()
    spoil(entry)
    assert cache.get().read_bytes() == intact
    assert cache.get().read_bytes() == intact
    assert len(corrections) == 2


def test_a_refused_adapter_leaves_nothing(cache: Cache) -> None:
    with pytest.raises(RefusedError, match="undoes"):
        cache.get(policy=Policy.csulora(max_undo=-100.0))
    assert cache.files == []


def test_an_entry_that_cannot_be_written_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(gguf_cache, "sha256_of_file", full)
    with pytest.raises(OSError, match="no space left"):
        cache.get()
    assert cache.files == []


def test_opening_removes_what_killed_processes_left(cache: Cache) -> None:
    entry = cache.get()
    # Killed after the entry appeared: it is served from then on, and its workplace is never asked for again.
    (cache.directory / ".key.01234567.csulora-tmp").mkdir()
    assert cache.get() == entry
    assert cache.files == [entry]


def test_others_cannot_put_files_into_it(cache: Cache) -> None:
    cache.get()
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    cache.directory.chmod(0o770)
    with pytest.raises(RefusedError, match="others can write to this cache"):
        cache.get()


def test_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be created"):
            CorrectedCache(path)


def test_lies_where_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_directory() == Path("/caches/csulora/gguf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_directory() == Path("/home/me/.cache/csulora/gguf")


_FILL = """
import sys
import csulora
from csulora.models.gguf_base import BaseModel
from csulora.serving.gate import Gate
from csulora.hooks.llama_cpp.cache import CorrectedCache

directory, model, adapter, subspace = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
base = BaseModel.open(model)
cache = CorrectedCache(csulora.io.files.Path(directory))
for penalty in range(20):
    policy = csulora.Policy.csulora(float(penalty))
    path = cache.corrected(csulora.io.files.Path(adapter), base, Gate.open(subspace, policy))
    csulora.load_adapter(path, model)
    print(path.name)
"""


def test_two_processes_do_not_fight(cache: Cache, tmp_path: Path) -> None:
    """Both make the same entries at once; each gets an intact file every time, and nothing is left over."""
    arguments = [str(cache.directory), str(cache.model), str(tmp_path / "adapter"), str(tmp_path / "subspace")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FILL, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n")[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert {file.name for file in cache.files} == set(outputs[0].split())
    assert len(cache.files) == 20
