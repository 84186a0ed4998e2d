import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import csulora
import factories
import gguf_files
from commands import Outcome, Run
from csulora.errors import ChangedError, InputError, OtherSignerError, UnsignedError
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options

pytest.importorskip("model_signing")
from csulora.serving.provenance import ADAPTER, SUBSPACE, Ingredients, Signer, verified_provenance
from csulora.serving.signatures import Verifier
from signing import ed25519_key_pair, key_pair, sign

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the keys of a publisher, of the platform, and of somebody else."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("publisher", "platform", "other"):
        key_pair(directory, name)
    return directory


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("subspace")
    csulora.extract(*factories.model_pair(directory), rank=4, output=directory / "subspace.safetensors")
    return directory / "subspace.safetensors"


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    """An adapter signed by its publisher."""
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    sign(path, keys / "publisher.key")
    return path


@pytest.fixture
def written(signed: Path, subspace: Path, keys: Path, tmp_path: Path, run: Run) -> Path:
    """The corrected adapter, signed by the platform."""
    assert corrected(run, signed, subspace, keys, tmp_path / "out").code == 0
    return tmp_path / "out"


def corrected(run: Run, adapter: Path, subspace: Path, keys: Path, output: Path) -> Outcome:
    signatures = ("--require-signature", keys / "publisher.pub", "--sign-with", keys / "platform.key")
    return run("correct --policy csulora", adapter, "--subspace", subspace, "-o", output, *signatures)


def sha256sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_sign_correct_sign_verify(written: Path, signed: Path, subspace: Path, keys: Path, run: Run) -> None:
    verified = run("verify", written, "--require-signature", keys / "platform.pub")

    assert verified.code == 0
    assert f"written by csulora {csulora.__version__}" in verified.out
    for file in (signed / "adapter_config.json", signed / "adapter_model.safetensors", subspace):
        assert sha256sum(file) in verified.out
    assert sha256sum(written / "adapter_model.safetensors") in verified.out
    assert run("correct --policy none", written, "--subspace", subspace, "-o", written.parent / "again").code == 0


def test_the_statement_binds_every_input_and_output(written: Path, signed: Path, subspace: Path, keys: Path) -> None:
    found = verified_provenance(written, Verifier.open(keys / "platform.pub"))

    assert found.version == csulora.__version__
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert found.ingredients.digests[ADAPTER + name] == sha256sum(signed / name)
    assert found.ingredients.digests[SUBSPACE] == sha256sum(subspace)
    assert found.ingredients.digests["policy.toml"] == hashlib.sha256(found.ingredients.policy.encode()).hexdigest()
    assert found.outputs == {
        file.name: sha256sum(file)
        for file in written.iterdir()
        if file.name not in ("model.sig", "csulora.intoto.jsonl")
    }


def test_the_output_passes_where_a_signature_of_the_platform_is_required(
    written: Path, subspace: Path, keys: Path
) -> None:
    gate = Gate.open(subspace, "none", require_signature=keys / "platform.pub")

    with gate.decision(written) as decision:
        assert decision.correct(decision.read(written))


@pytest.mark.parametrize("name", ["README.md", "csulora_report.json", "csulora.intoto.jsonl", "adapter_config.json"])
def test_one_byte_of_the_output_that_changed_is_refused(name: str, written: Path, keys: Path, run: Run) -> None:
    content = bytearray((written / name).read_bytes())
    content[-1] ^= 1
    (written / name).write_bytes(content)

    outcome = run("verify", written, "--require-signature", keys / "platform.pub")

    assert outcome.code == 3
    assert f"{name} is not what was signed" in outcome.err


def test_output_signed_again_by_somebody_else_is_refused(written: Path, keys: Path) -> None:
    with pytest.raises(OtherSignerError, match=r"model\.sig: is not a signature by"):
        verified_provenance(written, Verifier.open(keys / "other.pub"))
    sign(written, keys / "other.key")
    with pytest.raises(OtherSignerError, match=r"csulora\.intoto\.jsonl: is not signed by"):
        verified_provenance(written, Verifier.open(keys / "other.pub"))


def test_a_statement_about_other_files_is_refused(written: Path, keys: Path) -> None:
    (written / "README.md").write_text("another card")
    sign(written, keys / "platform.key")

    with pytest.raises(ChangedError, match=r"README\.md is not what csulora\.intoto\.jsonl speaks of"):
        verified_provenance(written, Verifier.open(keys / "platform.pub"))


def test_a_missing_or_malformed_statement_has_its_own_reason(signed: Path, keys: Path) -> None:
    verifier = Verifier.open(keys / "publisher.pub")

    with pytest.raises(UnsignedError, match=r"csulora\.intoto\.jsonl is missing"):
        verified_provenance(signed, verifier)
    for text in ("{", "{}", '{"payload": "e30=", "payloadType": "text/plain", "signatures": []}'):
        (signed / "csulora.intoto.jsonl").write_text(text)
        sign(signed, keys / "publisher.key")
        with pytest.raises(InputError):
            verified_provenance(signed, verifier)


def test_a_signed_output_is_replaced_by_an_unsigned_one(written: Path, signed: Path, subspace: Path, run: Run) -> None:
    assert run("correct --policy project", signed, "--subspace", subspace, "-o", written).code == 0

    assert not (written / "model.sig").exists()


