"""How worker and encoder process talk: frames over a unix socket in the data folder.

A frame is its length (4 bytes, big-endian) and MessagePack: ``Ask`` to the encoder, ``Answer`` back, matched by
number. The socket's path stands in a file, since a unix socket's path may have about 100 bytes only.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

ADDRESS_FILE: Final = "encoder-address"
SOCKET_NAME: Final = "encoder.sock"
MAX_FRAME_BYTES: Final = 4 << 20
MAX_TEXTS: Final = 256
MAX_TEXT_CHARACTERS: Final = 100_000
_LONGEST_PATH_BYTES: Final = 100
_LENGTH_BYTES: Final = 4


class Ask(msgspec.Struct):
    """Texts to encode."""

    number: int
    texts: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARACTERS)]], msgspec.Meta(max_length=MAX_TEXTS)
    ]
    encoder_id: str = ""
    """The encoder that is asked; "": that of the settings."""


class Answer(msgspec.Struct):
    """Encodings of the texts of ``number``: float32 little-endian, side by side; or what went wrong."""

    number: int
    encoder_id: str
    vectors: bytes = b""
    error: str = ""


T = TypeVar("T", Ask, Answer)


def pack(message: Ask | Answer) -> bytes:
    """Return the frame of a message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read(reader: asyncio.StreamReader, message_type: type[T]) -> T:
    """Read one message.

    Raises asyncio.IncompleteReadError at the end, ValueError (msgspec's errors are of its kind) for what is no frame.
    """
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
    return msgspec.msgpack.decode(await reader.readexactly(length), type=message_type)


def socket_path(folder: Path) -> Path:
    """Return where to listen: in ``folder`` if the path is short enough, else in a fresh folder of our own."""
    path = folder.resolve() / SOCKET_NAME
    if len(os.fsencode(path)) <= _LONGEST_PATH_BYTES:
        return path
    return Path(tempfile.mkdtemp(prefix="millstream-")) / SOCKET_NAME


def remove_socket(path: Path, folder: Path) -> None:
    """Remove a socket, and the folder that ``socket_path`` made for it."""
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()
    if path.parent != folder.resolve() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def write_address(folder: Path, path: Path) -> None:
    """Say where the encoder listens."""
    aside = folder / f".{ADDRESS_FILE}.{os.getpid()}"
    aside.write_text(str(path), "utf-8")
    os.replace(aside, folder / ADDRESS_FILE)


def read_address(folder: Path) -> Path:
    """Return where the encoder listens. Raises FileNotFoundError where none ever did."""
    return Path((folder / ADDRESS_FILE).read_text("utf-8"))
