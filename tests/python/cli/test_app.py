"""The command line, in this process where it can be, in one of its own where the process is the point."""

import json
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import csulora
import factories
import html_pages
from commands import Outcome, Run
from csulora.cli import doctor
from csulora.tuning.frontier import frontier_path
from csulora.views.html.page import assess, render

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "csulora_report.json"]
LLAMA_LAYERS = 12
LLAMA_MODULES = 7 * LLAMA_LAYERS


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with two checkpoints, a subspace file and an adapter."""
    monkeypatch.chdir(tmp_path)
    factories.model_pair(tmp_path)
    csulora.extract("base", "aligned", rank=6).save("subspace")
    factories.save_adapter(tmp_path / "adapter", {Q: (48, 48), "model.layers.1.mlp.down_proj": (48, 64)})
    return tmp_path


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def in_a_process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "csulora", *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


# What the commands do


def test_extract_writes_a_subspace_and_says_what_is_in_it(work: Path, run: Run) -> None:
    result = run("extract", "base", "aligned", "-o", "new", "--rank", 6)
    assert result.code == 0
    assert (work / "new").read_bytes() == (work / "subspace").read_bytes()
    assert (
        f"wrote new: alignment from base to aligned, 14 modules, sha256 {csulora.Subspace.open('subspace').sha256}"
        in result.out
    )
    assert "down_proj" in result.out
    assert result.err == ""


def test_extract_takes_every_option(work: Path, run: Run) -> None:
    options = "--energy 0.5 --max-rank 5 --modules q_proj --modules layers.1.mlp.* --dtype f32 --device cpu --seed 3"
    assert run("extract", "base", "aligned", "-o", "new", *options.split(), "--keep-noise").code == 0
    expected = csulora.extract(
        "base",
        "aligned",
        energy=0.5,
        max_rank=5,
        modules=["q_proj", "layers.1.mlp.*"],
        dtype="f32",
        seed=3,
        keep_noise=True,
    )
    assert csulora.Subspace.open("new").sha256 == expected.sha256


def test_extract_chooses_the_rank(work: Path, run: Run) -> None:
    cut = run("extract", "base", "aligned", "-o", "new", "--rank", "auto", "--max-rank", "1").out
    count = sum(module.rank == 1 for module in csulora.Subspace.open("new").values())
    assert count
    assert f"{count} modules have 1 directions, the most that --max-rank allows; more may stand out" in cut
    assert "more may stand out" not in run("extract", "base", "aligned", "-o", "new", "--rank", "1").out
    assert run("extract", "base", "aligned", "-o", "new", "--rank", "auto", "--max-rank", "5").code == 0
    assert csulora.Subspace.open("new").sha256 == csulora.extract("base", "aligned", rank="auto", max_rank=5).sha256


def test_verify_passes_a_subspace_of_these_checkpoints(work: Path, run: Run) -> None:
    result = run("verify", "subspace", "base", "aligned")
    assert (result.code, result.err) == (0, "")
    assert "subspace: 14 of 14 certificates hold" in result.out


def test_verify_refuses_a_subspace_of_others(work: Path, run: Run) -> None:
    result = run("verify", "subspace", "aligned", "base", "--json", "report")
    assert result.code == 3
    assert result.err.startswith("csulora: refused: subspace: 14 of 14 certificates do not hold; that of ")
    assert result.err.endswith(
        "is for other weights: name the checkpoints that the file was made from, the base first\n"
    )
    assert [module["holds"] for module in json.loads(Path("report").read_text())["modules"]] == [False] * 14


def test_inspect_shows_an_adapter(work: Path, run: Run) -> None:
    result = run("inspect", "adapter")
    assert (result.code, result.err) == (0, "")
    assert Q in result.out
    assert "adapter: 2 modules" in result.out


def test_inspect_shows_what_an_adapter_does_to_the_alignment(work: Path, run: Run) -> None:
    before = tree(work)
    result = run("inspect", "adapter", "--subspace", "subspace")
    assert (result.code, result.err) == (0, "")
    assert "adapter: 2 of 2 modules are covered" in result.out
    assert "undo" in result.out
    assert tree(work) == before


def test_inspect_shows_an_adapter_that_the_subspace_covers_in_part(work: Path, run: Run) -> None:
    factories.save_adapter(work / "wider", {Q: (48, 48), "lm_head": (40, 48)})
    result = run("inspect", "wider", "--subspace", "subspace", "--json", "-")
    assert result.code == 0
    assert [module["status"] for module in json.loads(result.out)["modules"]] == ["kept", "corrected"]


def test_correct_writes_an_adapter_with_its_report(work: Path, run: Run) -> None:
    result = run("correct", "adapter", "--subspace", "subspace", "-o", "out", "--policy", "csulora")
    assert (result.code, result.err) == (0, "")
    assert "wrote out, a PEFT directory: 2 of 2 modules, sha256" in result.out
    assert "the policy" in result.out or "no module undoes" in result.out
    assert sorted(path.name for path in (work / "out").iterdir()) == ADAPTER_FILES
    fixed, report = csulora.correct(
        csulora.load_adapter("adapter"), csulora.Subspace.open("subspace"), csulora.Policy.csulora()
    )
    written = csulora.load_adapter("out")
    stated = json.loads((work / "out" / "csulora_report.json").read_text())
    assert stated == report.to_dict() | {"corrected_sha256": written.sha256}
    for name, module in fixed.modules.items():
        assert written.modules[name].b.equal(module.b)
        assert written.modules[name].a.equal(module.a)
        assert written.modules[name].scale == 1


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ("--policy protect", csulora.Policy.protect(1.0)),
        ("--policy project --rank exact", csulora.Policy.project(rank="exact")),
        ("--policy none --keep-uncovered *", csulora.Policy.none(keep_uncovered=("*",))),
        (
            "--policy none --aligned 0.5 --partial 2 --off inf --rank 3 --max-undo 5",
            csulora.Policy(0.5, 2, float("inf"), 3, max_undo=5),
        ),
        ("--policy protect --off 4", csulora.Policy(1, 1, 4)),
    ],
)
def test_correct_takes_a_policy_from_its_options(work: Path, run: Run, options: str, policy: csulora.Policy) -> None:
    result = run("correct", "adapter", "--subspace", "subspace", "-o", "out", *options.split(), "--json", "-")
    assert result.code == 0
    written = json.loads(result.out)["policy"]
    assert written == {key: "inf" if value == float("inf") else value for key, value in policy.to_dict().items()}


def test_inspect_writes_a_page(work: Path, run: Run) -> None:
    plain = run("inspect", "adapter", "--subspace", "subspace")
    written = run("inspect", "adapter", "--subspace", "subspace", "--html", "page.html")
    assert written == plain._replace(out=plain.out + "wrote page.html\n")
    adapter, subspace = csulora.load_adapter("adapter"), csulora.Subspace.open("subspace")
    assert (work / "page.html").read_text() == render(
        assess(adapter, subspace, csulora.Policy.none(keep_uncovered=("*",))), subspace
    )


def test_inspect_shows_a_policy_and_the_frontier_beside_it(work: Path, run: Run) -> None:
    adapter, subspace, policy = (
        csulora.load_adapter("adapter"),
        csulora.Subspace.open("subspace"),
        csulora.Policy.protect(3.0),
    )
    frontiers = {name: html_pages.frontier(subspace.sha256, name) for name in ("beside", "named")}
    policy.save("tuned.toml")
    frontiers["beside"].save(frontier_path(Path("tuned.toml")))
    frontiers["named"].save("other.json")
    command = ["inspect", "adapter", "--subspace", "subspace", "--html", "page.html", "--policy", "tuned.toml"]
    assert run(*command).code == 0
    assert (work / "page.html").read_text() == html_pages.rendered(adapter, subspace, policy, frontiers["beside"])
    assert run(*command, "--frontier", "other.json").code == 0
    assert (work / "page.html").read_text() == html_pages.rendered(adapter, subspace, policy, frontiers["named"])


def test_the_page_of_a_refused_adapter_is_written_and_says_why(work: Path, run: Run) -> None:
    result = run("inspect", "adapter", "--subspace", "subspace", "--html", "page.html", "--max-undo", -1e6)
    assert (result.code, result.out) == (3, "")
    assert "This adapter is refused." in (work / "page.html").read_text()


def test_a_page_in_the_way_of_something_else_is_not_written(work: Path, run: Run) -> None:
    before = tree(work)
    for options, reason in {
        "--html base": "base: is a directory",
        "--html nowhere/page.html": "nowhere: no such directory",
        "--html page.html --policy nothing.toml": "nothing.toml: no such policy; choose a preset (csulora, project",
        "--html page.html --frontier adapter/adapter_config.json": "frontier format None",
    }.items():
        result = run("inspect", "adapter", "--subspace", "subspace", *options.split())
        assert result.code == 4
        assert reason in result.err
    assert tree(work) == before


def test_correct_takes_a_policy_from_a_file_and_options_override_it(work: Path, run: Run) -> None:
    csulora.Policy.protect(2.0, rank=3).save("policy.toml")
    assert (
        run("correct", "adapter", "--subspace", "subspace", "-o", "out", "--policy", "policy.toml", "--off", 7).code
        == 0
    )
    policy = json.loads((work / "out" / "csulora_report.json").read_text())["policy"]
    assert (policy["aligned"], policy["partial"], policy["off"], policy["rank"]) == (2.0, 2.0, 7.0, 3)


def test_doctor_finds_a_working_installation(run: Run) -> None:
    result = run("doctor", "--json", "-")
    assert result.code == 0
    findings = {finding["what"]: finding for finding in json.loads(result.out)["findings"]}
    assert findings["csulora"]["value"] == csulora.__version__
    assert findings["self-test"]["ok"] is True


def test_doctor_fails_on_one_that_does_not_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("self-test", "wrong result", False)])
    result = run("doctor")
    assert (result.code, result.err) == (4, "")
    assert "WRONG" in result.out
    assert "this installation does not work" in result.out


def test_prints_its_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"csulora {csulora.__version__}\n", "")


def test_runs_as_a_module() -> None:
    assert finish(in_a_process("--version")) == Outcome(0, f"csulora {csulora.__version__}\n", "")


# What every command has in common

COMMANDS = {
    "extract": "extract base aligned -o new --rank 6",
    "verify": "verify subspace base aligned",
    "inspect": "inspect adapter",
    "inspect with a subspace file": "inspect adapter --subspace subspace",
    "inspect with a page": "inspect adapter --subspace subspace --html page",
    "correct": "correct adapter --subspace subspace -o out --policy csulora",
    "doctor": "doctor",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_nothing(work: Path, run: Run, command: str) -> None:
    assert run(*COMMANDS[command].split(), "--quiet") == Outcome(0, "", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_plain_text(work: Path, run: Run, command: str) -> None:
    result = run(*COMMANDS[command].split())
    assert result.code == 0
    assert "\x1b" not in result.out
    assert result.out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_json_goes_to_a_file_or_alone_to_stdout(work: Path, run: Run, command: str) -> None:
    to_file = run(*COMMANDS[command].split(), "--json", "report")
    assert to_file.out == run(*COMMANDS[command].split()).out
    to_stdout = run(*COMMANDS[command].split(), "--json", "-", "--quiet")
    assert to_stdout.out == (work / "report").read_text()
    assert to_stdout == run(*COMMANDS[command].split(), "--json", "-")
    assert isinstance(json.loads(to_stdout.out), dict)


@pytest.mark.parametrize("command", ["extract", "correct"])
def test_the_same_command_twice_writes_the_same_bytes(work: Path, run: Run, command: str) -> None:
    run(*COMMANDS[command].split(), "--json", "report")
    first = tree(work)
    run(*COMMANDS[command].split(), "--json", "report")
    assert tree(work) == first


STRANGE = "up[/red]:smile:_proj"


def save_strange_model_pair(directory: Path) -> None:
    """Two checkpoints with a name that means something to the library that draws tables."""
    weights = {f"model.layers.0.mlp.{STRANGE}.weight": factories.gaussian(24, 16, seed=0)}
    factories.save_checkpoint(directory / "strange", weights)
    factories.save_checkpoint(directory / "stranger", factories.moved(weights))


def test_names_are_shown_as_they_are(work: Path, run: Run) -> None:
    save_strange_model_pair(work)
    result = run("extract", "strange", "stranger", "-o", "new", "--rank", 6)
    assert (result.code, result.err) == (0, "")
    assert STRANGE in result.out


# What is refused

USAGE = [
    "extract base aligned",
    "extract base -o new",
    "extract base aligned -o new --rank 0",
    "extract base aligned -o new --rank many",
    "extract base aligned -o new --rank auto --energy 0.5",
    "extract base aligned -o new --rank 4 --energy 0.5",
    "extract base aligned -o new --max-rank 4",
    "extract base aligned -o new --energy 1.5",
    "extract base aligned -o new --energy 0",
    "extract base aligned -o new --energy nan",
    "extract base aligned -o new --dtype f64",
    "extract base aligned -o new --device tpu",
    "extract base aligned -o new --seed -1",
    "inspect adapter --html page.html",
    "inspect adapter --policy csulora",
    "inspect adapter --subspace subspace --frontier f.json",
    "inspect adapter --subspace subspace --frontier frontier.json",
    "inspect adapter --subspace subspace --max-undo nan",
    "inspect adapter --subspace subspace --weights 1,nan",
    "inspect adapter --subspace subspace --weights 1,1",
    "correct adapter --subspace subspace --policy csulora",
    "correct adapter -o out --policy csulora",
    "correct adapter --subspace subspace -o out",
    "guard in out --subspace subspace",
    "correct adapter --subspace subspace -o out --rank some --policy csulora",
    "correct adapter --subspace subspace -o out --rank 0 --policy csulora",
    "correct adapter --subspace subspace -o out --off -1 --policy csulora",
    "correct adapter --subspace subspace -o out --off nan --policy csulora",
    "correct adapter --subspace subspace -o out --max-undo inf --policy csulora",
    "correct adapter --subspace subspace -o out --uncovered keep --policy csulora",
    "correct adapter --subspace subspace -o out --format gguf2 --policy csulora",
    "correct adapter --subspace subspace -o out --nonsense --policy csulora",
    "frobnicate",
]


ADVICE = {
    "inspect adapter --policy csulora": "--policy: needs --subspace FILE, which `csulora extract` makes",
    "inspect adapter --max-undo 0.5 --html p.html": "--max-undo, --html: needs --subspace FILE",
    "inspect adapter adapter": "the sum of several adapters: needs --subspace FILE",
    "inspect adapter --subspace subspace --weights 1,1": "--weights has 2 numbers for 1 adapters; give one for each",
    "inspect adapter --subspace subspace --frontier f.json": "are shown on a page; name it with --html",
    "correct adapter --subspace subspace -o out --policy csulora --format gguf": "another format (--format peft)",
}


@pytest.mark.parametrize("command", ADVICE)
def test_wrong_usage_is_told_what_to_do(work: Path, run: Run, command: str) -> None:
    result = run(*command.split())
    assert (result.code, ADVICE[command] in result.err) == (2, True), result.err


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_exits_with_2(work: Path, run: Run, command: str) -> None:
    before = tree(work)
    result = run(*command.split())
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Usage: csulora ")
    assert "Traceback" not in result.err
    assert tree(work) == before


def test_a_penalty_is_no_option_where_overrides_would_hide_it(work: Path, run: Run) -> None:
    (work / "policy.toml").write_text(
        'overrides = [{match = "*", gains = {aligned = 1, left = 1, right = 1, off = 0}}]'
    )
    command = "correct adapter --subspace subspace --policy policy.toml -o"
    assert run(*command.split(), "out", "--off", "1").code == 2
    assert run(*command.split(), "out", "--rank", "exact", "--max-undo", "100").code == 0


def test_a_report_is_there_though_nobody_reads_what_is_printed(
    work: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert (
        run(
            "correct", "adapter", "--subspace", "subspace", "-o", "out", "--policy", "csulora", "--json", "report.json"
        ).code
        == 0
    )
    assert json.loads((work / "report.json").read_text())["modules"]


BAD_INPUT = {
    "extract nowhere aligned -o new": "nowhere: neither a local directory nor to be had",
    "extract org/model aligned -o new": "org/model: neither a local directory nor to be had",
    "extract base adapter -o new": "adapter: holds an adapter; name the model's directory",
    "extract base subspace -o new": "subspace: not a GGUF file",
    "extract base spoiled -o new": "model.layers.1.self_attn.q_proj: base or aligned holds NaN",
    "extract base damaged -o new": "damaged/model.safetensors: not a readable safetensors file",
    "extract base smaller -o new": "smaller: tensor model.layers.1.mlp.down_proj.weight is missing, but base has it",
    "extract base wider -o new": "tensor model.layers.0.mlp.down_proj.weight is [48, 64] in base base and [64, 64]",
    "extract base aligned -o new --modules q_porj": "'q_porj'; there is lm_head, for instance",
    "extract base aligned -o missing/new": "/missing: no such directory",
    "extract base aligned -o adapter": "adapter: is a directory",
    "extract base aligned -o new --json missing/report": "/missing: no such directory",
    "extract base aligned -o new --json base": "base: is a directory",
    "extract base aligned -o new --seed 99999999999999999999": "seed is 99999999999999999999",
    "verify nowhere base aligned": "nowhere: no such file; make a subspace file with `csulora extract`",
    "verify base/model.safetensors base aligned": "base/model.safetensors: not a subspace file",
    "verify base/config.json base aligned": "base/config.json: not a subspace file, but of another format",
    "verify subspace base smaller": "smaller: tensor model.layers.1.mlp.down_proj.weight is missing",
    "inspect nowhere": "nowhere: no such adapter; name its directory, a GGUF file, or a hub id",
    "inspect subspace": "subspace: not a GGUF file",
    "inspect base": "base: no adapter: it holds a model (config.json)",
    "inspect adapter --subspace adapter": "adapter: is a directory; name a subspace file",
    "correct nowhere --subspace subspace -o out --policy csulora": "nowhere: no such adapter",
    "correct adapter --subspace nowhere -o out --policy csulora": "nowhere: no such file",
    "correct adapter --subspace subspace -o base --policy csulora": "base: exists and was not written by csulora",
    "correct adapter --subspace subspace -o adapter --policy csulora": "adapter: is read",
    "correct adapter --subspace subspace -o subspace --policy csulora": "subspace: is read, or lies in what is read",
    "correct adapter --subspace subspace -o out --json subspace --policy csulora": "subspace: is read, or lies in",
    "correct adapter --subspace subspace -o out --policy csulora --sign-with tuned.toml --json tuned.toml": "is read",
    "correct adapter --subspace subspace -o / --policy csulora": "/: is a directory; name what to write in it",
    "inspect adapter --subspace subspace --json subspace": "subspace: is read, or lies in",
    "inspect adapter --json adapter/adapter_config.json": "is read, or lies in what is read",
    "verify subspace base aligned --json base/config.json": "is read, or lies in what is read",
    "extract base aligned -o aligned/config.json": "is read, or lies in what is read",
    "extract base aligned -o new --json new": "new: is written, or lies in what is written",
    "export adapter -o base/model.safetensors --base-model base": "is read, or lies in what is read",
    "correct adapter --subspace subspace -o out --policy nowhere": "nowhere: no such policy; choose a preset (csulora",
    "correct adapter --subspace subspace -o out --policy subspace": "subspace: not a readable TOML file",
    "correct adapter --subspace subspace -o out --policy bad.toml": "bad.toml: policy aligned is 'x'; it must be a",
    "correct adapter --subspace subspace -o out --policy strange.toml": "override 'k': matches no module of the",
    "correct tall --subspace subspace -o out --policy csulora": f"module {Q} updates a [96, 48] matrix, but",
    "correct nan --subspace subspace -o out --policy csulora": "holds NaN or infinity",
}

REFUSED = {
    "extract base base -o new": "base and base do not differ in any selected matrix",
    "correct uncovered --subspace subspace -o out --policy csulora": "the subspace file does not cover module lm_head",
    "correct strange --subspace subspace -o out --keep-uncovered * --policy csulora": "the subspace file covers none",
    "inspect strange --subspace subspace": "strange: the subspace file covers none of the adapter's modules",
    "correct adapter --subspace subspace -o out --max-undo -100 --policy csulora": "adapter: module ",
    "correct adapter --subspace subspace -o out --policy tuned.toml": "the policy was tuned for the subspace file 0000",
    "correct dora --subspace subspace -o out --policy csulora": "use_dora",
}


@pytest.fixture
def bad(work: Path) -> Path:
    """The working directory with everything that the bad commands need besides."""
    weights = factories.moved(factories.llama_weights())
    spoiled = weights | {"model.layers.1.self_attn.q_proj.weight": weights[f"{Q}.weight"] * float("nan")}
    factories.save_checkpoint(work / "spoiled", spoiled)
    damaged = factories.save_checkpoint(work / "damaged", weights) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    factories.save_checkpoint(work / "smaller", factories.llama_weights(layers=1))
    factories.save_checkpoint(work / "wider", factories.llama_weights(width=64))
    factories.save_adapter(work / "tall", {Q: (96, 48)})
    file = factories.save_adapter(work / "nan", {Q: (48, 48)}) / "adapter_model.safetensors"
    tensors = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    factories.save_adapter(work / "uncovered", {Q: (48, 48), "lm_head": (40, 48)})
    factories.save_adapter(work / "strange", {"h.0.attn.c_attn": (48, 48)})
    factories.save_adapter(work / "dora", {Q: (48, 48)}, use_dora=True)
    (work / "bad.toml").write_text('aligned = "x"')
    (work / "strange.toml").write_text(
        "overrides = [{match = 'k', gains = {aligned = 1, left = 1, right = 1, off = 1}}]"
    )
    (work / "tuned.toml").write_text(f'subspace_sha256 = "{"0" * 64}"')
    return work


def test_a_preset_is_no_place(work: Path, run: Run) -> None:
    (work / "protect").mkdir()
    result = run("correct adapter --subspace subspace --policy protect -o protect/new")
    assert result.code == 0, result.err


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_4_and_nothing_is_written(bad: Path, run: Run, command: str) -> None:
    before = tree(bad)
    result = run(*command.split())
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("csulora: error: ")
    assert BAD_INPUT[command] in result.err
    assert result.err.count("\n") == 1
    assert tree(bad) == before
    assert not list(bad.glob("*.partial"))


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_refused_is_one_line_and_exit_code_3_and_nothing_is_written(bad: Path, run: Run, command: str) -> None:
    before = tree(bad)
    result = run(*command.split())
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("csulora: refused: ")
    assert REFUSED[command] in result.err
    assert result.err.count("\n") == 1
    assert tree(bad) == before
    assert not list(bad.glob("*.partial"))


def test_an_error_is_one_printable_line_whatever_it_quotes(work: Path, run: Run) -> None:
    result = run("inspect", "no\n\x1b[31msuch\tname")
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("csulora: error: no\\n\\x1b[31msuch\\tname: no such adapter; ")
    assert result.err.count("\n") == 1


def test_a_device_is_never_replaced(work: Path, run: Run) -> None:
    os.mkfifo("pipe")
    for option in ("-o", "--json"):
        result = run("extract", "base", "aligned", "-o", "new", option, "pipe")
        assert (result.code, result.out) == (4, "")
        assert "pipe: is not a regular file" in result.err
    assert not Path("new").exists()


def test_a_place_that_cannot_be_written_to_is_one_line(work: Path, run: Run) -> None:
    for command in (
        "extract base aligned -o /proc/new",
        "correct adapter --subspace subspace -o /proc/out --policy none",
    ):
        result = run(*command.split())
        assert (result.code, result.out) == (4, "")
        assert result.err.startswith("csulora: error: ")
        assert result.err.count("\n") == 1


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize("command", ["extract", "correct"])
def test_a_full_disk_is_one_line(work: Path, command: str) -> None:
    result = finish(in_a_process(*COMMANDS[command].split(), preexec_fn=limit_file_size))
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("csulora: error: ")
    assert "File too large" in result.err
    assert result.err.count("\n") == 1
    assert not (work / "new").exists()
    assert not (work / "out").exists()


# Memory and time


def peak_memory(*arguments: object) -> int:
    """The most memory, in KiB, that a command had at once."""
    # Not getrusage: that counts the process it was started from, too.
    program = "import atexit, csulora.cli.app; atexit.register(lambda: print(open('/proc/self/status').read()))"
    command = [sys.executable, "-c", f"{program}; csulora.cli.app.main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return int(status.split("VmHWM:")[1].split()[0])


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 8):
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
        base = {name: factories.gaussian(2048, 1024, seed=i) for i, name in enumerate(names)}
        factories.save_checkpoint(tmp_path / f"base{layers}", base)
        factories.save_checkpoint(tmp_path / f"aligned{layers}", factories.moved(base))
        models = tmp_path / f"base{layers}", tmp_path / f"aligned{layers}"
        peaks.append(peak_memory("extract", *models, "-o", tmp_path / "subspace", "--rank", 4, "-q"))
    assert peaks[1] <= 1.1 * peaks[0]  # the weights of six more layers would be 96 MiB more


# Runs that are interrupted


@pytest.fixture
def large(tmp_path: Path) -> list[object]:
    """Arguments of an extraction that takes long enough to be interrupted."""
    weights = factories.llama_weights(layers=LLAMA_LAYERS, width=160, hidden=240)
    factories.save_checkpoint(tmp_path / "base", weights)
    factories.save_checkpoint(tmp_path / "aligned", factories.moved(weights))
    return ["extract", tmp_path / "base", tmp_path / "aligned", "-o", tmp_path / "subspace", "--rank", 16, "-q"]


def finished_modules(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of modification of every finished module's file."""
    modules = output.with_name(f"{output.name}.partial").glob("[0-9a-f]*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in modules}


def signal_after(process: subprocess.Popen[str], output: Path, modules: int, number: signal.Signals) -> None:
    """Send a signal once so many modules are finished."""
    deadline = time.monotonic() + 60
    while len(finished_modules(output)) < modules:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)


