from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors

from models import atomic, bundle, manifest
from models.bundle import Bundle, ItemEncodings, load, save
from models.encoder_delta import EncoderDelta
from models.errors import BundleError, RegistryError
from models.features import FeatureConfig
from models.manifest import FORMAT, MANIFEST, SIGNATURE, check_version, digest, new_version
from models.signing import PrivateKey
from tests.models.bundles import BASE_DIM, DIM, contents, scorer_parts, write

KEY = PrivateKey.generate()
Change = Callable[[dict[str, Any]], Any]


def saved(tmp_path: Path, **given: Any) -> Path:
    write(tmp_path, **given)
    return tmp_path / "v1"


def refused(folder: Path, **options: Any) -> str:
    """Return why a bundle is refused, when it is read or when its canary is scored."""
    with pytest.raises(BundleError) as error:
        load(folder, **options).check_canary()
    return error.value.reason


def change_manifest(folder: Path, change: Change) -> None:
    """Rewrite the manifest as an attacker who can write files would."""
    told = json.loads((folder / MANIFEST).read_bytes())
    change(told)
    (folder / MANIFEST).write_text(json.dumps(told))


def replace_listed(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and its hash and size in the manifest."""
    (folder / name).write_bytes(content)
    entry = {"sha256": digest(content), "bytes": len(content)}
    change_manifest(folder, lambda told: told["files"].update({name: entry}))


def delta() -> EncoderDelta:
    return EncoderDelta({"base_encoder_id": "base@1/mean64"}, {"layer.weight": np.ones((2, 2), np.float32)})


def with_everything() -> dict[str, Any]:
    random = np.random.default_rng(1)
    return {
        "encoder": delta(),
        "encoder_id": delta().encoder_id,
        "encodings": ItemEncodings(
            np.array([5, 6], np.uint64), np.array([7, 8], np.uint64), random.normal(size=(2, BASE_DIM)).astype("<f2")
        ),
        "residual_items": np.array([9, 3], np.uint64),
        "residuals": random.normal(size=(2, DIM)).astype(np.float32),
        "carry": np.eye(DIM, dtype=np.float32),
        "carry_from": "space-before",
        "parent": "v0",
        "decision": {"promote": True},
        "train": {"epochs": 3},
    }


def test_a_loaded_bundle_has_what_was_saved(tmp_path: Path) -> None:
    given = contents(**with_everything())
    save(tmp_path / "v1", given)
    found = load(tmp_path / "v1")
    found.check_canary()
    assert found.space.same_as(given.space)
    assert found.features == given.features
    assert all(np.array_equal(found.scorer_tensors[name], given.scorer_tensors[name]) for name in given.scorer_tensors)
    assert found.encodings is not None
    assert np.array_equal(found.encodings.base, given.encodings.base)
    assert found.carry is not None
    assert np.array_equal(found.carry, given.carry)
    assert found.encoder_folder is not None
    assert EncoderDelta.load(found.encoder_folder).encoder_id == given.encoder_id
    told = found.manifest
    assert (told.parent, told.window, told.decision, told.train) == ("v0", given.window, given.decision, given.train)


def test_the_same_contents_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", **with_everything()), write(tmp_path / "2", **with_everything())
    assert one.encode() == two.encode()


def test_the_canary_depends_on_text_vectors_residuals_and_recent_items(tmp_path: Path) -> None:
    def expected(**given: Any) -> Any:
        write(tmp_path, version := f"v{len(list(tmp_path.iterdir()))}", **given)
        return load(tmp_path / version).canary.expected

    plain = expected()
    assert len(plain) == 4
    known = contents().canary.items
    moved = expected(residual_items=known[:1], residuals=np.full((1, DIM), 3.0, np.float32))
    assert (plain != moved).tolist() == [True, False, False, False]
    recent = expected(residual_items=known[2:], residuals=np.full((1, DIM), 3.0, np.float32))
    assert (plain != recent).tolist() == [True, True, True, True]


@pytest.mark.parametrize("name", ["ctr.json", "ctr.safetensors", "space.safetensors", "canary.msgpack"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: bytes([b[0] ^ 1]) + b[1:], "wrong-hash"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "wrong-hash"),
        (lambda b: b[:-1], "wrong-size"),
        (lambda b: b + b"x", "wrong-size"),
        (lambda b: b"", "wrong-size"),
    ],
    ids=["first bit", "last bit", "cut", "longer", "empty"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], reason: str) -> None:
    folder = saved(tmp_path)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert refused(folder) == reason


@pytest.mark.parametrize("name", ["encoder/config.json", "encoder/delta.safetensors", "encodings.safetensors"])
def test_a_damaged_encoder_or_encoding_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, **with_everything())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b"\0")
    assert refused(folder) == "wrong-hash"


@pytest.mark.parametrize("name", [MANIFEST, "ctr.json", "canary.msgpack", "encoder/delta.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, **with_everything())
    (folder / name).unlink()
    assert refused(folder) == "missing-file"


def test_a_manifest_that_does_not_list_what_a_bundle_needs_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_manifest(folder, lambda told: told["files"].pop("canary.msgpack"))
    assert refused(folder) == "missing-file"


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "code.py", "encoder/modeling.py", "sub/x.json", ".hidden"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_file_that_no_bundle_has_is_refused_listed_or_not(tmp_path: Path, name: str, listed: bool) -> None:
    folder = saved(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"anything")
    if listed:
        replace_listed(folder, name, b"anything")
    assert refused(folder) == "unknown-file"


class Harmful:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> Any:
        return (os._exit, (1,))


@pytest.mark.parametrize("name", ["ctr.json", "ctr.safetensors", "space.safetensors", "canary.msgpack"])
def test_a_pickle_under_a_right_name_with_a_right_hash_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    replace_listed(folder, name, pickle.dumps(Harmful()))
    assert refused(folder) == "malformed"


@pytest.mark.parametrize("name", ["../v0/ctr.json", "/etc/passwd", "encoder/../../x", "a\\..\\b", "C:x", "~/x"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    entry = {"sha256": "0" * 64, "bytes": 1}
    change_manifest(folder, lambda told: told["files"].update({name: entry}))
    assert refused(folder) == "path-escapes"


@pytest.mark.parametrize("name", ["ctr.json", "encoder"])
def test_a_link_in_a_bundle_is_refused_even_with_the_right_content(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, **with_everything())
    os.replace(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert refused(folder) == "path-escapes"


def test_a_format_of_the_future_is_refused_by_its_number(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_manifest(folder, lambda told: told.update(format=FORMAT + 1, files="another meaning"))
    assert refused(folder) == "unknown-format"


def test_a_field_of_the_future_in_a_known_format_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_manifest(folder, lambda told: told.update(new_fact=1))
    load(folder).check_canary()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000], ids=lambda c: repr(c[:4]))
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path)
    (folder / MANIFEST).write_bytes(content)
    assert refused(folder) == "malformed"


def test_another_feature_spec_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_manifest(folder, lambda told: told.update(feature_spec="features-9-000000000000"))
    assert refused(folder) == "feature-spec"


def test_a_feature_encoding_that_this_program_cannot_make_is_refused_as_such(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    told = json.loads((folder / "ctr.json").read_bytes())
    told["features"]["version"] = 9
    replace_listed(folder, "ctr.json", json.dumps(told).encode())
    assert refused(folder) == "feature-spec"


def test_a_bundle_that_claims_to_be_larger_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_manifest(folder, lambda told: told["files"]["space.safetensors"].update(bytes=1 << 40))
    assert refused(folder) == "too-large"
    assert refused(saved(tmp_path / "2"), max_bytes=100) == "too-large"


def test_a_manifest_of_many_megabytes_is_refused_unread(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(manifest.MAX_MANIFEST_BYTES + 1)
    assert refused(folder) == "too-large"


def test_a_model_that_computes_something_else_misses_its_canary(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = safetensors.load((folder / "ctr.safetensors").read_bytes())
    tensors["calibration"][1] += 0.01
    replace_listed(folder, "ctr.safetensors", safetensors.save(tensors))
    assert refused(folder) == "canary"


def test_a_canary_with_too_few_expected_scores_is_missed(tmp_path: Path) -> None:
    given = contents()
    given.canary = bundle.Canary(given.canary.records, given.canary.items, given.canary.base, np.zeros(3, np.float32))
    save(tmp_path / "v1", given)
    assert refused(tmp_path / "v1") == "canary"


@pytest.mark.parametrize("records", [[], [b"garbage"]])
def test_a_bundle_without_a_canary_that_can_be_scored_is_not_saved(tmp_path: Path, records: list[bytes]) -> None:
    given = contents()
    canary = bundle.Canary(records, given.canary.items, given.canary.base, np.zeros(3, np.float32))
    given.canary = canary
    if records:
        save(tmp_path / "v1", given)
        assert refused(tmp_path / "v1") == "malformed"
    else:
        with pytest.raises(BundleError, match="malformed"):
            save(tmp_path / "v1", given)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["projection", "residuals", "carry", "encodings", "encoder"])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, field: str, bad: float) -> None:
    given = with_everything()
    if field == "projection":
        given["projection"] = np.full((BASE_DIM, DIM), bad, np.float32)
        given["canary"] = bundle.Canary(**{**fields(contents().canary), "expected": np.zeros(4, np.float32)})
    elif field == "encodings":
        given["encodings"].base[0, 0] = bad
    elif field == "encoder":
        given["encoder"] = EncoderDelta(delta().config, {"layer.weight": np.full((2, 2), bad, np.float32)})
    else:
        given[field][0, 0] = bad
    with pytest.raises(BundleError, match="not-finite"):
        save(tmp_path / "v1", contents(**given))
    assert list(tmp_path.iterdir()) == []


def fields(of: Any) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}


@pytest.mark.parametrize("change", ["missing", "misshaped", "not finite"])
def test_tensors_that_make_no_model_are_refused(tmp_path: Path, change: str) -> None:
    _, tensors = scorer_parts()
    folder = saved(tmp_path)
    if change == "missing":
        del tensors["head.out"]
    else:
        tensors["head.out"] = (
            np.zeros(3, np.float32) if change == "misshaped" else tensors["head.out"] * np.float32("nan")
        )
    replace_listed(folder, "ctr.safetensors", safetensors.save(tensors))
    assert refused(folder) == ("not-finite" if change == "not finite" else "bad-scorer")


def test_two_residuals_of_one_item_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="malformed"):
        write(tmp_path, residual_items=np.array([3, 3], np.uint64), residuals=np.zeros((2, DIM), np.float32))


def test_an_encoder_that_is_not_the_one_that_the_manifest_names_is_refused(tmp_path: Path) -> None:
    given = {**with_everything(), "encoder_id": "another"}
    with pytest.raises(BundleError, match="encoder"):
        write(tmp_path, **given)


def test_a_bundle_under_another_manifest_than_the_pointer_names_is_refused(tmp_path: Path) -> None:
    assert refused(saved(tmp_path), manifest_sha256="0" * 64) == "wrong-hash"


def test_a_signed_bundle_is_taken_where_its_key_is_configured(tmp_path: Path) -> None:
    load(saved(tmp_path, private_key=KEY), KEY.public).check_canary()


def test_an_unsigned_bundle_is_refused_where_a_key_is_configured(tmp_path: Path) -> None:
    assert refused(saved(tmp_path), public_key=KEY.public) == "unsigned"


def test_a_bundle_signed_by_another_key_is_refused(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, private_key=PrivateKey.generate()), public_key=KEY.public) == "wrong-signature"


def test_a_manifest_that_was_changed_after_signing_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, private_key=KEY)
    change_manifest(folder, lambda told: told["metrics"].update(auc=0.99))
    assert refused(folder, public_key=KEY.public) == "wrong-signature"


def test_a_signature_file_of_many_bytes_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, private_key=KEY)
    (folder / SIGNATURE).write_bytes(b"A" * 10_000)
    assert refused(folder, public_key=KEY.public) == "too-large"


def test_a_version_is_never_written_twice(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="version-exists"):
        write(tmp_path, seed=1)
    assert (folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("version", ["", "..", ".v1", "a/b", "a" * 101, "v1.partial", "bootstrap-0", "a b", "v1\n"])
def test_a_version_that_cannot_be_a_folder_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(BundleError, match="bad-version"):
        save(tmp_path / "v1", contents(version))


def test_versions_by_time_are_in_order_by_name() -> None:
    times = [0, 1, 999, 1_000, 1_790_000_000_123]
    names = [check_version(new_version(t)) for t in times]
    assert names == sorted(set(names))
    assert names[-1] == "20260921T141320123Z"


class FullDisk:
    """Raises ENOSPC at the n-th call of what puts bytes or names on the disk."""

    def __init__(self, at: int, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        for name in ("fsync", "replace"):
            patch.setattr(os, name, self._counted(at, getattr(os, name)))

    def _counted(self, at: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args)

        return counted


def test_a_disk_that_is_full_at_any_write_leaves_nothing_and_the_next_save_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0
    for at in range(1, 50):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            disk = FullDisk(at, patch)
            try:
                write(folder, private_key=KEY, **with_everything())
            except RegistryError:
                failed += 1
            else:
                assert disk.calls < at
                break
        if (folder / "v1").exists():
            load(folder / "v1", KEY.public).check_canary()
        else:
            assert list(folder.iterdir()) == []
            write(folder, private_key=KEY)
            load(folder / "v1", KEY.public)
    assert failed == 12


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.models.bundles import contents
from models.bundle import save

folder, given = Path(sys.argv[1]), contents()
for at in range(1, 20):
    child = os.fork()
    if not child:
        calls = 0
        def killing(call):
            def counted(*args):
                global calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return counted
        os.fsync, os.replace = killing(os.fsync), killing(os.replace)
        save(folder / str(at) / "v1", given)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(at, os.WIFSIGNALED(status))
"""


def test_a_process_killed_at_any_write_leaves_no_half_bundle_visible(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    killed = {int(at) for at, was in map(str.split, done.stdout.splitlines()) if was == "True"}
    assert killed == set(range(1, 9))
    visible = 0
    for at in killed:
        if (tmp_path / str(at) / "v1").exists():
            load(tmp_path / str(at) / "v1").check_canary()
            visible += 1
        else:
            assert atomic.remove_partials(tmp_path / str(at))
            assert list((tmp_path / str(at)).iterdir()) == []
    assert visible == 1


def test_what_is_scored_is_what_was_hashed(tmp_path: Path) -> None:
    found: Bundle = load(saved(tmp_path))
    expected = found.canary.expected
    (found.folder / "ctr.safetensors").write_bytes(b"changed after it was read")
    scored = bundle.canary_log_odds(found.scorer, FeatureConfig(), found.space, found.canary)
    assert np.array_equal(scored, np.asarray(expected))
