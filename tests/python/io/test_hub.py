"""Hub ids with a revision and a folder or a file, for models and adapters."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

import csulora
import factories
import gguf_files
from csulora.errors import InputError
from csulora.io.hub import local_path
from csulora.models.checkpoint import Checkpoint

Q = "model.layers.0.self_attn.q_proj"


class Hub:
    """A repository per revision, in place of the hub's; notes what is fetched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(self, repo: str, revision: str | None = None, **patterns: Any) -> str:
        directory = self.root / repo / (revision or "main")
        if not directory.exists():
            raise FileNotFoundError(f"404 {repo} {revision}")
        files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
        self.fetched.append((repo, revision, list(filter_repo_objects(files, **patterns))))
        return str(directory)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("csulora.io.hub.snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("source", "revision", "folder"),
    [
        ("org/adapter", None, ""),
        ("org/adapter@v1.0", "v1.0", ""),
        ("org/adapter@refs/pr/3", "refs/pr/3", ""),
        ("org/adapter:checkpoint-100", None, "checkpoint-100"),
        ("org/adapter@v1:runs/best one", "v1", "runs/best one"),
        ("org/adapter:runs/v1.5", None, "runs/v1.5"),
    ],
)
def test_an_adapter_is_found_by_its_id(source: str, revision: str | None, folder: str, hub: Hub) -> None:
    place = hub.root / "org/adapter" / (revision or "main")
    expected = factories.save_adapter(place / folder if folder else place, {Q: (40, 40)}, seed=3)
    (place / "pytorch_model.bin").write_bytes(b"not wanted")
    (place / "unlike").mkdir()
    (place / "unlike" / "notes.txt").write_text("not wanted")
    adapter = csulora.load_adapter(source)
    assert adapter.sha256 == csulora.load_adapter(expected).sha256
    assert str(adapter.path) == source
    ((repo, asked, files),) = hub.fetched
    assert (repo, asked) == ("org/adapter", revision)
    assert files == [str(Path(folder, name)) for name in ("adapter_config.json", "adapter_model.safetensors")]


def test_a_model_is_found_by_its_id(hub: Hub) -> None:
    weights = factories.llama_weights(layers=1)
    place = hub.root / "org/model" / "v2"
    factories.save_checkpoint(place / "text", weights, shards=2)
    for extra in ("consolidated.safetensors", "original/params.json"):
        (place / "text" / extra).parent.mkdir(exist_ok=True)
        (place / "text" / extra).write_bytes(b"")
    checkpoint = Checkpoint.open("org/model@v2:text")
    assert checkpoint.name == "org/model@v2:text"
    assert len(checkpoint.weights) == 9
    assert [Path(file).name for file in hub.fetched[0][2]] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_one_file_of_a_repository_is_fetched_alone(hub: Hub) -> None:
    place = hub.root / "org/model" / "main"
    place.mkdir(parents=True)
    for name in ("model-Q4_0.gguf", "model-F32.gguf"):
        gguf_files.save_model(place / name, factories.llama_weights(layers=1))
    assert len(Checkpoint.open("org/model:model-F32.gguf").weights) == 9
    assert hub.fetched == [("org/model", None, ["model-F32.gguf"])]


def test_extraction_says_which_revisions_it_is_made_of(hub: Hub) -> None:
    base = factories.llama_weights(layers=1)
    factories.save_checkpoint(hub.root / "org/model" / "base", base)
    factories.save_checkpoint(hub.root / "org/model" / "aligned", factories.moved(base))
    found = csulora.extract("org/model@base", "org/model@aligned", rank=2, modules=["q_proj"])
    assert (found.provenance.base, found.provenance.aligned) == ("org/model@base", "org/model@aligned")


def test_a_local_path_comes_first(hub: Hub, tmp_path: Path) -> None:
    factories.save_adapter(tmp_path / "org" / "adapter@v1", {Q: (40, 40)})
    csulora.load_adapter("org/adapter@v1")
    assert hub.fetched == []


@pytest.mark.parametrize(
    "source",
    [
        "/org/adapter",
        "./org/adapter",
        "~/adapter",
        "org/sub/adapter",
        "org/a@v1:../b",
        "org/a@",
        "org/a@../../b",
        "org/a:/etc",
        "o/a\nb",
    ],
)
def test_what_is_no_id_is_not_asked_for(source: str, hub: Hub) -> None:
    with pytest.raises(InputError, match="no such file or directory; a hub id is written org/name"):
        csulora.load_adapter(source)
    assert hub.fetched == []


def test_a_path_is_never_an_id(hub: Hub) -> None:
    """What a server or a watched directory names is not looked up elsewhere once it is gone."""
    factories.save_adapter(hub.root / "org/adapter" / "main", {Q: (40, 40)})
    with pytest.raises(InputError, match="no such adapter"):
        csulora.load_adapter(Path("org/adapter"))
    with pytest.raises(InputError, match="no such file or directory"):
        Checkpoint.open(Path("org/adapter"))
    assert hub.fetched == []


def test_a_missing_folder_and_a_missing_revision_are_told(hub: Hub) -> None:
    factories.save_adapter(hub.root / "org/adapter" / "main", {Q: (40, 40)})
    with pytest.raises(InputError, match=r"^org/adapter:nowhere: the repository has no such file or folder"):
        local_path("org/adapter:nowhere", ["*"])
    with pytest.raises(InputError, match=r"^org/adapter: .*404 org/adapter v9"):
        csulora.load_adapter("org/adapter@v9")