def test_unsigned_input_is_refused_and_writes_nothing(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path, run: Run
) -> None:
    (signed / "model.sig").unlink()

    outcome = corrected(run, signed, subspace, keys, tmp_path / "out")

    assert outcome.code == 3
    assert "is not signed" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_has_statement_and_signature_beside_it(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path, run: Run
) -> None:
    model = ("--base-model", gguf_files.save_model(tmp_path / "model.gguf", factories.llama_weights()))
    output = tmp_path / "out.gguf"
    signatures = ("--require-signature", keys / "publisher.pub", "--sign-with", keys / "platform.key")

    assert run("correct --policy csulora", signed, "--subspace", subspace, "-o", output, *model, *signatures).code == 0

    assert run("verify", output, "--require-signature", keys / "platform.pub").code == 0
    assert Verifier.open(keys / "platform.pub").verify(output).digests == {"out.gguf": sha256sum(output)}
    theirs = run("verify", output, "--require-signature", keys / "other.pub")
    assert theirs.code == 3
    output.write_bytes(output.read_bytes()[:-1] + b"x")
    changed = run("verify", output, "--require-signature", keys / "platform.pub")
    assert changed.code == 3
    assert "out.gguf is not what was signed" in changed.err


def test_the_guard_reads_what_is_signed_and_signs_what_it_writes(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path
) -> None:
    incoming, outgoing = tmp_path / "incoming", tmp_path / "outgoing"
    incoming.mkdir()
    signed.rename(incoming / "good")
    factories.save_adapter(incoming / "bad", MODULES)
    gate = Gate.open(
        subspace, "csulora", require_signature=keys / "publisher.pub", sign_with=str(keys / "platform.key")
    )

    def scan() -> None:
        options = Options(settle=0, patience=0)
        assert DirectoryGuard(incoming, outgoing, gate, options, say=lambda line: None).run(watch=False)

    scan()

    assert verified_provenance(outgoing / "good", Verifier.open(keys / "platform.pub"))
    refusal = json.loads((outgoing / "bad.refused.json").read_text())
    assert refusal["reason_code"] == "unsigned"

    sign(incoming / "bad", keys / "other.key")
    scan()
    assert json.loads((outgoing / "bad.refused.json").read_text())["reason_code"] == "other-signer"

    sign(incoming / "bad", keys / "publisher.key")
    scan()
    assert not (outgoing / "bad.refused.json").exists()
    assert verified_provenance(outgoing / "bad", Verifier.open(keys / "platform.pub"))


def test_one_key_signs_file_and_statement_whatever_becomes_of_its_file(keys: Path, tmp_path: Path) -> None:
    shutil.copy(keys / "platform.key", tmp_path / "signing.key")
    signer = Signer(tmp_path / "signing.key")
    shutil.copy(keys / "other.key", tmp_path / "signing.key")
    path = factories.save_adapter(tmp_path / "written", MODULES)
    signer.sealing(Ingredients({}, ""))(path)
    signer.sealing(Ingredients({}, ""))(path)
    assert verified_provenance(path, Verifier.open(keys / "platform.pub")).outputs


def test_what_cannot_sign_is_refused_at_once(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text.key").write_text("no key")
    for file in (tmp_path / "text.key", keys / "publisher.pub"):
        with pytest.raises(InputError, match="cannot sign"):
            Signer(file)
    with pytest.raises(InputError, match="it is no key of P-256, P-384 or P-521"):
        Signer(ed25519_key_pair(tmp_path)[0])
    with pytest.raises(InputError, match="no such file"):
        Signer(tmp_path / "none.key")


def test_without_model_signing_the_error_names_the_extra(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing.verifying", None)

    outcome = corrected(run, signed, subspace, keys, tmp_path / "out")

    assert outcome.code == 4
    assert "pip install 'csulora[signing]'" in outcome.err


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_pass_on_who_must_sign(server: str, keys: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """To processes that may work elsewhere, so a file as an absolute path and an identity as it is."""
    monkeypatch.chdir(keys)
    monkeypatch.setattr(f"csulora.hooks.{server}.launcher.serve", lambda arguments: None)
    identity = "identity=ci@example.com,issuer=https://example.com"
    for variable in ("CSULORA_REQUIRE_SIGNATURE", "CSULORA_REQUIRE_RULES_SIGNATURE"):
        monkeypatch.setenv(variable, "nobody")  # what the command sets is undone afterwards

    signers = ("--require-signature", "publisher.pub", "--require-rules-signature", identity)
    assert run(f"{server}-serve", *signers).code == 0

    assert os.environ["CSULORA_REQUIRE_SIGNATURE"] == str(keys / "publisher.pub")
    assert os.environ["CSULORA_REQUIRE_RULES_SIGNATURE"] == identity


@pytest.mark.parametrize("option", ["--require-signature", "--require-rules-signature"])
def test_a_server_takes_no_empty_signer(option: str, run: Run) -> None:
    done = run("vllm-serve model --subspace s --policy csulora", option, "")
    assert (done.code, "the name of who must sign is empty" in done.err) == (2, True)
