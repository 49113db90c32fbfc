"""Columns of batched arrays, without the fixed cost of NumPy's general functions.

``np.take_along_axis`` builds its indices anew in Python: 20 µs a call, ten times as much as the look-up of one slate.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def at_columns(values: npt.NDArray[Scalar], columns: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Scalar]:
    """Return ``values`` [n, C] at each row's own ``columns`` [n, K]: [n, K], as ``np.take_along_axis`` on axis 1."""
    found: npt.NDArray[Scalar] = values[np.arange(len(values))[:, None], columns]
    return found
