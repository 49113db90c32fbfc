"""No test asserts a duration: on a busy machine a property's example may take longer than Hypothesis allows."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("millstream", deadline=None)
settings.load_profile("millstream")
