"""``python -m streams.demo.worker_process PID``: `millstream worker`, but ended when process PID dies."""

from __future__ import annotations

import asyncio
import sys

from models.errors import MillstreamError
from streams.exit_codes import exit_code
from streams.parent import die_with_parent
from streams.settings import load
from streams.supervisor import supervise


def main() -> int:
    """Run worker and encoder until SIGTERM or until the demo is gone; returns the exit code."""
    die_with_parent(int(sys.argv[1]))
    try:
        return asyncio.run(supervise(load()))
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
