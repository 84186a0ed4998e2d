import os
import shutil
from pathlib import Path

import pytest
import torch

import csulora
import factories
from csulora.errors import (
    ChangedError,
    InputError,
    NotCoveredError,
    OtherSignerError,
    RefusedError,
    UnsafeFileError,
    UnsignedError,
)
from csulora.serving.admission import Admission, Terms
from csulora.serving.gate import Gate
from csulora.serving.guard import DirectoryGuard, Options

pytest.importorskip("model_signing")
from csulora.serving.signatures import Verifier, signature_file_of
from csulora.serving.trust import Trust
from signing import certificates, ed25519_key_pair, key_pair, sign, sign_with_certificate

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the keys of ours and of theirs."""
    directory = tmp_path_factory.mktemp("keys")
    key_pair(directory, "ours")
    key_pair(directory, "theirs")
    return directory


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    """An adapter signed by us."""
    path = factories.save_adapter(tmp_path / "adapter", MODULES)
    sign(path, keys / "ours.key")
    return path


def read(path: Path, subspace: Path, trusted: Path | str) -> csulora.Adapter:
    """Read an adapter through a gate that wants it signed."""
    with Gate.open(subspace, "protect", require_signature=trusted).decision(path) as decision:
        return decision.correct(decision.read(path))[0]


def test_a_signed_adapter_passes(signed: Path, subspace: Path, keys: Path) -> None:
    assert read(signed, subspace, keys / "ours.pub").modules


def test_an_unsigned_adapter_is_refused(signed: Path, subspace: Path, keys: Path) -> None:
    (signed / "model.sig").unlink()

    with pytest.raises(UnsignedError, match=r"is not signed: .*model\.sig is missing; have it signed by the keys in"):
        read(signed, subspace, keys / "ours.pub")


def test_a_signature_by_another_key_is_refused(signed: Path, subspace: Path, keys: Path) -> None:
    sign(signed, keys / "theirs.key")

    with pytest.raises(OtherSignerError, match=r"model\.sig: is not a signature by the keys in .*ours\.pub"):
        read(signed, subspace, keys / "ours.pub")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_one_byte_that_changed_is_refused(name: str, signed: Path, subspace: Path, keys: Path) -> None:
    content = bytearray((signed / name).read_bytes())
    content[-1] ^= 1
    (signed / name).write_bytes(content)

    with pytest.raises(ChangedError, match=f"{name} is not what was signed"):
        read(signed, subspace, keys / "ours.pub")


def test_a_file_that_the_signature_does_not_cover_is_refused(signed: Path, subspace: Path, keys: Path) -> None:
    (signed / "extra.json").write_text("{}")

    with pytest.raises(NotCoveredError, match=r"does not cover extra\.json"):
        read(signed, subspace, keys / "ours.pub")


def test_of_many_uncovered_files_a_few_are_named(signed: Path, subspace: Path, keys: Path) -> None:
    for number in range(7):
        (signed / f"extra{number}").touch()

    with pytest.raises(
        NotCoveredError, match="does not cover extra0, extra1, extra2, extra3, extra4 and 2 more; remove"
    ):
        read(signed, subspace, keys / "ours.pub")


def test_a_pipe_is_called_that_and_not_another_signer(signed: Path, keys: Path) -> None:
    os.mkfifo(signed / "pipe")

    with pytest.raises(UnsafeFileError, match="holds what is neither file nor directory; remove it"):
        Verifier.open(keys / "ours.pub").verify(signed)


def test_the_guard_decides_anew_once_a_file_in_a_folder_is_removed(signed: Path, subspace: Path, keys: Path) -> None:
    incoming, outgoing = signed.parent / "in", signed.parent / "out"
    incoming.mkdir()
    upload = signed.rename(incoming / "adapter")
    (upload / "folder").mkdir()
    (upload / "folder" / "extra").touch()
    gate = Gate.open(subspace, "csulora", route="guard", require_signature=keys / "ours.pub")

    def summary() -> str:
        guard = DirectoryGuard(incoming, outgoing, gate, Options(settle=0.0, patience=0.0), lambda _: None)
        guard.run(watch=False)
        return guard.summary

    assert summary() == "1 refused"
    (upload / "folder" / "extra").unlink()
    assert summary() == "1 corrected"


def test_a_missing_file_is_refused(signed: Path, subspace: Path, keys: Path) -> None:
    (signed / "adapter_config.json").unlink()

    with pytest.raises(ChangedError, match=r"adapter_config\.json, which was signed, is missing"):
        read(signed, subspace, keys / "ours.pub")


def test_weights_that_the_signer_ignored_are_refused(signed: Path, subspace: Path, keys: Path) -> None:
    sign(signed, keys / "ours.key", ("adapter_model.safetensors",))

    with pytest.raises(NotCoveredError, match=r"does not cover adapter_model\.safetensors"):
        read(signed, subspace, keys / "ours.pub")


def test_what_one_signature_ignores_is_not_ignored_for_the_next(signed: Path, keys: Path, tmp_path: Path) -> None:
    (signed / "notes.json").write_text("{}")
    other = tmp_path / "other"
    shutil.copytree(signed, other)
    sign(signed, keys / "ours.key", ("notes.json",))
    verifier = Verifier.open(keys / "ours.pub")

    verifier.verify(signed)

    with pytest.raises(NotCoveredError, match=r"notes\.json"):
        verifier.verify(other)


def test_what_is_exchanged_between_verification_and_reading_is_refused(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = factories.save_adapter(tmp_path / "other", MODULES, seed=9)
    verify = Verifier.verify

    def verify_and_exchange(self: Verifier, path: Path) -> object:
        found = verify(self, path)
        shutil.copy(other / "adapter_model.safetensors", signed)
        return found

    monkeypatch.setattr(Verifier, "verify", verify_and_exchange)

    with pytest.raises(ChangedError, match="changed while it was read"):
        read(signed, subspace, keys / "ours.pub")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"verificationMaterial": {}}'])
def test_a_malformed_signature_is_its_own_error(content: bytes, signed: Path, keys: Path) -> None:
    (signed / "model.sig").write_bytes(content)

    with pytest.raises(InputError, match="is not a signature of model-signing"):
        Verifier.open(keys / "ours.pub").verify(signed)


def test_any_of_several_keys_will_do(signed: Path, keys: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pub"
    both.write_bytes((keys / "theirs.pub").read_bytes() + (keys / "ours.pub").read_bytes())
    verifier = Verifier.open(both)

    assert set(verifier.verify(signed).digests) == {"adapter_config.json", "adapter_model.safetensors"}

    (signed / "extra").touch()
    with pytest.raises(NotCoveredError):  # and not that one of the keys is another
        verifier.verify(signed)


def test_a_certificate_that_a_root_vouches_for_will_do(signed: Path, subspace: Path, tmp_path: Path) -> None:
    root, leaf, key = certificates(tmp_path)
    sign_with_certificate(signed, key, leaf, [root])

    assert read(signed, subspace, root).modules

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OtherSignerError, match=r"is not a signature by the certificates in .*other/root\.pem"):
        read(signed, subspace, certificates(other)[0])


def test_an_identity_needs_a_trust_configuration(tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_text("{}")

    with pytest.raises(InputError, match="Sigstore's trust configuration cannot be used"):
        Trust.open(f"identity=ci@example.com,issuer=https://example.com,trust={tmp_path / 'trust.json'}")


def test_a_server_asks_again_once_an_adapter_is_signed(signed: Path, subspace: Path, keys: Path) -> None:
    admission = Admission(Gate.open(subspace, "csulora", require_signature=keys / "ours.pub"))
    terms = Terms(torch.float32, 64)

    assert (admission.admit("name", lambda: signed, terms, reload=True) / "adapter_config.json").exists()
    sign(signed, keys / "theirs.key")
    with pytest.raises(OtherSignerError):
        admission.admit("name", lambda: signed, terms, reload=True)
    sign(signed, keys / "ours.key")
    assert admission.admit("name", lambda: signed, terms, reload=True)


def test_servers_are_configured_by_environment(signed: Path, subspace: Path, keys: Path) -> None:
    variables = {
        "CSULORA_SUBSPACE": str(subspace),
        "CSULORA_POLICY": "csulora",
        "CSULORA_REQUIRE_SIGNATURE": str(keys / "theirs.pub"),
    }

    with pytest.raises(OtherSignerError), Gate.from_environment(variables).decision(signed) as decision:
        decision.read_directory(signed)
    with pytest.raises(UnsignedError, match=r"subspace\.safetensors: is not signed"):
        Gate.from_environment(variables | {"CSULORA_REQUIRE_RULES_SIGNATURE": str(keys / "ours.pub")})


def test_a_symbolic_link_is_refused(signed: Path, keys: Path, tmp_path: Path) -> None:
    (signed / "adapter_config.json").rename(tmp_path / "config.json")
    (signed / "adapter_config.json").symlink_to(tmp_path / "config.json")

    with pytest.raises(RefusedError, match="holds a symbolic link, which no signature covers"):
        Verifier.open(keys / "ours.pub").verify(signed)


def test_subspace_file_and_policy_must_be_signed_where_rules_are(
    signed: Path, subspace: Path, keys: Path, tmp_path: Path
) -> None:
    rules, policy = tmp_path / "subspace.safetensors", tmp_path / "policy.toml"
    shutil.copy(subspace, rules)
    csulora.Policy.project().save(policy)
    trusted = keys / "theirs.pub"

    with pytest.raises(UnsignedError, match=r"subspace\.safetensors: is not signed"):
        Gate.open(rules, policy, require_rules_signature=trusted)
    sign(rules, keys / "theirs.key")
    with pytest.raises(UnsignedError, match=r"policy\.toml: is not signed"):
        Gate.open(rules, policy, require_rules_signature=trusted)
    sign(policy, keys / "theirs.key")

    assert Gate.open(rules, policy, require_rules_signature=trusted).policy == csulora.Policy.project()
    assert Gate.open(rules, "project", require_rules_signature=trusted).policy == csulora.Policy.project()
    policy.write_text(policy.read_text() + "\n")
    with pytest.raises(ChangedError, match=r"policy\.toml is not what was signed"):
        Gate.open(rules, policy, require_rules_signature=trusted)


def test_fingerprint_names_who_must_sign(subspace: Path, keys: Path) -> None:
    gates = [Gate.open(subspace, "csulora", require_signature=key) for key in (None, keys / "ours.pub")]

    assert gates[0].fingerprint != gates[1].fingerprint


def test_what_names_no_signer_is_refused(tmp_path: Path, keys: Path) -> None:
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(InputError, match="must hold public keys or certificates"):
        Trust.open(tmp_path / "text.pem")
    with pytest.raises(InputError, match="no such file; a signer is given as"):
        Trust.open("nobody@example.com")
    (tmp_path / "bad.pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    with pytest.raises(InputError, match="cannot be used"):
        Trust.open(tmp_path / "bad.pem")
    with pytest.raises(InputError, match="of a private key, make the public one: openssl pkey -in KEY -pubout"):
        Trust.open(keys / "ours.key")
    with pytest.raises(InputError, match="they must be of P-256, P-384 or P-521"):
        Trust.open(ed25519_key_pair(tmp_path)[1])


@pytest.mark.parametrize("which", ["require_signature", "require_rules_signature"])
def test_an_empty_name_does_not_mean_nobody(which: str, subspace: Path) -> None:
    with pytest.raises(InputError, match="the name of who must sign is empty"):
        Gate.open(subspace, "csulora", **{which: ""})


def test_signature_lies_in_a_directory_and_beside_a_file(tmp_path: Path) -> None:
    assert signature_file_of(tmp_path) == tmp_path / "model.sig"
    assert signature_file_of(tmp_path / "x.gguf") == tmp_path / "x.gguf.sig"
