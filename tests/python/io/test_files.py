import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from csulora.errors import InputError
from csulora.io import files
from csulora.io.tensors import save_tensors

MARKER = "report.json"


def write_directory(path: Path, names: tuple[str, ...] = (MARKER, "weights")) -> None:
    with files.atomic_directory(path, MARKER) as directory:
        for name in names:
            (directory / name).write_text("new")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.atomic_file(path) as temporary:
        temporary.write_text("complete")
        assert not path.exists()
    assert path.read_text() == "complete"
    assert list(tmp_path.iterdir()) == [path]


def test_contents_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(descriptor: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "contents")
        fsync(descriptor)

    def recording_replace(path: Path, target: Path) -> None:
        events.append("rename")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    files.write_text(tmp_path / "file", "text")
    assert events == ["contents", "rename", "directory"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with files.atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("no power")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensor_files_get_the_permissions_that_any_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with files.atomic_file(tmp_path / "file") as temporary:
        save_tensors({"x": torch.zeros(2)}, temporary, {})
    with files.atomic_directory(tmp_path / "directory", MARKER) as directory:
        save_tensors({"x": torch.zeros(2)}, directory / "weights", {})
    expected = permissions(tmp_path / "ordinary")
    assert permissions(tmp_path / "file") == expected
    assert permissions(tmp_path / "directory" / "weights") == expected


def test_a_file_needs_a_directory_that_exists(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        files.write_text(tmp_path / "missing" / "file", "")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        files.write_text(tmp_path, "")


def test_a_device_or_pipe_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="not a regular file"):
        files.write_text(pipe, "")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with files.atomic_directory(path, MARKER) as directory:
        (directory / MARKER).write_text("new")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == [MARKER]
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_directory_and_one_of_csuloras_own_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    write_directory(path)
    (path / "weights").write_text("old")
    write_directory(path)
    assert (path / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("present", "message"),
    [(("weights",), "not written by csulora"), ((MARKER, "notes"), "holds notes, which csulora did not write")],
)
def test_what_csulora_did_not_write_is_not_replaced(tmp_path: Path, present: tuple[str, ...], message: str) -> None:
    path = tmp_path / "out"
    path.mkdir()
    for name in present:
        (path / name).write_text("precious")
    with pytest.raises(InputError, match=message):
        write_directory(path)
    assert {file.name: file.read_text() for file in path.iterdir()} == dict.fromkeys(present, "precious")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious")
    with pytest.raises(InputError, match="not written by csulora"):
        write_directory(path)
    assert path.read_text() == "precious"


def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_directory(path)

    def fail() -> None:
        with files.atomic_directory(path, MARKER) as directory:
            (directory / MARKER).write_text("half")
            raise RuntimeError("no power")

    with pytest.raises(RuntimeError):
        fail()
    assert (path / MARKER).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("present", [False, True], ids=["fresh", "replaced"])
def test_of_two_processes_that_write_a_directory_at_once_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    path = tmp_path / "out"
    if present:
        write_directory(path)
    rename = Path.rename

    def rename_second(source: Path, target: Path) -> Path:
        if target == path:
            monkeypatch.setattr(Path, "rename", rename)
            write_directory(path, (MARKER, "theirs"))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rename_second)
    with pytest.raises(InputError, match="another process wrote it meanwhile"):
        write_directory(path)
    assert {file.name for file in path.iterdir()} == {MARKER, "theirs"}
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_survive_and_failures_to_write_them_are_os_errors(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).reshape(2, 3).t()}
    save_tensors(tensors, tmp_path / "file", {"key": "value"})
    assert torch.equal(load_file(tmp_path / "file")["x"], tensors["x"])
    with pytest.raises(OSError, match="missing"):
        save_tensors(tensors, tmp_path / "missing" / "file", {})


