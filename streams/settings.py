"""Settings: environment variables (``MILLSTREAM_…``, ``__`` between levels) over one TOML file.

Every field has a unit in its name or description and a default. An unknown or impossible value is
refused by name. ``millstream config`` prints what is in force.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from models.counters import CountersConfig
from models.encoder import EncoderConfig
from models.errors import SettingsError
from models.events import ClockPolicy
from models.exploration import ExplorationConfig
from models.joiner import JoinerConfig
from models.recommender import RecommenderConfig
from models.registry import RegistryConfig
from models.retrieval import RetrievalConfig
from models.user_state import UserStateConfig
from streams.parent import SUPERVISOR_VARIABLE

CONFIG_FILE_VARIABLE = "MILLSTREAM_CONFIG"
DEFAULT_CONFIG_FILE = "millstream.toml"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KafkaSettings(_Section):
    """How to reach the cluster; passed to every client."""

    bootstrap_servers: str | None = Field(
        None, description="host:port, comma-separated. Unset: the broker that `millstream kafka start` runs here."
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="As in Kafka's client configuration."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="Used where the protocol has SASL."
    )
    sasl_username: str | None = Field(None, description="SASL user name.")
    sasl_password: SecretStr | None = Field(None, description="SASL password.")
    ssl_cafile: Path | None = Field(None, description="PEM file with the certificates to trust; unset: the system's.")
    ssl_certfile: Path | None = Field(None, description="PEM file with this client's certificate.")
    ssl_keyfile: Path | None = Field(None, description="PEM file with this client's key.")
    ssl_check_hostname: bool = Field(True, description="Whether the broker's certificate must name its host.")
    request_timeout_seconds: float = Field(30.0, gt=0, le=600, description="Time-out of one request to a broker.")

    @model_validator(mode="after")
    def _complete(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and (self.sasl_username is None or self.sasl_password is None):
            raise ValueError(f"security_protocol {self.security_protocol} needs sasl_username and sasl_password")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together")
        return self


class LocalBrokerSettings(_Section):
    """The one-node Kafka that `millstream kafka start` runs."""

    folder: Path = Field(Path(".millstream/kafka"), description="Data, logs and jars of the local broker.")
    port: int = Field(9092, ge=1, le=65_535, description="Preferred port; a free one is taken where it is in use.")
    heap: str = Field("512m", pattern=r"^\d+[mg]$", description="Java heap (-Xmx).")
    start_timeout_seconds: float = Field(90.0, gt=0, description="How long a start may take before it is an error.")


class TopicSettings(_Section):
    """Names and shapes of the topics."""

    prefix: str = Field("millstream", pattern=r"^[A-Za-z0-9._-]{1,100}$", description="First part of each name.")
    version: int = Field(1, ge=1, description="Last part of each name, as v1.")
    partitions: int = Field(
        12,
        ge=1,
        le=1_000,
        description="Partitions of events, users, item-stats and the user table's changelog; fixed for life.",
    )
    replication_factor: int = Field(1, ge=1, le=15, description="3 in production.")
    min_insync_replicas: int = Field(1, ge=1, le=15, description="2 in production.")
    events_retention_hours: float = Field(7 * 24.0, gt=0, description="How long events are kept, in broker time.")
    recommendations_retention_hours: float = Field(
        48.0, gt=0, description="At least the attribution window plus the time in which a slate may be asked about."
    )
    training_retention_hours: float = Field(14 * 24.0, gt=0, description="features and labels: the training window.")
    dead_letters_retention_hours: float = Field(14 * 24.0, gt=0, description="How long refused records are kept.")

    @model_validator(mode="after")
    def _possible(self) -> TopicSettings:
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError("min_insync_replicas is greater than replication_factor: nothing could be written")
        return self


class EventSettings(_Section):
    """What is accepted from the events topic."""

    clock: ClockPolicy = Field(default_factory=ClockPolicy, description="Event time against broker time.")
    wrong_partition: Literal["refuse", "accept"] = Field(
        "refuse",
        description="A key on a partition that murmur2 does not give it: refuse to the dead letters (default), "
        "or accept, where every producer agrees on another partitioner.",
    )


class ExamplesSettings(_Section):
    """What is written of each impression for the trainer, and of what came of it."""

    enabled: bool = Field(True, description="Write records to the topics features and labels for each impression.")
    max_lag_seconds: float = Field(
        60.0,
        gt=0,
        description="An impression processed later than this after it was written, or under the clock policy live "
        "after it happened, is marked and left out of training: its counters have seen its future. So is one that "
        "comes behind a later action of its user.",
    )
    with_scores: bool = Field(
        True, description="Write what the live model and those in shadow say of each item: promotion needs it."
    )


class WorkerSettings(_Section):
    """The Faust worker and its supervisor."""

    group: str = Field("millstream", pattern=r"^[A-Za-z0-9._-]{1,100}$", description="Consumer group, Faust app id.")
    data_folder: Path = Field(
        Path(".millstream/worker"), description="In-flight marker, encoder cache; one folder for each worker."
    )
    batch_max_events: int = Field(256, ge=1, le=4_096, description="Events in one micro-batch at most.")
    threads: int = Field(1, ge=1, le=64, description="Threads for NumPy, torch and FAISS in this process.")
    cpu: Literal["any", "auto"] | Annotated[int, Field(ge=0, le=65_535)] = Field(
        "auto",
        description="Processor of the event threads (Linux): a number, auto for one that no other worker has, or any.",
    )
    session_timeout_seconds: float = Field(30.0, ge=6, le=300, description="Kafka group session time-out.")
    rebalance_timeout_seconds: float = Field(30.0, ge=1, le=300, description="Kafka group rebalance time-out.")
    heartbeat_interval_seconds: float = Field(3.0, gt=0, description="Kafka group heartbeat interval.")
    commit_interval_seconds: float = Field(1.0, gt=0, le=60, description="How often offsets are committed.")
    stuck_commit_seconds: float = Field(
        60.0, gt=0, description="Read but not committed for this long: the watchdog ends the process."
    )
    mirror_timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="How long the start-up gate waits for the mirrors before it says so and goes on waiting.",
    )
    max_trigger_age_seconds: float = Field(
        300.0, gt=0, description="A trigger older than this (broker time) updates state but sends no slate."
    )
    slate_lifetime_seconds: float = Field(3_600.0, gt=0, description="expires_at of a slate, after generated_at.")
    idle_eviction_days: float = Field(
        90.0, gt=0, description="A row without an event for this long becomes a marker that holds its guard only."
    )
    host: str = Field("127.0.0.1", description="Where /metrics, /live and /ready listen.")
    port: int = Field(9464, ge=0, le=65_535, description="Port of /metrics, /live and /ready; 0 takes a free one.")
    encoder_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="Port of the encoder process's metrics; unset: the one after `port`, a free one where that is 0.",
    )
    settings_poll_seconds: float = Field(
        1.0,
        gt=0,
        le=3_600,
        description="How often the settings file is looked at; `recommender` changes while serving.",
    )
    restart_backoff_seconds: float = Field(1.0, gt=0, description="First wait before a dead child is started again.")
    restart_backoff_max_seconds: float = Field(30.0, gt=0, description="Longest such wait.")
    poison_deaths: int = Field(3, ge=1, description="Deaths at the same offsets before they go one by one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line written.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )


class ModelSettings(RegistryConfig):
    """The registry of bundles, and how a worker follows the ``models`` topic."""

    shadow: bool = Field(True, description="Score impressions with the candidate and the previous version too.")
    status_interval_seconds: float = Field(
        10.0, gt=0, le=600, description="How often a worker says on `model-status` what it serves, changes apart."
    )
    encoding_wait_seconds: float = Field(
        600.0,
        ge=0,
        description="How long a bundle with an encoder of its own waits for items that have no encoding of it yet.",
    )
    fetch_timeout_seconds: float = Field(
        300.0, gt=0, description="A bundle that is not fetched and verified within this long is asked for again."
    )
    start_wait_seconds: float = Field(
        30.0,
        ge=0,
        description="How long a start waits for a registry that is not reached; then the bootstrap serves meanwhile.",
    )
    forget_encodings_hours: float = Field(
        24.0,
        gt=0,
        description="Encodings on `item-vectors` of an encoder that no role names are taken away after this long.",
    )


class Settings(BaseSettings):
    """Everything that is in force, from the environment over the TOML file over the defaults."""

    model_config = SettingsConfigDict(
        env_prefix="MILLSTREAM_", env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    kafka: KafkaSettings = Field(default_factory=KafkaSettings)
    broker: LocalBrokerSettings = Field(default_factory=LocalBrokerSettings)
    topics: TopicSettings = Field(default_factory=TopicSettings)
    events: EventSettings = Field(default_factory=EventSettings)
    examples: ExamplesSettings = Field(default_factory=ExamplesSettings)
    joiner: JoinerConfig = Field(default_factory=JoinerConfig)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    user_state: UserStateConfig = Field(default_factory=UserStateConfig)
    counters: CountersConfig = Field(default_factory=CountersConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    recommender: RecommenderConfig = Field(default_factory=RecommenderConfig)
    models: ModelSettings = Field(default_factory=ModelSettings)
    exploration: ExplorationConfig = Field(default_factory=ExplorationConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # init values come from the TOML file (see `load`), so the environment goes first.
        return env_settings, init_settings


FOREIGN_SECTIONS = frozenset({"trainer"})
"""Sections of the same file and environment that other programs read."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OWN_VARIABLES = {CONFIG_FILE_VARIABLE, SUPERVISOR_VARIABLE, "MILLSTREAM_TEST_BOOTSTRAP"}


