"""Exit codes: each error of ours has one, and only what a restart cannot mend is final."""

from __future__ import annotations

import pytest

from models import errors
from streams.exit_codes import FINAL, ExitCode, exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SettingsError("x"), 2),
        (errors.LayoutError(["x"]), 10),
        (errors.EncoderError("x"), 11),
        (errors.BrokerUnavailable("x"), 12),
        (errors.DeliveryError("x"), 13),
        (errors.FencedError("x"), 14),
        (errors.TopicRecreatedError("x"), 16),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_an_error_ends_the_process_with_its_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_what_a_restart_mends_is_restarted() -> None:
    mended = {ExitCode.BROKER, ExitCode.DELIVERY, ExitCode.FENCED, ExitCode.STUCK, ExitCode.TOPIC_RECREATED}
    assert not mended & FINAL


@pytest.mark.parametrize("code", [ExitCode.SETTINGS, ExitCode.LAYOUT, ExitCode.ENCODER])
def test_what_a_restart_cannot_mend_is_final(code: ExitCode) -> None:
    assert code in FINAL


def test_a_signal_is_never_taken_for_a_code_of_ours() -> None:
    assert all(0 <= code < 128 for code in ExitCode)
