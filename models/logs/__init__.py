"""Readers of recorded logs in their official layouts: the same for `millstream import` and for the trainer's replay."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from models.errors import LogFormatError
from models.logs.ebnerd import EbnerdLog
from models.logs.jsonl import JsonlLog
from models.logs.log import LogEvent, LogReader, fingerprint
from models.logs.mind import MindLog
from models.logs.movielens import MovieLensLog

__all__ = ["KINDS", "LogEvent", "LogReader", "fingerprint", "open_log"]

KINDS: Final = ("mind", "ebnerd", "movielens", "jsonl")


def open_log(kind: str, *paths: Path) -> LogReader:
    """Return the reader of the log of this kind at ``paths``: one folder or file, or several parts of one log.

    Raises LogFormatError where the kind is unknown or the files are not in its layout.
    """
    if kind == "mind":
        return MindLog(*paths)
    if kind == "ebnerd":
        return EbnerdLog(*paths)
    if kind == "movielens":
        if len(paths) != 1:
            raise LogFormatError(f"MovieLens is one folder, {len(paths)} are named: name the one with ratings.csv")
        return MovieLensLog(paths[0])
    if kind == "jsonl":
        return JsonlLog(*paths)
    raise LogFormatError(f"unknown kind of log {kind!r}; there are {', '.join(KINDS)}")
