from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import ValidationError

from models.bundle import load
from models.errors import BundleError, RegistryError
from models.manifest import MANIFEST, SIGNATURE
from models.registry import Registry, RegistryConfig, prune_cache
from models.signing import PrivateKey
from tests.models.bundles import write

KEY = PrivateKey.generate()
FILES = ("canary.msgpack", "ctr.json", "ctr.safetensors", "space.safetensors", MANIFEST)


@pytest.fixture(params=["folder", "memory"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> RegistryConfig:
    """A registry in a folder, where a version appears by a rename, and one that is written file by file."""
    url = str(tmp_path / "registry") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    return RegistryConfig(url=url)


@pytest.fixture
def registry(config: RegistryConfig) -> Registry:
    return Registry(config)


def published(registry: Registry, tmp_path: Path, version: str = "v1", **given: Any) -> Path:
    write(tmp_path / "made", version, **given)
    registry.publish(tmp_path / "made" / version)
    return tmp_path / "made" / version


def in_registry(config: RegistryConfig, *parts: str) -> tuple[Any, str]:
    """Return the file system and path of something in the registry."""
    files, root = fsspec.core.url_to_fs(config.url)
    return files, "/".join([root, config.name, *parts])


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(BundleError) as error:
        call()
    return error.value.reason


def test_a_fetched_bundle_is_the_published_one(registry: Registry, tmp_path: Path) -> None:
    made = published(registry, tmp_path, private_key=KEY)
    fetched = registry.fetch("v1", tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in made.iterdir()}
    load(fetched, KEY.public, manifest_sha256=registry.manifest_sha256("v1")).check_canary()


def test_versions_are_listed_in_the_order_of_their_times(registry: Registry, tmp_path: Path) -> None:
    for version in ("20260921T133320123Z", "20250921T133320123Z"):
        published(registry, tmp_path, version)
    assert registry.versions() == ["20250921T133320123Z", "20260921T133320123Z"]


def test_an_empty_registry_has_no_versions(registry: Registry) -> None:
    assert registry.versions() == []


def test_the_same_bundle_again_is_no_error(registry: Registry, tmp_path: Path) -> None:
    registry.publish(published(registry, tmp_path))
    assert registry.versions() == ["v1"]


def test_another_bundle_under_a_published_version_is_refused(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path)
    before = registry.manifest_sha256("v1")
    write(tmp_path / "other", seed=1)
    assert reason(lambda: registry.publish(tmp_path / "other" / "v1")) == "version-exists"
    assert registry.manifest_sha256("v1") == before


def test_a_damaged_bundle_is_not_published(registry: Registry, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "v1" / "ctr.json").write_bytes(b"x" * (tmp_path / "v1" / "ctr.json").stat().st_size)
    assert reason(lambda: registry.publish(tmp_path / "v1")) == "wrong-hash"
    assert registry.versions() == []


def test_a_bundle_of_another_model_is_not_published(registry: Registry, tmp_path: Path) -> None:
    write(tmp_path, name="other")
    assert reason(lambda: registry.publish(tmp_path / "v1")) == "wrong-name"


def test_a_version_whose_manifest_is_not_there_yet_is_not_there(
    config: RegistryConfig, registry: Registry, tmp_path: Path
) -> None:
    published(registry, tmp_path)
    files, path = in_registry(config, "v1", MANIFEST)
    files.rm_file(path)
    assert registry.versions() == []
    assert reason(lambda: registry.fetch("v1", tmp_path / "cache")) == "not-in-registry"


@pytest.mark.parametrize("at", range(len(FILES)))
def test_an_upload_that_fails_at_any_file_shows_no_version_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = RegistryConfig(url=f"memory://{uuid.uuid4().hex}")
    write(tmp_path)
    files, _ = in_registry(config)
    put, calls = files.put_file, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == at + 1:
            raise ConnectionError("gone")
        return put(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", failing)
        with pytest.raises(RegistryError) as error:
            Registry(config).publish(tmp_path / "v1")
    assert error.value.retriable
    assert Registry(config).versions() == []
    Registry(config).publish(tmp_path / "v1")
    load(Registry(config).fetch("v1", tmp_path / "cache")).check_canary()


def test_the_manifest_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RegistryConfig(url=f"memory://{uuid.uuid4().hex}")
    write(tmp_path, private_key=KEY)
    files, _ = in_registry(config)
    put, names = files.put_file, []

    def watched(source: str, target: str, **options: Any) -> Any:
        names.append(target.rsplit("/", 1)[-1])
        return put(source, target, **options)

    monkeypatch.setattr(files, "put_file", watched)
    Registry(config).publish(tmp_path / "v1")
    assert names[-2:] == [SIGNATURE, MANIFEST]
    assert set(names) == {*FILES, SIGNATURE}


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "wrong-size"), (b"x" * 100_000, "wrong-size"), (None, "missing-file")]
)
def test_a_file_that_is_not_as_listed_is_not_fetched(
    config: RegistryConfig, registry: Registry, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    published(registry, tmp_path)
    files, path = in_registry(config, "v1", "ctr.safetensors")
    files.rm_file(path)
    if content is not None:
        files.pipe_file(path, content)
    assert reason(lambda: registry.fetch("v1", tmp_path / "cache")) == expected
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_of_the_right_size_with_another_content_is_not_fetched(
    config: RegistryConfig, registry: Registry, tmp_path: Path
) -> None:
    made = published(registry, tmp_path)
    files, path = in_registry(config, "v1", "ctr.json")
    files.pipe_file(path, b"x" * (made / "ctr.json").stat().st_size)
    assert reason(lambda: registry.fetch("v1", tmp_path / "cache")) == "wrong-hash"


def test_a_manifest_that_is_not_the_one_of_the_pointer_is_not_fetched(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path)
    assert reason(lambda: registry.fetch("v1", tmp_path / "cache", manifest_sha256="0" * 64)) == "wrong-hash"


def test_a_manifest_under_another_version_is_refused(
    config: RegistryConfig, registry: Registry, tmp_path: Path
) -> None:
    published(registry, tmp_path)
    files, source = in_registry(config, "v1")
    files.cp(source, in_registry(config, "v2")[1], recursive=True)
    assert reason(lambda: registry.fetch("v2", tmp_path / "cache")) == "wrong-name"


@pytest.mark.parametrize("version", ["../v1", "", "a/b", "bootstrap-0"])
def test_a_version_that_is_no_name_is_refused(registry: Registry, tmp_path: Path, version: str) -> None:
    assert reason(lambda: registry.fetch(version, tmp_path)) == "bad-version"
    assert reason(lambda: registry.remove(version)) == "bad-version"


def test_what_was_fetched_is_not_fetched_again(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path)
    first = registry.fetch("v1", tmp_path / "cache")
    registry.remove("v1")
    assert registry.fetch("v1", tmp_path / "cache") == first


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_copy_is_fetched_again(registry: Registry, tmp_path: Path, name: str) -> None:
    published(registry, tmp_path)
    copy = registry.fetch("v1", tmp_path / "cache")
    (copy / name).write_bytes(b"damaged")
    load(registry.fetch("v1", tmp_path / "cache")).check_canary()


def test_a_copy_of_another_bundle_under_the_same_version_gives_way(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path, seed=1)
    write(tmp_path / "cache", seed=2)
    wanted = registry.manifest_sha256("v1")
    load(registry.fetch("v1", tmp_path / "cache", manifest_sha256=wanted), manifest_sha256=wanted)


def test_a_copy_from_before_it_was_signed_gives_way_where_a_key_is_configured(
    config: RegistryConfig, registry: Registry, tmp_path: Path
) -> None:
    published(registry, tmp_path, private_key=KEY)
    (registry.fetch("v1", tmp_path / "cache") / SIGNATURE).unlink()
    trusting = Registry(config.model_copy(update={"public_key": KEY.public.text}))
    load(trusting.fetch("v1", tmp_path / "cache"), KEY.public)


def test_fetchers_at_the_same_time_all_get_the_whole_bundle(tmp_path: Path) -> None:
    # A folder: readers of fsspec's memory:// share one file position.
    registry = Registry(RegistryConfig(url=str(tmp_path / "registry")))
    published(registry, tmp_path)
    barrier = threading.Barrier(4)

    def fetch(_: int) -> Path:
        barrier.wait(10)
        return registry.fetch("v1", tmp_path / "cache")

    with ThreadPoolExecutor(4) as threads:
        folders = list(threads.map(fetch, range(4)))
    for folder in folders:
        load(folder).check_canary()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["v1"]


def test_a_fetch_that_breaks_off_leaves_nothing_and_can_be_repeated(
    config: RegistryConfig, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry, tmp_path)
    files, _ = in_registry(config)
    opened = files.open

    def failing(path: str, *args: Any, **options: Any) -> Any:
        if path.endswith("space.safetensors"):
            raise TimeoutError("too slow")
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", failing)
        with pytest.raises(RegistryError):
            registry.fetch("v1", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    load(registry.fetch("v1", tmp_path / "cache")).check_canary()


def test_a_removed_version_is_gone_and_removing_it_again_is_no_error(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path, "v1")
    published(registry, tmp_path, "v2")
    for _ in range(2):
        registry.remove("v1")
    assert registry.versions() == ["v2"]


def test_decisions_are_kept_in_order_beside_the_bundle_and_outlive_it(registry: Registry, tmp_path: Path) -> None:
    published(registry, tmp_path)
    registry.record_decision("v1", {"promote": True}, at_ms=20)
    registry.record_decision("v1", {"promote": False, "figures": {"auc": 0.5}}, at_ms=3)
    registry.remove("v1")
    assert registry.decisions("v1") == [{"promote": False, "figures": {"auc": 0.5}}, {"promote": True}]
    assert registry.versions() == []
    assert registry.decisions("v2") == []


def test_a_registry_that_cannot_be_reached_is_an_error_that_may_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    registry = Registry(RegistryConfig(url=str(tmp_path / "file" / "registry")))
    write(tmp_path)
    with pytest.raises(RegistryError) as error:
        registry.publish(tmp_path / "v1")
    assert error.value.retriable


def test_a_scheme_that_nothing_is_installed_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="nothing-speaks-this"):
        Registry(RegistryConfig(url="nothing-speaks-this://bucket")).versions()


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/path", "gs://token@bucket"])
def test_credentials_in_the_address_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="storage_options"):
        RegistryConfig(url=url)


