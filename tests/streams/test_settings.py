"""Settings: environment over file over defaults; what is wrong is named."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from pydantic import BaseModel

from models.errors import BrokerUnavailable, SettingsError
from streams.kafka_clients import bootstrap_servers, client_options
from streams.settings import Settings, load, render_toml


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLSTREAM_CONFIG", raising=False)


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "millstream.toml").write_text('[topics]\nprefix = "file"\npartitions = 24\n')
    monkeypatch.setenv("MILLSTREAM_TOPICS__PREFIX", "env")
    settings = load()
    assert (settings.topics.prefix, settings.topics.partitions) == ("env", 24)


def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_TOPIX__PREFIX", "x")
    with pytest.raises(SettingsError, match="MILLSTREAM_TOPIX__PREFIX"):
        load()


def test_an_unknown_field_of_a_section_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_TOPICS__PARTITION", "3")
    with pytest.raises(SettingsError, match=r"topics\.partition"):
        load()


def test_an_impossible_value_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "millstream.toml").write_text("[topics]\nreplication_factor = 1\nmin_insync_replicas = 2\n")
    with pytest.raises(SettingsError, match="min_insync_replicas"):
        load()


def test_a_file_that_is_named_but_absent_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml"):
        load(Path("absent.toml"))


def test_a_file_that_is_not_toml_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "millstream.toml").write_text("[topics\n")
    with pytest.raises(SettingsError, match="not TOML"):
        load()


def test_what_is_printed_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(topics={"prefix": "p", "partitions": 3})
    (tmp_path / "printed.toml").write_text(render_toml(settings))
    assert load(tmp_path / "printed.toml") == settings


def test_surfaces_with_rules_and_arms_read_back_as_they_were(tmp_path: Path) -> None:
    rules = {
        "allowed": {"categories": ["shoes"], "attributes": {"is_eco": True, "stock": 3, "brand": "ours"}},
        "blocked": {"too dear": {"min_price": 100.0}},
        "boosts": {"sale.summer": {"tags": ["sale"], "boost": 0.5}},
        "pinned": ["item-7"],
    }
    arm = {"share": 0.2, "ranking": {"ctr_weight": 0.3}, "surface": {"quotas": {"fresh": 1.0}, "rules": {"pinned": []}}}
    settings = Settings(
        recommender={
            "surfaces": {"default": {"rules": rules}, "front page": {"diversity": {"sameness": 0.3}}},
            "experiment": {"name": "spring", "arms": {"v1.2": arm}},
        }
    )
    (tmp_path / "printed.toml").write_text(render_toml(settings))
    again = load(tmp_path / "printed.toml")
    assert again == settings
    assert again.recommender.surface("front page", "v1.2").quotas.fresh == 1.0


def test_a_password_is_masked_when_printed() -> None:
    kafka = {"security_protocol": "SASL_SSL", "sasl_username": "u", "sasl_password": "geheim"}
    text = render_toml(Settings(kafka=kafka))
    assert "geheim" not in text
    assert 'sasl_username = "u"' in text


def test_every_field_has_a_description() -> None:
    silent: list[str] = []

    def walk(model: BaseModel, path: str) -> None:
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                walk(value, f"{path}{name}.")
            elif not field.description:
                silent.append(path + name)

    walk(Settings(), "")
    assert silent == []


def test_sasl_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_KAFKA__SECURITY_PROTOCOL", "SASL_PLAINTEXT")
    with pytest.raises(SettingsError, match="sasl_username and sasl_password"):
        load()


def test_sasl_and_tls_reach_every_client() -> None:
    kafka = {
        "bootstrap_servers": "k:9093",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_username": "u",
        "sasl_password": "p",
        "ssl_check_hostname": False,
    }
    options = client_options(Settings(kafka=kafka))
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("u", "p")
    assert isinstance(options["ssl_context"], ssl.SSLContext)
    assert options["ssl_context"].check_hostname is False


def test_without_a_broker_the_error_names_the_two_ways_out() -> None:
    with pytest.raises(BrokerUnavailable, match=r"MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS.*millstream kafka start"):
        bootstrap_servers(Settings())