def test_reads_json_objects() -> None:
    assert files.parse_json(b'{"a": [1, 2.5, null], "b": {"c": "\xc3\xa4"}}', Path("x")) == {
        "a": [1, 2.5, None],
        "b": {"c": "ä"},
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_refuses_what_is_not_strictly_a_json_object(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^config\.json: "):
        files.parse_json(data, Path("config.json"))


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'{"r": 8, "lora_alpha": 1e999}', "lora_alpha is 1e999"),
        (b'{"a": 1.5, "alpha_pattern": {"q_proj": 2.0, "mlp.up_proj": -1e999}}', "alpha_pattern.mlp.up_proj is -1e999"),
        (b'{"overrides": [{"gains": [1.0, 0.5]}, {"gains": [1, NaN]}]}', "overrides[1].gains[1] is NaN"),
        (b'{"a": {"b": Infinity}, "c": NaN}', "a.b is Infinity"),
    ],
)
def test_a_number_that_is_not_finite_is_named_by_its_keys(data: bytes, where: str) -> None:
    with pytest.raises(InputError) as error:
        files.parse_json(data, Path("config.json"))
    assert str(error.value) == f"config.json: {where}; write a finite number that a float64 holds"


def test_json_is_deterministic_and_holds_only_numbers_that_json_has() -> None:
    assert files.to_json({"b": 1, "a": "ä"}) == '{\n  "a": "ä",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json({"a": float("nan")})


def test_reads_regular_files_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert files.read_regular(path, 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes; at most 4"):
        files.read_regular(path, 4)
    with pytest.raises(InputError, match="no such file"):
        files.read_regular(tmp_path / "missing", 5)
    with pytest.raises(InputError, match="cannot be opened: Is a directory"):
        files.read_regular(tmp_path, 5)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        files.read_regular(tmp_path / "pipe", 5)


def test_hashes_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert files.sha256_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def killed_while_writing(path: Path) -> None:
    """Leave behind what a process that is killed while it writes ``path`` leaves behind."""
    script = (
        "import os, sys; from pathlib import Path; from csulora.io import files\n"
        "with files.atomic_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_same(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    killed_while_writing(path)
    assert [file.name.startswith(".file.") for file in tmp_path.iterdir()] == [True]
    files.write_text(other, "")
    assert len(list(tmp_path.iterdir())) == 2
    files.write_text(path, "")
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.atomic_file(path) as first:
        first.write_text("first")
        files.write_text(path, "second")
        files.remove_abandoned(tmp_path)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_only_workplaces_are_taken_for_abandoned(tmp_path: Path) -> None:
    kept = [
        tmp_path / name for name in (".file.01234567.tmp", ".file.0123456.csulora-tmp", "file.01234567.csulora-tmp")
    ]
    for directory in kept:
        directory.mkdir()
    (tmp_path / ".link.01234567.csulora-tmp").symlink_to(kept[0])
    (tmp_path / ".file.01234567.csulora-tmp").mkdir()
    files.remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in kept), ".link.01234567.csulora-tmp"}
    assert not any(any(directory.iterdir()) for directory in kept)


def test_a_directory_that_finds_no_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, files.atomic_directory(tmp_path / "out", MARKER):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_text_that_finds_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() has it, without a name

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"{tmp_path / 'policy.toml'}: No space left on device"):
        files.write_text(tmp_path / "policy.toml", "text")
    assert not list(tmp_path.iterdir())


def test_many_outputs_are_compared_with_many_inputs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`csulora correct` with a thousand adapters took minutes before it began."""
    resolved: list[object] = []
    original = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or original(path))
    inputs, outputs = ([tmp_path / kind / str(i) for i in range(50)] for kind in ("in", "out"))
    for path in inputs:
        path.mkdir(parents=True)

    files.check_not_inputs(outputs, inputs)
    assert len(resolved) == 100
    for wrong, why in ((inputs[7], "is read"), (outputs[3], "is written"), (outputs[3] / "config.json", "is written")):
        with pytest.raises(InputError, match=why):
            files.check_not_inputs([*outputs, wrong], inputs)


@pytest.mark.parametrize(
    "output", ["adapter", "adapter/new", "adapter/deep/new", "other/../adapter/new.json", "link/new"]
)
def test_nothing_is_written_into_what_is_read(tmp_path: Path, output: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("adapter")
    with pytest.raises(InputError, match="lies in what is read"):
        files.check_not_inputs([tmp_path / output], [tmp_path / "adapter"])
    files.check_not_inputs([tmp_path / "other" / "new", tmp_path / "adapter2"], [tmp_path / "adapter"])


def test_a_hub_id_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.check_not_inputs([Path("org/name"), Path("org/other/new")], ["org/name", "org/other"])


def test_links_that_go_round_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    files.check_not_inputs([tmp_path / "loop" / "out"], [tmp_path / "in"])
