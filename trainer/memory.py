"""What to do when memory ends in the middle of a batch: halve it and go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.errors import TrainingError

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ended, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "not enough memory" in text)


def smaller(size: int, error: BaseException) -> int:
    """Return the half of a batch size, after memory ended. Raises TrainingError("out-of-memory") for a size of 1."""
    if size <= 1:
        raise TrainingError(
            "out-of-memory", f"a single one does not fit ({error}); nothing was published: take a smaller encoder"
        ) from error
    log.warning("memory ended with %d at once, going on with %d: %s", size, size // 2, error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def halved(run: Callable[[npt.NDArray[Any]], None], places: npt.NDArray[np.int64], size: int) -> int:
    """Call ``run`` with pieces of ``places``, at most ``size`` at once; return the size that fitted.

    A piece for which memory ends is tried again in halves: ``run`` must leave nothing behind when it raises.
    Raises TrainingError("out-of-memory") when a single one does not fit.
    """
    start = 0
    while start < len(places):
        try:
            run(places[start : start + size])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = smaller(min(size, len(places) - start), error)
            continue
        start += size
    return size
