from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import BundleError, SettingsError
from models.signing import MANIFEST_CONTEXT, POINTER_CONTEXT, PrivateKey, PublicKey


def test_a_signature_of_the_private_key_is_taken_by_its_public_key_read_from_text() -> None:
    private = PrivateKey.generate()
    signature = private.sign(MANIFEST_CONTEXT, b"manifest")
    PublicKey.parse(private.public.text).verify(MANIFEST_CONTEXT, b"manifest", signature, "it")


@pytest.mark.parametrize(
    ("message", "context"), [(b"another manifest", MANIFEST_CONTEXT), (b"manifest", POINTER_CONTEXT)]
)
def test_a_signature_of_other_bytes_or_of_another_kind_of_record_is_wrong(message: bytes, context: bytes) -> None:
    private = PrivateKey.generate()
    with pytest.raises(BundleError, match="wrong-signature"):
        private.public.verify(context, message, private.sign(MANIFEST_CONTEXT, b"manifest"), "it")


def test_a_signature_of_another_key_is_wrong() -> None:
    signature = PrivateKey.generate().sign(MANIFEST_CONTEXT, b"manifest")
    with pytest.raises(BundleError, match="wrong-signature"):
        PrivateKey.generate().public.verify(MANIFEST_CONTEXT, b"manifest", signature, "it")


@pytest.mark.parametrize("signature", [None, ""])
def test_no_signature_is_unsigned(signature: str | None) -> None:
    with pytest.raises(BundleError, match="unsigned"):
        PrivateKey.generate().public.verify(MANIFEST_CONTEXT, b"manifest", signature, "it")


@pytest.mark.parametrize("signature", ["%%%", "ü", "AAAA", "A" * 10_000])
def test_a_signature_that_is_no_base64_or_has_another_length_is_wrong(signature: str) -> None:
    with pytest.raises(BundleError, match="wrong-signature"):
        PrivateKey.generate().public.verify(MANIFEST_CONTEXT, b"manifest", signature, "it")


def test_while_a_key_is_replaced_signatures_of_both_keys_are_taken() -> None:
    old, new = PrivateKey.generate(), PrivateKey.generate()
    both = PublicKey.parse(f"{old.public.text}, {new.public.text}")
    for private in (old, new):
        both.verify(MANIFEST_CONTEXT, b"manifest", private.sign(MANIFEST_CONTEXT, b"manifest"), "it")


@pytest.mark.parametrize("text", ["", " , ", "ed25519:", "ed25519:AAAA", "AAAA", "rsa:AAAA", "ed25519:%%%"])
def test_what_is_no_public_key_is_refused_as_a_setting(text: str) -> None:
    with pytest.raises(SettingsError, match="public key"):
        PublicKey.parse(text)


def test_a_written_private_key_is_readable_by_its_owner_alone_and_reads_back(tmp_path: Path) -> None:
    private = PrivateKey.generate()
    private.write(tmp_path / "keys" / "private.pem")
    assert (tmp_path / "keys" / "private.pem").stat().st_mode & 0o777 == 0o600
    assert PrivateKey.read(tmp_path / "keys" / "private.pem").public.text == private.public.text


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "private.pem").write_text("mine")
    with pytest.raises(SettingsError, match="left as it is"):
        PrivateKey.generate().write(tmp_path / "private.pem")
    assert (tmp_path / "private.pem").read_text() == "mine"


def test_a_key_file_that_is_missing_or_no_key_is_refused_as_a_setting(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no key")
    for name in ("no.pem", "missing.pem"):
        with pytest.raises(SettingsError, match="cannot be read"):
            PrivateKey.read(tmp_path / name)