def file_in_force() -> Path:
    """Return the file that `load` reads where none is given; it need not exist."""
    return _named_file() or Path(DEFAULT_CONFIG_FILE)


def _named_file() -> Path | None:
    name = os.environ.get(CONFIG_FILE_VARIABLE)
    return Path(name) if name else None


def load(config_file: Path | None = None) -> Settings:
    """Read the settings from the environment and the TOML file.

    The file is ``config_file``, else the one that MILLSTREAM_CONFIG names, else ``millstream.toml`` here if
    there is one. Raises SettingsError, naming every value that is unknown or impossible.
    """
    named = config_file or _named_file()
    path = named or Path(DEFAULT_CONFIG_FILE)
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            values = tomllib.loads(path.read_text("utf-8"))
            values = {name: value for name, value in values.items() if name not in FOREIGN_SECTIONS}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} is not TOML: {error}") from None
    elif named is not None:
        raise SettingsError(f"the settings file {named} does not exist")
    unknown = [
        name
        for name in os.environ
        if name.startswith("MILLSTREAM_")
        and name not in _OWN_VARIABLES
        and name.removeprefix("MILLSTREAM_").split("__")[0].lower() not in {*Settings.model_fields, *FOREIGN_SECTIONS}
    ]
    if unknown:
        raise SettingsError(f"unknown environment variables: {', '.join(sorted(unknown))}")
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e.get('input')!r})" for e in error.errors()]
        raise SettingsError("settings that cannot be used:\n" + "\n".join(lines)) from None


