from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import BundleError, RegistryError
from models.pointer import (
    GUARD_FILE,
    Pointer,
    PointerGuard,
    Pointers,
    decode,
    newest,
    plan_candidate,
    plan_promotion,
    plan_rollback,
    plan_withdrawal,
)
from models.signing import PrivateKey, PublicKey

KEY = PrivateKey.generate()
SHA = "a" * 64
LIVE = b"default/live"


def pointer(generation: int = 1, **given: Any) -> Pointer:
    fields: dict[str, Any] = {
        "name": "default",
        "role": "live",
        "version": "v1",
        "manifest_sha256": SHA,
        "announced_ms": 1,
        "by": "test",
        "why": "test",
    }
    return Pointer(generation=generation, **{**fields, **given})


def guard(folder: Path, public_key: PublicKey | None = None) -> PointerGuard:
    return PointerGuard(folder, "default", public_key)


def refused(found: PointerGuard, record_key: bytes | None, value: bytes | None) -> str:
    with pytest.raises(BundleError) as error:
        found.accept(record_key, value)
    return error.value.reason


def sent(current: Pointers, planned: list[Pointer]) -> Pointers:
    """Return what the topic says after ``planned`` was sent."""
    return Pointers.of(current.name, [*current.roles.values(), *planned])


def test_a_pointer_is_the_same_after_encoding_and_decoding() -> None:
    assert decode(LIVE, pointer().encode()) == pointer()


def test_a_newer_generation_is_taken(tmp_path: Path) -> None:
    found = guard(tmp_path)
    assert [found.accept(LIVE, pointer(g).encode()) for g in (1, 7)] == [pointer(1), pointer(7)]


def test_an_older_generation_is_refused(tmp_path: Path) -> None:
    found = guard(tmp_path)
    found.accept(LIVE, pointer(7).encode())
    assert refused(found, LIVE, pointer(6).encode()) == "old-generation"


def test_an_older_generation_is_refused_after_a_restart(tmp_path: Path) -> None:
    guard(tmp_path).accept(LIVE, pointer(7).encode())
    assert refused(guard(tmp_path), LIVE, pointer(6).encode()) == "old-generation"


def test_the_same_record_again_is_taken_again(tmp_path: Path) -> None:
    guard(tmp_path).accept(LIVE, pointer(7).encode())
    assert guard(tmp_path).accept(LIVE, pointer(7).encode()) == pointer(7)


def test_another_version_under_a_generation_that_was_seen_is_refused(tmp_path: Path) -> None:
    found = guard(tmp_path)
    found.accept(LIVE, pointer(7).encode())
    assert refused(found, LIVE, pointer(7, version="v2").encode()) == "generation-reused"


def test_roles_have_generations_of_their_own(tmp_path: Path) -> None:
    found = guard(tmp_path)
    found.accept(LIVE, pointer(7).encode())
    assert found.accept(b"default/previous", pointer(6, role="previous").encode()) is not None


# Every taken pointer is flushed to the disk, which may be slow.
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_in_any_order_the_highest_generation_is_what_stays(tmp_path_factory: Any, generations: list[int]) -> None:
    found, taken = guard(tmp_path_factory.mktemp("guard")), []
    for generation in generations:
        with contextlib.suppress(BundleError):
            taken.append(found.accept(LIVE, pointer(generation).encode()))
    of_taken = [p.generation for p in taken if p]
    assert of_taken == sorted(of_taken)
    assert of_taken[-1] == max(generations)


def test_a_record_of_another_name_is_nobodys_business(tmp_path: Path) -> None:
    assert guard(tmp_path).accept(b"other/live", b"garbage") is None


@pytest.mark.parametrize(
    "value",
    [
        b"garbage",
        b"{}",
        b"x" * 20_000,
        pointer(role="candidate").encode(),
        pointer(version="../v1").encode(),
        pointer(version="v1/x").encode(),
        pointer(manifest_sha256="").encode(),
        pointer(manifest_sha256="Z" * 64).encode(),
        pointer(generation=0).encode(),
        pointer(generation=1 << 32).encode(),
        pointer(name="other").encode(),
    ],
)
def test_what_is_no_pointer_to_this_role_is_refused(tmp_path: Path, value: bytes) -> None:
    assert refused(guard(tmp_path), LIVE, value) == "malformed-pointer"


def test_a_refused_pointer_leaves_the_generation_as_it_was(tmp_path: Path) -> None:
    found = guard(tmp_path, KEY.public)
    refused(found, LIVE, pointer(9).encode())
    assert found.accept(LIVE, pointer(3).signed(KEY).encode()) is not None


def test_with_a_public_key_a_signed_pointer_is_taken(tmp_path: Path) -> None:
    assert guard(tmp_path, KEY.public).accept(LIVE, pointer().signed(KEY).encode()) is not None


def test_with_a_public_key_an_unsigned_pointer_is_refused(tmp_path: Path) -> None:
    assert refused(guard(tmp_path, KEY.public), LIVE, pointer().encode()) == "unsigned"


@pytest.mark.parametrize(
    "field",
    [{"generation": 9}, {"version": "v2"}, {"manifest_sha256": "b" * 64}, {"announced_ms": 2}, {"why": "no"}],
    ids=str,
)
def test_with_a_public_key_a_pointer_that_was_changed_after_signing_is_refused(
    tmp_path: Path, field: dict[str, Any]
) -> None:
    changed = msgspec.structs.replace(pointer().signed(KEY), **field)
    assert refused(guard(tmp_path, KEY.public), LIVE, changed.encode()) == "wrong-signature"


