"""Who is trusted to sign: public keys, the roots of certificates, or an identity that Sigstore vouches for."""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from csulora.errors import InputError
from csulora.io.files import read_regular

_LARGEST_PEM = 1 << 20  # bytes
_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\n?", re.DOTALL)
_IDENTITY = re.compile(r"identity=(?P<identity>[^,]+),issuer=(?P<issuer>[^,]+)(,trust=(?P<trust>.+))?")
TRUST_CHOICES = "a PEM file of public keys or certificates, or identity=NAME,issuer=URL[,trust=FILE]"

Configured = Callable[[Path], Any]
"""Returns a fresh ``model_signing.verifying.Config``; its argument is a private directory for the files that it reads.

A configuration is used once: it would keep the paths that one signature ignores for the next.
"""


@dataclass(frozen=True)
class Trust:
    """Who may have signed.

    Attributes:
        name: what messages call them.
        fingerprint: sha256 of what was given: of the PEM file's bytes, or of the identity's text.
        configured: a configuration for each of them; one that accepts a signature is enough.
        keys: the public keys as PEM, if they are keys.
    """

    name: str
    fingerprint: str
    configured: Sequence[Configured]
    keys: Sequence[bytes] = ()

    @classmethod
    def open(cls, source: str | Path) -> Trust:
        """Read who is trusted.

        Args:
            source: a PEM file, with one public key or several, or with certificates that are roots of trust; or text,
                ``identity=NAME,issuer=URL``, and ``,trust=FILE`` with Sigstore's trust configuration for use offline.

        Raises:
            InputError: the file is missing or holds neither, or model-signing is not installed.
        """
        if found := _IDENTITY.fullmatch(str(source)):
            return cls._of_identity(str(source), found["identity"], found["issuer"], found["trust"])
        path = Path(source)
        if not str(source):  # of a variable that is not set, perhaps; it must not mean nobody
            raise InputError(f"the name of who must sign is empty; give {TRUST_CHOICES}, or leave the option out")
        if not path.exists():
            raise InputError(f"{source}: no such file; a signer is given as {TRUST_CHOICES}")
        content = read_regular(path, _LARGEST_PEM)
        blocks = [(found[1], found[0]) for found in _BLOCK.finditer(content)]
        keys = [block for kind, block in blocks if kind == b"PUBLIC KEY"]
        certificates = b"".join(block for kind, block in blocks if kind == b"CERTIFICATE")
        if bool(keys) == bool(certificates):
            raise InputError(
                f"{path}: must hold public keys or certificates, as PEM, and not both; of a private key, make the "
                "public one: openssl pkey -in KEY -pubout"
            )
        fingerprint = hashlib.sha256(content).hexdigest()
        if keys:
            trust = cls(f"the keys in {path}", fingerprint, [_with_key(key) for key in keys], keys)
        else:
            trust = cls(f"the certificates in {path}", fingerprint, [_with_certificates(certificates)])
        trust.check()
        return trust

    @classmethod
    def _of_identity(cls, text: str, identity: str, issuer: str, trust: str | None) -> Trust:
        verifying = signing_module("model_signing.verifying")
        root = Path(trust) if trust else None
        try:
            made = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=issuer, trust_config=root)
        except Exception as error:  # of a file, of its JSON, or of the network, each of a library of its own
            raise InputError(f"{text}: Sigstore's trust configuration cannot be used: {error!r}") from error
        return cls(f"{identity} ({issuer})", hashlib.sha256(text.encode()).hexdigest(), [lambda place: copy.copy(made)])

    def check(self) -> None:
        """Raise `InputError` unless model-signing accepts every key and certificate."""
        for configured in self.configured:
            with TemporaryDirectory() as place:
                try:
                    configured(Path(place))
                except InputError:
                    raise
                except AttributeError as error:  # of a key that has no curve
                    raise InputError(f"{self.name} cannot be used: they must be of P-256, P-384 or P-521") from error
                except Exception as error:  # what cryptography and OpenSSL raise is none of theirs alone
                    raise InputError(f"{self.name} cannot be used: {error}; give {TRUST_CHOICES}") from error


def _with_key(pem: bytes) -> Configured:
    def configured(place: Path) -> Any:
        (place / "trusted.pem").write_bytes(pem)
        config = signing_module("model_signing.verifying").Config()
        return config.use_elliptic_key_verifier(public_key=place / "trusted.pem")

    return configured


def _with_certificates(pem: bytes) -> Configured:
    def configured(place: Path) -> Any:
        (place / "trusted.pem").write_bytes(pem)
        config = signing_module("model_signing.verifying").Config()
        return config.use_certificate_verifier(certificate_chain=[place / "trusted.pem"])

    return configured


def signing_module(name: str) -> ModuleType:
    """Import a module that the extra ``signing`` brings; raises `InputError` if it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"signatures need the extra `signing` ({error}): pip install 'csulora[signing]'") from error