def render_toml(settings: Settings) -> str:
    """Return the settings as a TOML file that `load` reads back, each with its description, secrets masked."""
    lines: list[str] = []
    _render(settings, "", lines)
    return "\n".join(lines).strip() + "\n"


def render_section(name: str, section: BaseModel) -> str:
    """Return one more section of the file, of a program that is not this one, as `render_toml` returns ours."""
    lines: list[str] = []
    _render(section, name, lines)
    return "\n".join(lines).strip() + "\n"


def _render(model: BaseModel, path: str, lines: list[str]) -> None:
    nested: list[tuple[str, BaseModel]] = []
    if path:
        lines += ["", f"[{path}]"]
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            nested.append((f"{path}.{name}" if path else name, value))
            continue
        if field.description:
            lines.append(f"# {field.description}")
        if value is None:
            lines.append(f"# {name} = (unset)")
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            nested += [(f"{path}.{name}.{_toml_key(key)}", v) for key, v in value.items()]
        else:
            lines.append(f"{name} = {_toml_value(value)}")
    for child_path, child in nested:
        _render(child, child_path, lines)


def _toml_key(key: Any) -> str:
    return str(key) if _BARE_KEY.fullmatch(str(key)) else json.dumps(str(key))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(str(k))} = {_toml_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(str(value))
