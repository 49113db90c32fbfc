"""How the encoder process ends."""

from __future__ import annotations

import subprocess
import sys

HANGS = """
import time
from concurrent.futures import ThreadPoolExecutor
from streams import encoder_process
ThreadPoolExecutor(1).submit(time.sleep, 600)
def fail():
    raise ZeroDivisionError
encoder_process.main = fail
encoder_process._run()
"""


def test_a_fetch_that_hangs_does_not_keep_a_failed_process_alive() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], timeout=120, capture_output=True, check=False)
    assert ended.returncode == 1
    assert b"ZeroDivisionError" in ended.stdout + ended.stderr
