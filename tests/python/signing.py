"""Keys and signatures that tests make, as operators make them: with openssl's formats and model-signing."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from model_signing import hashing, signing

from csulora.adapters.lora import SIGNATURE_FILE
from csulora.serving.signatures import signature_file_of

_Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def key_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a private and a public key as PEM: ``name.key`` and ``name.pub``."""
    directory.mkdir(parents=True, exist_ok=True)
    return _written(ec.generate_private_key(ec.SECP256R1()), directory, name)


def ed25519_key_pair(directory: Path) -> tuple[Path, Path]:
    """Write a pair of another kind than model-signing takes."""
    return _written(ed25519.Ed25519PrivateKey.generate(), directory, "ed25519")


def _written(key: _Key, directory: Path, name: str) -> tuple[Path, Path]:
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    private.write_bytes(_pem(key))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return private, public


def _pem(key: _Key) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    content: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return content


def certificates(directory: Path) -> tuple[Path, Path, Path]:
    """Write a root certificate, a certificate that it vouches for, and the private key of that one."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("root", root_key, "root", root_key, is_root=True)
    leaf = _certificate("publisher", key, "root", root_key, is_root=False)
    files = directory / "root.pem", directory / "leaf.pem", directory / "leaf.key"
    files[0].write_bytes(root.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(_pem(key))
    return files


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, is_root: bool
) -> x509.Certificate:
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(_named(issuer), _named(name), key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=3650))
    builder = builder.add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
    signs = x509.KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **usage)
    return builder.add_extension(signs, critical=True).sign(issuer_key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])


def sign_with_certificate(path: Path, key: Path, certificate: Path, chain: list[Path]) -> None:
    """Sign a directory or a file as ``model_signing sign certificate`` does."""
    config = signing.Config().use_certificate_signer(
        private_key=key, signing_certificate=certificate, certificate_chain=chain
    )
    config.set_hashing_config(_hashed()).sign(path, signature_file_of(path))


def _hashed(ignored: tuple[str, ...] = ()) -> hashing.Config:
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE, *ignored])


def sign(path: Path, private: Path, ignored: tuple[str, ...] = ()) -> None:
    """Sign a directory or a file as ``model_signing sign key`` does."""
    config = signing.Config().use_elliptic_key_signer(private_key=private)
    config.set_hashing_config(_hashed(ignored)).sign(path, signature_file_of(path))
