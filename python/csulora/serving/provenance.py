"""What csulora writes, signed: the files by model-signing, and by an in-toto statement what they were made of.

The statement has the predicate of SLSA's provenance. Its subjects are the files written; its dependencies are the files
of the adapter, the subspace file and the policy, each by its sha256. It lies in ``csulora.intoto.jsonl`` of a
directory, and beside a file ``x.gguf`` in ``x.gguf.intoto.jsonl``, as a DSSE envelope.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from csulora import __version__
from csulora.adapters.lora import SIGNATURE_FILE, STATEMENT_FILE, Adapter
from csulora.errors import ChangedError, InputError, OtherSignerError, RefusedError, UnsignedError
from csulora.io.files import parse_json, read_regular, sha256_of_file, write_text
from csulora.policy.policy import Policy
from csulora.serving.signatures import Verifier, signature_file_of
from csulora.serving.trust import signing_module
from csulora.subspace.subspace import Subspace

STATEMENT_SUFFIX = ".intoto.jsonl"
ADAPTER, SUBSPACE, POLICY = "adapter/", "subspace", "policy.toml"  # names of dependencies
_LARGEST_STATEMENT = 64 << 20  # bytes; a policy with gains of directions may have many of them
_LARGEST_KEY = 1 << 20
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_PREDICATE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:csulora:correct:v1"
_BUILDER = "urn:csulora"

Seal = Callable[[Path], None]
"""Adds statement and signature to a directory before it appears, or beside a finished file."""


def statement_file_of(path: Path) -> Path:
    """Return where the statement about a directory or a file lies."""
    return path / STATEMENT_FILE if path.is_dir() else path.with_name(path.name + STATEMENT_SUFFIX)


def seals_beside(file: Path) -> tuple[Path, Path]:
    """Return where signature and statement of a file lie."""
    return signature_file_of(file), statement_file_of(file)


@dataclass(frozen=True)
class Ingredients:
    """What a corrected adapter is made of.

    Attributes:
        digests: sha256 of each file that was read, as `sha256sum` says it: those of the adapter under ``adapter/``,
            ``subspace``, and ``policy.toml`` for the policy as TOML (`policy`).
        policy: the policy that was applied, with all that options changed in it.
    """

    digests: Mapping[str, str]
    policy: str

    @classmethod
    def of(cls, adapter: Adapter, subspace: Subspace, policy: Policy) -> Ingredients:
        """Return what a correction is made of: the adapter that was read, the subspace file, and the rules."""
        text = tomli_w.dumps(policy.to_dict())
        files = {f"{ADAPTER}{name}": digest for name, digest in adapter.files.items()}
        rules = {SUBSPACE: subspace.sha256, POLICY: hashlib.sha256(text.encode()).hexdigest()}
        return cls(files | rules, text)


class Signer:
    """Signs what csulora writes, with a private key of the NIST curves P-256, P-384 or P-521."""

    def __init__(self, key: str | Path) -> None:
        """Read a private key without password from a PEM file.

        Raises:
            InputError: it is none, or the extra ``signing`` is not installed.
        """
        key = Path(key)
        crypto_signer = signing_module("securesystemslib.signer").CryptoSigner
        serialization = signing_module("cryptography.hazmat.primitives.serialization")
        try:
            private = serialization.load_pem_private_key(read_regular(key, _LARGEST_KEY), None)
            if not hasattr(private, "curve"):
                raise TypeError("it is no key of P-256, P-384 or P-521")
            self._signer = crypto_signer(private)
            self._config = signing_module("model_signing.signing").Config().use_elliptic_key_signer(private_key=key)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"{key}: cannot sign ({error}); make a key: openssl genpkey -algorithm EC "
                "-pkeyopt ec_paramgen_curve:P-256 -out KEY"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Identity of the public key that belongs to the private one."""
        identity: str = self._signer.public_key.keyid
        return identity

    def sealing(self, ingredients: Ingredients) -> Seal:
        """Return what adds statement and signature to a directory before it appears, or beside a finished file."""

        def seal(path: Path) -> None:
            write_text(statement_file_of(path), self._statement(path, ingredients))
            self.sign(path)

        return seal

    def sign(self, path: Path) -> None:
        """Sign a directory or a file as it is."""
        hashed = signing_module("model_signing.hashing").Config().set_ignored_paths(paths=[SIGNATURE_FILE])
        config = copy.copy(self._config)  # which keeps the key that was read, whatever the file holds by now
        config.set_hashing_config(hashed).sign(path, signature_file_of(path))

    def _statement(self, path: Path, ingredients: Ingredients) -> str:
        """Return the envelope with the statement about what lies at ``path``."""
        statement = signing_module("in_toto_attestation.v1.statement").Statement
        to_json = signing_module("google.protobuf.json_format").MessageToJson
        made = statement(_resources(_files(path)), _PREDICATE, _predicate(ingredients))
        made.validate()
        payload = to_json(made.pb, indent=None).encode()
        envelope = signing_module("securesystemslib.dsse").Envelope(payload, _PAYLOAD_TYPE, {})
        envelope.sign(self._signer)
        return f"{json.dumps(envelope.to_dict())}\n"


