"""Files and folders that a reader sees whole or not at all, after a crash and a full disk alike."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from models.manifest import PARTIAL_SUFFIX


def write_file(file: Path, content: bytes) -> None:
    """Write a file and have it on the disk on return. Raises OSError."""
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file aside and rename it: a reader sees the old content or the new. Raises OSError."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_file(aside, content)
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder aside and rename it to ``folder``, which must not exist or be empty.

    Whatever ``fill`` or the disk raises goes on, and what was written is removed. Raises OSError where the folder
    has content by then. A process that is killed leaves its part beside, under a name that no reader looks at.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        aside.mkdir()
        fill(aside)
        sync_folder(aside)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a reader never sees half of it: renamed first. One that is not there is no error."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        os.replace(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_partials(folder: Path) -> list[str]:
    """Remove what killed processes left in ``folder``; the caller knows that nobody writes there now."""
    left = sorted(folder.glob(f".*{PARTIAL_SUFFIX}")) if folder.is_dir() else []
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk on return. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
