"""A parent that starts the worker and waits, for tests alone: it stands for a supervisor that is killed."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, "-m", "streams.worker"]).returncode)
