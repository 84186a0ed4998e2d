"""Signatures of what is read, in the format of OpenSSF's model-signing: verified before, compared with what was read.

A directory holds its signature in ``model.sig``; that of a file ``x.gguf`` lies beside it, ``x.gguf.sig``.

A signature covers every file of a directory by its sha256. The files are hashed and compared before any of them is
parsed. What was read afterwards must have the hashes that were signed, so that nobody can exchange a file in between.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from csulora.adapters.lora import SIGNATURE_FILE, Adapter
from csulora.errors import (
    ChangedError,
    CsuloraError,
    InputError,
    NotCoveredError,
    OtherSignerError,
    SignatureError,
    UnsafeFileError,
    UnsignedError,
)
from csulora.io.files import read_regular, sha256_of_file
from csulora.policy.policy import Policy
from csulora.policy.source import PolicySource
from csulora.policy.toml import PRESETS
from csulora.serving.trust import Trust
from csulora.subspace.subspace import Subspace

SIGNATURE_SUFFIX = ".sig"
_LARGEST_SIGNATURE = 16 << 20  # bytes; one of 1000 files has about 300 KiB
_MOST_NAMED = 5  # of files that a signature does not cover
_THE_FILE = "."  # what model-signing calls a file that is signed by itself

_PREDICATE = "https://model_signing/signature/v1.0"
_METHOD = {"method": "files", "hash_type": "sha256"}
_MISMATCH = "Signature mismatch:"  # model-signing says it once the signature itself has proved right


def signature_file_of(path: Path) -> Path:
    """Return where the signature of a directory or a file lies."""
    return path / SIGNATURE_FILE if path.is_dir() else path.with_name(path.name + SIGNATURE_SUFFIX)


@dataclass(frozen=True)
class Signed:
    """What somebody who is trusted has signed.

    Attributes:
        path: the directory or file.
        digests: sha256 of each file, by its path within the directory; of a file alone, by its name.
    """

    path: Path
    digests: Mapping[str, str]

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise `SignatureError` unless the bytes that an adapter was read from are the signed ones."""
        if not adapter.files:
            raise NotCoveredError(f"{self.path}: was not read from files; a signature says nothing of it")
        for name, sha256 in adapter.files.items():
            self._check(self.sha256_of(name), sha256)

    def check_file(self, sha256: str) -> None:
        """Raise `SignatureError` unless a file that was read by itself has the signed content."""
        self._check(self.sha256_of(self.path.name), sha256)

    def sha256_of(self, name: str) -> str:
        """Return the signed sha256 of a file, or raise `SignatureError` if it is not covered."""
        if name not in self.digests:
            raise NotCoveredError(f"{self.path}: its signature does not cover {name}; sign it again, with that file")
        return self.digests[name]

    def _check(self, signed: str, found: str) -> None:
        if signed != found:
            raise ChangedError(f"{self.path}: changed while it was read; let nobody write there, and try again")


class Verifier:
    """Lets through what somebody who is trusted has signed.

    >>> csulora.serving.signatures.Verifier.open("no.pem")
    Traceback (most recent call last):
    csulora.errors.InputError: no.pem: no such file; a signer is given as a PEM file of public keys or certificates, or identity=NAME,issuer=URL[,trust=FILE]
    """  # noqa: E501 - what Python prints is one line

    def __init__(self, trust: Trust) -> None:
        """Trust these signers."""
        self.trust = trust

    @classmethod
    def open(cls, source: str | Path) -> Verifier:
        """Trust whom a PEM file or an identity names, see `Trust.open`."""
        return cls(Trust.open(source))

    def read(self, source: str | Path, reader: Callable[[], Adapter]) -> Adapter:
        """Verify an adapter, let ``reader`` read it, and make sure that it read what was signed."""
        signed = self.verify(Path(source))
        adapter = reader()
        signed.check_adapter(adapter)
        return adapter

    def verify(self, path: Path) -> Signed:
        """Hash a directory or a file, and compare it with its signature. Nothing of it is parsed.

        Raises:
            SignatureError: it is not signed, or by somebody else, or is not what was signed.
            InputError: there is nothing at ``path``, or the signature is malformed.
        """
        if not path.exists():
            raise InputError(
                f"{path}: no such file or directory; only what lies here can be verified, so download what the hub has "
                "(hf download ORG/NAME --local-dir DIR; rm -r DIR/.cache)"
            )
        signature = signature_file_of(path)
        if not signature.exists():
            raise UnsignedError(
                f"{path}: is not signed: {signature} is missing; have it signed by {self.trust.name} "
                f"(model_signing sign key {path} --signature {signature} --private_key KEY)"
            )
        content = read_regular(signature, _LARGEST_SIGNATURE)
        refusals = []
        for configured in self.trust.configured:
            # The bytes that are verified here are the bytes that are parsed below.
            with TemporaryDirectory() as place:
                copy = Path(place, SIGNATURE_FILE)
                copy.write_bytes(content)
                config = configured(Path(place))
                try:
                    config.verify(path, copy)
                    return Signed(path, _digests(content, path, signature))
                except OSError:  # of a file system or a network, whoever signed
                    raise
                except Exception as error:  # of cryptography, OpenSSL, pydantic or Sigstore: each has its own
                    refusals.append(_refusal(path, signature, content, error, self.trust))
        raise min(refusals, key=lambda refusal: isinstance(refusal, OtherSignerError))

    def open_subspace(self, path: str | Path, sha256: str | None = None) -> Subspace:
        """Return a subspace file that is signed; see `Subspace.open`."""
        signed = self.verify(Path(path))
        subspace = Subspace.open(path, sha256)
        signed.check_file(subspace.sha256)
        return subspace

    def load_policy(self, source: Policy | str | Path | None) -> PolicySource:
        """Return a policy, of a file that is signed or of none; see `PolicySource.load`."""
        if not isinstance(source, str | Path) or source in PRESETS:
            return PolicySource.load(source)
        signed = self.verify(Path(source))
        policy = PolicySource.load(source)
        signed.check_file(policy.sha256)
        return policy


