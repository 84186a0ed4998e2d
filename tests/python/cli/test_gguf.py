"""The command line on GGUF files: adapters in and out, models and checkpoints."""

import json
from pathlib import Path

import pytest

import csulora
import factories
import gguf_files
from commands import Run
from csulora.cli import exit_codes

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model pair as GGUF files, a subspace file and an adapter."""
    monkeypatch.chdir(tmp_path)
    weights = factories.llama_weights()
    gguf_files.save_model(tmp_path / "base.gguf", weights)
    gguf_files.save_model(tmp_path / "model.gguf", factories.moved(weights))
    csulora.extract("base.gguf", "model.gguf", rank=6).save("subspace")
    factories.save_adapter(tmp_path / "adapter", SHAPES, use_rslora=True)
    return tmp_path


def test_extracts_and_verifies(work: Path, run: Run) -> None:
    assert run("extract base.gguf model.gguf -o new --rank 6")[0] == 0
    assert (work / "new").read_bytes() == (work / "subspace").read_bytes()
    assert run("verify new base.gguf model.gguf")[0] == 0


def test_names_in_capitals(work: Path, run: Run) -> None:
    assert run("export adapter -o RAW.GGUF --base-model model.gguf --quiet") == (0, "", "")
    correct = "correct RAW.GGUF --subspace subspace --policy csulora --base-model model.gguf --quiet"
    for output in ("one.GGUF", "one.gguf"):
        assert run(f"{correct} -o {output}") == (0, "", "")
    written = [csulora.load_adapter(output, "model.gguf") for output in ("one.GGUF", "one.gguf")]
    assert written[0].format == "gguf"
    assert written[0].sha256 == written[1].sha256
    for other in ("-o SEVERAL.GGUF adapter", "-o o.GGUF --format peft"):
        assert run(f"{correct} {other}")[0] == 2
    assert "verify the PEFT directory" in run("verify one.GGUF")[2]


def test_corrects_into_gguf_and_back(work: Path, run: Run) -> None:
    """From either format into either format it is the same correction."""
    correct = "correct {} --subspace subspace --policy csulora --base-model model.gguf -o {} --format {} --quiet"
    assert run("export adapter -o raw.gguf --base-model model.gguf --quiet") == (0, "", "")
    assert run(correct.format("adapter", "one.gguf", "gguf")) == (0, "", "")
    assert run(correct.format("raw.gguf", "two.gguf", "gguf")) == (0, "", "")
    assert run(correct.format("raw.gguf", "three", "peft")) == (0, "", "")
    expected, _ = csulora.correct(
        csulora.load_adapter("adapter"), csulora.Subspace.open("subspace"), csulora.Policy.csulora()
    )
    by_name = "correct adapter --subspace subspace --policy csulora --base-model model.gguf -o four.gguf --quiet"
    assert run(by_name) == (0, "", "")
    assert (work / "four.gguf").read_bytes() == (work / "one.gguf").read_bytes()
    by_input = "correct raw.gguf --subspace subspace --policy csulora --base-model model.gguf -o five --quiet"
    assert run(by_input) == (0, "", "")
    assert (work / "five").read_bytes() == (work / "two.gguf").read_bytes()
    for path in ("one.gguf", "two.gguf", "three"):
        found = csulora.load_adapter(path, "model.gguf")
        for name, module in expected.modules.items():
            wanted = module.scale * module.b.double() @ module.a.double()
            update = found.modules[name].scale * found.modules[name].b.double() @ found.modules[name].a.double()
            assert (update - wanted).norm() <= 1e-5 * wanted.norm()
    assert run("verify three raw.gguf subspace --base-model model.gguf --quiet") == (0, "", "")
    code, _, err = run("verify one.gguf adapter subspace")
    assert code == exit_codes.BAD_INPUT
    assert "verify the PEFT directory that holds the same correction" in err
    assert run("verify three raw.gguf subspace")[0] == exit_codes.BAD_INPUT  # its rows cannot be told apart


def test_export_says_what_it_did(work: Path, run: Run) -> None:
    code, out, _ = run("export adapter -o raw.gguf --base-model model.gguf --outtype f16")
    assert code == 0
    assert "wrote raw.gguf: 2 modules, as they are in adapter" in out
    code, out, _ = run("export adapter -o again.gguf --base-model model.gguf --outtype f16 --json -")
    document = json.loads(out)
    assert document["adapter_sha256"] == csulora.load_adapter("adapter").sha256
    assert {module["module"] for module in document["modules"]} == SHAPES.keys()
    assert (work / "raw.gguf").read_bytes() == (work / "again.gguf").read_bytes()


def test_inspects_a_gguf_adapter(work: Path, run: Run) -> None:
    run("export adapter -o raw.gguf --base-model model.gguf --quiet")
    assert run("inspect raw.gguf --base-model model.gguf --subspace subspace")[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        "correct adapter --subspace subspace --policy csulora -o out.gguf --format gguf",
        "correct adapter --subspace subspace --policy csulora -o out --outtype f16",
        "correct adapter --subspace subspace --policy csulora -o out.gguf --format onnx",
        "correct adapter --subspace subspace --policy csulora -o out.gguf",
        "correct adapter --subspace subspace --policy csulora -o out.gguf --format peft --base-model model.gguf",
        "export adapter -o out.gguf",
        "export adapter -o out.gguf --base-model model.gguf --outtype q8_0",
    ],
)
def test_wrong_usage_exits_with_2(command: str, work: Path, run: Run) -> None:
    code, _, err = run(command)
    assert code == 2
    assert "Traceback" not in err
    assert not list(work.glob("out*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export adapter -o out.gguf --base-model nowhere", "nowhere: no such file"),
        ("export adapter -o out.gguf --base-model subspace", "subspace: not a GGUF file"),
        ("export adapter -o out.gguf --base-model adapter", "adapter: holds an adapter; name the model's directory"),
        ("export adapter -o missing/out.gguf --base-model model.gguf", "missing: no such directory"),
        ("export adapter -o adapter --base-model model.gguf", "adapter: is read, or lies in what is read"),
        ("export adapter -o model.gguf --base-model model.gguf", "is read, or lies in what is read"),
        ("inspect model.gguf", "general.type is None; a LoRA adapter says adapter"),
        ("correct model.gguf --subspace subspace --policy csulora -o out --format peft", "general.type is None"),
    ],
)
def test_bad_input_exits_with_4(command: str, message: str, work: Path, run: Run) -> None:
    before = {path: path.read_bytes() for path in work.glob("*.gguf")}
    code, out, err = run(command)
    assert (code, out) == (4, "")
    assert message in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in work.glob("*.gguf")} == before


def test_what_llama_cpp_cannot_run_exits_with_3(work: Path, run: Run) -> None:
    factories.save_adapter(work / "foreign", {"model.layers.0.mlp.other": (8, 48)})
    code, _, err = run("export foreign -o out.gguf --base-model model.gguf")
    assert code == 3
    assert "llama.cpp has no llama tensor for model.layers.0.mlp.other" in err