def _files(path: Path) -> dict[str, str]:
    if not path.is_dir():
        return {path.name: sha256_of_file(path)}
    names = sorted(file.name for file in path.iterdir() if file.name not in (STATEMENT_FILE, SIGNATURE_FILE))
    return {name: sha256_of_file(path / name) for name in names}


def _resources(digests: Mapping[str, str]) -> list[Any]:
    resource = signing_module("in_toto_attestation.v1.resource_descriptor").ResourceDescriptor
    return [resource(name=name, digest={"sha256": digest}).pb for name, digest in digests.items()]


def _predicate(ingredients: Ingredients) -> dict[str, Any]:
    dependencies = [{"name": name, "digest": {"sha256": digest}} for name, digest in ingredients.digests.items()]
    return {
        "buildDefinition": {
            "buildType": _BUILD_TYPE,
            "externalParameters": {"policy": ingredients.policy},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {"builder": {"id": _BUILDER, "version": {"csulora": __version__}}},
    }


@dataclass(frozen=True)
class Provenance:
    """What a verified statement says.

    Attributes:
        version: of the csulora that wrote it.
        ingredients: what it was made of.
        outputs: sha256 of each file that was written.
    """

    version: str
    ingredients: Ingredients
    outputs: Mapping[str, str]


def verified_provenance(path: Path, verifier: Verifier) -> Provenance:
    """Verify the signature and the statement of what csulora wrote and signed.

    Raises:
        SignatureError: one is missing or by somebody else, or what lies there is not what they speak of.
        InputError: the statement is malformed, or public keys are needed and ``verifier`` has none.
    """
    signed = verifier.verify(path)
    file = statement_file_of(path)
    if not file.exists():
        raise UnsignedError(f"{path}: {file} is missing; let csulora write and sign it again (--sign-with)")
    content = read_regular(file, _LARGEST_STATEMENT)
    if file.name in signed.digests:  # the signature of a directory covers the statement too
        if hashlib.sha256(content).hexdigest() != signed.digests[file.name]:
            raise ChangedError(f"{file}: changed while it was read; let nobody write there, and try again")
    elif not verifier.trust.keys:
        raise InputError(f"{file}: is verified with public keys, not with {verifier.trust.name}; name their file")
    provenance = _parsed(_payload(content, file, verifier), file)
    for name, digest in provenance.outputs.items():
        if signed.digests.get(name) != digest:
            raise ChangedError(f"{path}: {name} is not what {file.name} speaks of; let csulora write it again")
    return provenance


def _payload(content: bytes, file: Path, verifier: Verifier) -> bytes:
    """Return what an envelope holds; its own signature is verified where there are keys."""
    envelope_class = signing_module("securesystemslib.dsse").Envelope
    key_class = signing_module("securesystemslib.signer").SSlibKey
    serialization = signing_module("cryptography.hazmat.primitives.serialization")
    exceptions = signing_module("securesystemslib.exceptions")
    try:
        envelope = envelope_class.from_dict(parse_json(content, file))
        if envelope.payload_type != _PAYLOAD_TYPE:
            raise InputError(f"{file}: holds {envelope.payload_type} and no in-toto statement")
    except InputError:
        raise
    except Exception as error:  # of base64, of its own format, or a missing key
        raise InputError(f"{file}: is no DSSE envelope ({error!r}); let csulora write it again") from error
    keys = [key_class.from_crypto(serialization.load_pem_public_key(pem)) for pem in verifier.trust.keys]
    if keys:
        try:
            envelope.verify(keys, 1)
        except exceptions.VerificationError as error:
            raise OtherSignerError(f"{file}: is not signed by {verifier.trust.name}") from error
    payload: bytes = envelope.payload
    return payload


def _parsed(payload: bytes, file: Path) -> Provenance:
    statement = parse_json(payload, file)
    try:
        definition = statement["predicate"]["buildDefinition"]
        if (statement["predicateType"], definition["buildType"]) != (_PREDICATE, _BUILD_TYPE):
            raise RefusedError(f"{file}: is about something else than a correction by csulora")
        ingredients = Ingredients(
            _digests(definition["resolvedDependencies"]), definition["externalParameters"]["policy"]
        )
        version = statement["predicate"]["runDetails"]["builder"]["version"]["csulora"]
        return Provenance(version, ingredients, _digests(statement["subject"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: is no statement of csulora's ({error!r}); let csulora write it again") from error


def _digests(resources: list[Any]) -> dict[str, str]:
    return {found["name"]: found["digest"]["sha256"] for found in resources}