def test_a_signed_pointer_cannot_be_given_another_role(tmp_path: Path) -> None:
    changed = msgspec.structs.replace(pointer(role="candidate").signed(KEY), role="live")
    assert refused(guard(tmp_path, KEY.public), LIVE, changed.encode()) == "wrong-signature"


def test_a_null_value_takes_a_role_away_where_no_key_is_configured(tmp_path: Path) -> None:
    taken = guard(tmp_path).accept(b"default/candidate", None)
    assert taken is not None
    assert (taken.role, taken.is_withdrawal) == ("candidate", True)


def test_with_a_public_key_a_null_value_is_refused_since_anybody_could_have_sent_it(tmp_path: Path) -> None:
    assert refused(guard(tmp_path, KEY.public), LIVE, None) == "unsigned"


def test_a_guard_file_that_cannot_be_read_refuses_everything(tmp_path: Path) -> None:
    (tmp_path / GUARD_FILE).write_text("garbage")
    with pytest.raises(BundleError, match="guard-unreadable"):
        guard(tmp_path)


def test_a_pointer_whose_generation_cannot_be_kept_is_not_followed_and_can_be_taken_later(tmp_path: Path) -> None:
    found = guard(tmp_path / "folder" / "data")
    (tmp_path / "folder").write_text("a file where the folder should be")
    with pytest.raises(RegistryError):
        found.accept(LIVE, pointer().encode())
    (tmp_path / "folder").unlink()
    assert found.accept(LIVE, pointer().encode()) == pointer()


def test_the_newest_pointers_are_those_of_the_name_without_what_is_none_or_was_withdrawn() -> None:
    records = {
        b"default/live": pointer(4).encode(),
        b"default/candidate": b"garbage",
        b"default/previous": pointer(9, role="previous", version="", manifest_sha256="").encode(),
        b"other/live": pointer(20, name="other").encode(),
    }
    found = newest(records, "default")
    assert (found.roles, found.generation) == ({"live": pointer(4)}, 9)


NOTHING = Pointers.of("default", [])
SAID: dict[str, Any] = {"at_ms": 5, "by": "ann", "why": "try"}


def test_the_first_promotion_makes_the_bootstrap_previous() -> None:
    planned = plan_promotion(NOTHING, "v1", SHA, **SAID)
    assert [(p.role, p.version, p.generation) for p in planned] == [("live", "v1", 1), ("previous", "bootstrap-0", 2)]


def test_a_promotion_makes_the_live_version_previous_and_ends_the_candidacy() -> None:
    current = sent(NOTHING, plan_promotion(NOTHING, "v1", SHA, **SAID))
    current = sent(current, plan_candidate(current, "v2", "b" * 64, **SAID))
    planned = plan_promotion(current, "v2", "b" * 64, **SAID)
    assert [(p.role, p.version) for p in planned] == [("live", "v2"), ("previous", "v1"), ("candidate", "")]
    assert planned[1].manifest_sha256 == SHA


def test_a_promotion_leaves_another_candidate_alone() -> None:
    current = sent(NOTHING, plan_candidate(NOTHING, "v2", SHA, **SAID))
    current = sent(current, plan_promotion(current, "v1", SHA, **SAID))
    assert current.version("candidate") == "v2"


def test_a_rollback_makes_the_previous_version_live_and_leaves_none_previous() -> None:
    current = sent(NOTHING, plan_promotion(NOTHING, "v1", SHA, **SAID))
    current = sent(current, plan_promotion(current, "v2", SHA, **SAID))
    current = sent(current, plan_rollback(current, **SAID))
    assert (current.version("live"), current.version("previous")) == ("v1", None)


def test_the_first_version_can_be_rolled_back_to_the_bootstrap() -> None:
    current = sent(NOTHING, plan_promotion(NOTHING, "v1", SHA, **SAID))
    current = sent(current, plan_rollback(current, **SAID))
    assert current.roles["live"].is_bootstrap


def test_without_a_previous_version_there_is_no_rollback() -> None:
    with pytest.raises(BundleError, match="no-previous"):
        plan_rollback(NOTHING, **SAID)


def test_what_is_live_is_not_promoted_again() -> None:
    current = sent(NOTHING, plan_promotion(NOTHING, "v1", SHA, **SAID))
    for plan in (plan_promotion, plan_candidate):
        with pytest.raises(BundleError, match="already-live"):
            plan(current, "v1", SHA, **SAID)


def test_a_role_that_nothing_has_needs_no_withdrawal() -> None:
    assert plan_withdrawal(NOTHING, "candidate", **SAID) == []


# Every taken pointer is flushed to the disk, which may be slow.
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["candidate", "promote", "rollback", "withdraw"]), max_size=20))
def test_whatever_is_planned_every_guard_takes_it_all(tmp_path_factory: Any, steps: list[str]) -> None:
    found = guard(tmp_path_factory.mktemp("guard"), KEY.public)
    topic: dict[bytes, bytes] = {}
    last = 0
    for number, step in enumerate(steps):
        current = newest(topic, "default")
        if step == "candidate":
            planned = plan_candidate(current, f"v{number}", SHA, **SAID)
        elif step == "promote":
            planned = plan_promotion(current, current.version("candidate") or f"v{number}", SHA, **SAID)
        elif step == "rollback":
            planned = plan_rollback(current, **SAID) if "previous" in current.roles else []
        else:
            planned = plan_withdrawal(current, "candidate", **SAID)
        for made in planned:
            assert made.generation == last + 1
            last = made.generation
            topic[made.key] = made.signed(KEY).encode()
            assert found.accept(made.key, topic[made.key]) is not None


def test_a_pointers_value_is_json_that_a_person_can_read() -> None:
    assert json.loads(pointer().encode())["version"] == "v1"
