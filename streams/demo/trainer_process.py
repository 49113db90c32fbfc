"""``python -m streams.demo.trainer_process PID``: `millstream trainer`, but ended when process PID dies."""

from __future__ import annotations

import os
import sys
from typing import Final

from streams.parent import die_with_parent

NICENESS: Final = 5
"""Training must not stand before a slate where both share two cores."""


def main() -> None:
    """Become the trainer; what was said here of the parent's death lasts (prctl(2))."""
    die_with_parent(int(sys.argv[1]))
    os.nice(NICENESS)
    os.execv(sys.executable, [sys.executable, "-m", "millstream", "trainer"])


if __name__ == "__main__":
    main()
