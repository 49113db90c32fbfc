"""A child process that does not outlive its supervisor, also when that one is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
SUPERVISOR_VARIABLE = "MILLSTREAM_SUPERVISOR_PID"
"""Set for a supervisor's children: seconds pass while a child imports, in which its parent may already die."""


def supervisor_pid() -> int:
    """Return the pid of the supervisor that started this process, else that of whoever did."""
    return int(os.environ.get(SUPERVISOR_VARIABLE) or os.getppid())


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel end this process when its parent dies (Linux; elsewhere callers poll ``is_orphan``)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


def is_orphan(parent_pid: int) -> bool:
    """Whether the parent that started this process is gone."""
    return os.getppid() != parent_pid