def test_a_public_key_that_is_none_is_refused_as_a_setting() -> None:
    with pytest.raises(ValidationError, match="not a public key"):
        RegistryConfig(public_key="AAAA")


def test_configured_keys_sign_and_are_trusted(tmp_path: Path) -> None:
    KEY.write(tmp_path / "private.pem")
    config = RegistryConfig(public_key=KEY.public.text, private_key_file=tmp_path / "private.pem")
    signer, trusted = config.signer(), config.trusted()
    assert signer is not None
    assert trusted is not None
    trusted.verify(b"", b"x", signer.sign(b"", b"x"), "it")


def test_the_cache_loses_what_was_not_used_for_longest_and_keeps_what_has_a_role(tmp_path: Path) -> None:
    registry = Registry(RegistryConfig(url=f"memory://{uuid.uuid4().hex}"))
    for number in range(5):
        published(registry, tmp_path, f"v{number}")
        folder = registry.fetch(f"v{number}", tmp_path / "cache")
        os.utime(folder, (number, number))
    registry.fetch("v1", tmp_path / "cache")
    assert prune_cache(tmp_path / "cache", keep={"v0"}, at_most=3) == ["v2", "v3"]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"v0", "v1", "v4"}


def test_the_cache_keeps_every_named_version_also_beyond_its_bound(tmp_path: Path) -> None:
    for name in ("v1", "v2", "v3", "v4"):
        (tmp_path / name).mkdir()
    assert prune_cache(tmp_path, keep={"v1", "v2", "v3", "v4"}, at_most=3) == []