def open_subspace(path: str | Path, sha256: str | None, verifier: Verifier | None) -> Subspace:
    """Return a subspace file, which a verifier may want to be signed."""
    return verifier.open_subspace(path, sha256) if verifier else Subspace.open(path, sha256)


def load_policy(source: Policy | str | Path | None, verifier: Verifier | None) -> PolicySource:
    """Return a policy, whose file a verifier may want to be signed."""
    return verifier.load_policy(source) if verifier else PolicySource.load(source)


def _digests(content: bytes, path: Path, signature: Path) -> dict[str, str]:
    """Return what a signature that was verified says of each file."""
    statement = json.loads(base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]))
    serialization = statement.get("predicate", {}).get("serialization", {})
    if statement.get("predicateType") != _PREDICATE or not _METHOD.items() <= serialization.items():
        raise InputError(
            f"{signature}: does not give the sha256 of whole files; sign again with model-signing 1.0 or later and its "
            "usual hashes"
        )
    resources: list[dict[str, Any]] = statement["predicate"]["resources"]
    return {path.name if found["name"] == _THE_FILE else found["name"]: found["digest"] for found in resources}


def _refusal(path: Path, signature: Path, content: bytes, error: Exception, trust: Trust) -> CsuloraError:
    """Return what it means that model-signing rejected a signature."""
    if isinstance(error, InputError):
        return error
    text = str(error)
    # What model-signing says itself is a bare ValueError; JSON, base64 and pydantic have their own below it.
    is_foreign = isinstance(error, ValueError) and type(error) is not ValueError
    if is_foreign or isinstance(error, (LookupError, TypeError, AttributeError)):
        return InputError(f"{signature}: is not a signature of model-signing ({error!r}); sign again")
    if "symlink" in text:
        return UnsafeFileError(
            f"{path}: holds a symbolic link, which no signature covers; bring the files themselves "
            "(hf download ORG/NAME --local-dir DIR; rm -r DIR/.cache)"
        )
    if "special file" in text:
        return UnsafeFileError(f"{path}: holds what is neither file nor directory; remove it ({text})")
    if not text.startswith(_MISMATCH):
        return OtherSignerError(f"{signature}: is not a signature by {trust.name}: {text or type(error).__name__}")
    return _mismatch(path, _digests(content, path, signature))


def _mismatch(path: Path, signed: Mapping[str, str]) -> SignatureError:
    """Return in what a directory or file differs from what somebody who is trusted has signed."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    found = {str(file.relative_to(path)) if path.is_dir() else file.name: file for file in files}
    for name, digest in signed.items():
        if name not in found:
            return ChangedError(f"{path}: {name}, which was signed, is missing; bring it back, or sign again")
        if sha256_of_file(found[name]) != digest:
            return ChangedError(f"{path}: {name} is not what was signed; bring the signed file back, or sign again")
    extra = [name for name in found if name not in signed and name != SIGNATURE_FILE]
    shown = ", ".join(extra[:_MOST_NAMED]) + (f" and {len(extra) - _MOST_NAMED} more" * (len(extra) > _MOST_NAMED))
    return NotCoveredError(f"{path}: its signature does not cover {shown}; remove that, or sign again")
