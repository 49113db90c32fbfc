"""Ed25519 signatures of manifests and pointers (RFC 8032): whose bundles a worker takes.

A public key is one line, ``ed25519:`` and the base64 of its 32 bytes; several, with commas between them, are all
trusted, so that a key can be replaced without a gap. A private key is a PEM file (PKCS 8, not encrypted).
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from models.errors import BundleError, SettingsError

PREFIX: Final = "ed25519:"
MANIFEST_CONTEXT: Final = b"millstream manifest 1\0"
"""Signed before the bytes themselves, so that no signature of one kind can stand for another kind."""
POINTER_CONTEXT: Final = b"millstream pointer 1\0"
MAX_SIGNATURE_BYTES: Final = 256


class PublicKey:
    """One trusted key, or several while one is being replaced. Made by ``parse`` or ``PrivateKey.public``."""

    def __init__(self, *keys: Ed25519PublicKey) -> None:
        self._keys = keys

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read ``ed25519:<base64>``, one or several with commas between. Raises SettingsError."""
        keys = []
        for part in text.replace(",", " ").split():
            try:
                raw = base64.b64decode(part.removeprefix(PREFIX), validate=True)
                if not part.startswith(PREFIX):
                    raise ValueError(f"it does not begin with {PREFIX!r}")
                keys.append(Ed25519PublicKey.from_public_bytes(raw))
            except (ValueError, binascii.Error) as error:
                raise SettingsError(
                    f"{part!r} is not a public key: {error}; `millstream models keygen` prints one"
                ) from None
        if not keys:
            raise SettingsError(
                "the public key is empty: leave it unset, or give what `millstream models keygen` prints"
            )
        return cls(*keys)

    @property
    def text(self) -> str:
        """Return the form that ``parse`` reads."""
        raw = [key.public_bytes(Encoding.Raw, PublicFormat.Raw) for key in self._keys]
        return ",".join(PREFIX + base64.b64encode(r).decode() for r in raw)

    def verify(self, context: bytes, message: bytes, signature: str | None, what: str) -> None:
        """Return where one of the keys signed ``message``; ``what`` names it in the error.

        Raises BundleError: ``unsigned`` without a signature, ``wrong-signature`` for one that does not fit.
        """
        if not signature:
            raise BundleError(
                "unsigned",
                f"{what} carries no signature and a public key is configured; nothing is taken from it. "
                "Sign with models.private_key_file where it is made",
            )
        try:
            raw = base64.b64decode(signature, validate=True)
        except (ValueError, binascii.Error):
            raw = b""
        for key in self._keys:
            try:
                key.verify(raw, context + message)
            except InvalidSignature:
                continue
            return
        raise BundleError(
            "wrong-signature",
            f"the signature of {what} is not by a key of models.public_key; nothing is taken from it. "
            "Compare the key with the one that signs",
        )


class PrivateKey:
    """The key that signs. Made by ``generate`` or ``read``; it is never printed."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> PrivateKey:
        """Return a new key from the system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, file: Path) -> PrivateKey:
        """Read a PEM file. Raises SettingsError where it is none with an Ed25519 key that needs no password."""
        try:
            key = load_pem_private_key(file.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingsError(f"the private key {file} cannot be read: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise SettingsError(f"the key in {file} is not Ed25519; `millstream models keygen` makes one")
        return cls(key)

    @property
    def public(self) -> PublicKey:
        """Return the key that verifies what this one signs."""
        return PublicKey(self._key.public_key())

    def write(self, file: Path) -> None:
        """Write a new PEM file that only its owner may read. Raises SettingsError where there is one already."""
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(pem)
                out.flush()
                os.fsync(out.fileno())
        except FileExistsError:
            raise SettingsError(f"{file} exists and was left as it is; name another file or move it away") from None
        except OSError as error:
            raise SettingsError(f"the private key cannot be written to {file}: {error}") from None

    def sign(self, context: bytes, message: bytes) -> str:
        """Return the signature of ``message`` as base64."""
        return base64.b64encode(self._key.sign(context + message)).decode()