def test_the_cache_loses_what_a_killed_fetch_left_long_ago_and_keeps_a_fetch_under_way(tmp_path: Path) -> None:
    for name, at in (("v1", 200_000), (".v2.aa.partial", 100_000), (".v3.bb.partial", 199_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (at, at))
    assert prune_cache(tmp_path, keep=(), at_most=3) == []
    assert {p.name for p in tmp_path.iterdir()} == {"v1", ".v3.bb.partial"}


def test_what_a_broken_off_upload_left_long_ago_is_removed_and_one_under_way_is_kept(
    config: RegistryConfig, registry: Registry, tmp_path: Path
) -> None:
    published(registry, tmp_path)
    registry.record_decision("v1", {"promote": True}, at_ms=1)
    for part in ("v2/ctr.json", ".v3.aa.partial/ctr.json"):
        files, path = in_registry(config, *part.split("/"))
        files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        files.pipe_file(path, b"half")
    now_ms = int(files.modified(path).timestamp() * 1000)
    assert registry.remove_leftovers(now_ms - 60_000) == []
    assert sorted(registry.remove_leftovers(now_ms + 60_000)) == [".v3.aa.partial", "v2"]
    assert registry.versions() == ["v1"]
    assert registry.decisions("v1") == [{"promote": True}]


def test_a_file_that_does_not_end_is_read_no_further_than_it_was_announced(
    config: RegistryConfig, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry, tmp_path)
    files, _ = in_registry(config)
    opened = files.open

    class Endless(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            assert self.reads < 3, "read on beyond what was announced"
            return bytes(size or 0)

    def endless(path: str, *args: Any, **options: Any) -> Any:
        return Endless() if path.endswith("ctr.safetensors") else opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", endless)
        assert reason(lambda: registry.fetch("v1", tmp_path / "cache")) == "wrong-size"