def test_a_killed_run_continues_where_it_was(large: list[object], tmp_path: Path) -> None:
    output = tmp_path / "subspace"
    kept: dict[str, tuple[int, int]] = {}
    for modules in sorted(random.Random(0).sample(range(1, LLAMA_MODULES - 20), 3)):
        process = in_a_process(*large)
        signal_after(process, output, modules, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        finished = finished_modules(output)
        assert len(finished) >= modules
        assert {name: finished[name] for name in kept} == kept
        kept = finished
    assert finish(in_a_process(*large)) == Outcome(0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base", "subspace"]
    resumed = output.read_bytes()
    output.unlink()
    assert finish(in_a_process(*large)) == Outcome(0, "", "")
    assert resumed == output.read_bytes()


def test_an_interrupted_run_says_that_it_can_be_continued(large: list[object], tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        # A shell that runs this in the background may have made it ignore the signal.
        process = in_a_process(*large, stderr=stderr, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        signal_after(process, tmp_path / "subspace", 3, signal.SIGINT)
        assert process.returncode == 130
        stderr.seek(0)
        assert stderr.read() == "csulora: interrupted: finished modules are kept; run the same command to continue\n"
    assert 3 <= len(finished_modules(tmp_path / "subspace")) < LLAMA_MODULES
    assert not (tmp_path / "subspace").exists()


def test_a_terminal_gets_a_progress_bar(work: Path) -> None:
    save_strange_model_pair(work)
    terminal, its_end = pty.openpty()
    process = in_a_process("extract", "strange", "stranger", "-o", "new", "--rank", 6, stderr=its_end)
    os.close(its_end)
    written = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not chunk:
            break
        written += chunk
    os.close(terminal)
    assert finish(process).code == 0
    assert f"extracting model.layers.0.mlp.{STRANGE}".encode() in written
    assert b"\x1b[" in written


def test_names_that_are_not_utf8_are_written_as_escapes(work: Path) -> None:
    adapter, corrected = os.fsdecode(b"adapter-\xff"), os.fsdecode(b"corrected-\xfe")
    Path("adapter").rename(adapter)

    done = finish(
        in_a_process(
            "correct", adapter, "--subspace", "subspace", "-o", corrected, "--policy", "csulora", "--json", "-"
        )
    )
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["adapter"] == "adapter-\udcff"
    assert json.loads(Path(corrected, "csulora_report.json").read_bytes())["adapter"] == "adapter-\udcff"
    assert csulora.load_adapter(corrected).modules

    table = finish(in_a_process("inspect", adapter, "--subspace", "subspace"))
    assert (table.code, table.err) == (0, "")
    absent = finish(in_a_process("inspect", os.fsdecode(b"\xff")))
    assert absent.code == 4
    assert absent.err.count("\n") == 1
