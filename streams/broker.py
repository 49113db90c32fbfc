"""The local Apache Kafka: fetch the jars, format, start, ready-check, stop.

One node for `millstream kafka start`, one or three for tests. Each node has a folder of its own with
``server.properties``, ``pid``, ``data/`` and ``logs/``; a stopped or killed node comes back on its ports with its data.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import psutil
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from models.errors import BrokerUnavailable
from streams.kafka_clients import BOOTSTRAP_FILE, new_admin
from streams.settings import Settings

HOST = "127.0.0.1"
LOCAL_NODE = "node-1"
"""Folder of the one node below ``settings.broker.folder``."""
JAVA_MAJOR = 17
STOP_SECONDS = 30.0
"""A node that has not ended this long after SIGTERM is killed."""
WAYS_OUT = (
    f"two ways out: install Java {JAVA_MAJOR} or newer (a headless JRE) and Maven, "
    "or run Kafka in a container with `docker compose -f deploy/compose.yaml up -d kafka` "
    "and set MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS=127.0.0.1:9092"
)


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """What `millstream kafka status` says."""

    running: bool
    ready: bool
    bootstrap_servers: str | None
    pid: int | None = None
    rss_bytes: int | None = None
    own: bool = True
    """False: the settings name a cluster, which is used and never started or stopped."""


def resource(name: str) -> Path:
    """Return a file of ``deploy/kafka``, in the wheel or in the repository."""
    packaged = Path(__file__).with_name(f"kafka_{name}")
    return packaged if packaged.is_file() else Path(__file__).resolve().parent.parent / "deploy" / "kafka" / name


def java() -> str:
    """Return the java command. Raises BrokerUnavailable where there is none or it is too old."""
    home = os.environ.get("JAVA_HOME")
    command = str(Path(home) / "bin" / "java") if home else "java"
    found = shutil.which(command)
    if found is None:
        raise BrokerUnavailable(f"no Java here (looked for {command}); no broker was started; {WAYS_OUT}")
    answer = subprocess.run([found, "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)(?:\.(\d+))?', answer.stderr + answer.stdout)
    major = 0 if version is None else int(version[2] or 0) if version[1] == "1" else int(version[1])
    if major < JAVA_MAJOR:
        raise BrokerUnavailable(f"{found} is Java {major or 'unknown'}; no broker was started; {WAYS_OUT}")
    return found


def fetch_jars(parent: Path) -> Path:
    """Return the folder with Kafka's jars below ``parent``; Maven fetches them the first time.

    The folder is named by the pom's hash and appears by one rename, so that a broken fetch is never used and a new
    Kafka version gets a new folder. Raises BrokerUnavailable where Maven is missing or fails.
    """
    pom = resource("pom.xml")
    folder = parent.absolute() / f"jars-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if maven is None:
        raise BrokerUnavailable(f"no Maven (mvn) to fetch Kafka's jars; no broker was started; {WAYS_OUT}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        target = Path(scratch) / "jars"
        command = [maven, "-q", "-B", "dependency:copy-dependencies", "-f", str(pom), f"-DoutputDirectory={target}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not any(target.glob("kafka_*.jar")):
            said = (done.stdout + done.stderr).strip()[-2_000:]
            raise BrokerUnavailable(f"Maven could not fetch Kafka's jars; no broker was started; it said:\n{said}")
        try:
            target.rename(folder)
        except OSError:
            # Another process fetched the same jars meanwhile; anything else is a real error.
            if not folder.is_dir():
                raise
    return folder


def free_ports(count: int, preferred: int | None = None) -> list[int]:
    """Return different ports that nothing listens on; the first is ``preferred`` if that one is free."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wanted, preferred = preferred or 0, None
            try:
                probe.bind((HOST, wanted))
            except OSError:
                if wanted == 0:
                    raise
                continue
            ports.append(int(probe.getsockname()[1]))
    return ports


def new_cluster_id() -> str:
    """Return a cluster id in Kafka's form: 16 random bytes, URL-safe base64, no padding.

    None starts with a dash, which Kafka's own tools would take for an option.
    """
    text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    return "A" + text[1:] if text.startswith("-") else text


class KafkaNode:
    """One broker and controller: a folder, and the process that its ``pid`` file names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.properties = self.folder / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port for clients. Raises BrokerUnavailable where the node was never configured."""
        try:
            text = self.properties.read_text("utf-8")
        except FileNotFoundError:
            text = ""
        found = re.search(r"^advertised\.listeners=PLAINTEXT://[^:]+:(\d+)$", text, re.MULTILINE)
        if found is None:
            raise BrokerUnavailable(f"no broker was set up in {self.folder}; start one with `millstream kafka start`")
        return int(found[1])

    @property
    def bootstrap_servers(self) -> str:
        """host:port of this node."""
        return f"{HOST}:{self.port}"

    def configure(self, *, node_id: int, port: int, controller_port: int, voters: str, replication: int) -> None:
        """Write ``server.properties``; data that is there stays."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        text = Template(resource("server.properties").read_text("utf-8")).substitute(
            node_id=node_id,
            host=HOST,
            port=port,
            controller_port=controller_port,
            voters=voters,
            replication=replication,
            data=self.folder / "data",
        )
        self.properties.write_text(text, "utf-8")

    def format(self, jars: Path, cluster_id: str) -> None:
        """Format the data folder unless it already is. Raises BrokerUnavailable with what Kafka said."""
        if (self.folder / "data" / "meta.properties").is_file():
            return
        command = [java(), "-Xmx128m", "-XX:TieredStopAtLevel=1", *self._log_options(), "-cp", f"{jars}/*"]
        command += ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(self.properties)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip()[-2_000:]
            raise BrokerUnavailable(f"Kafka could not format {self.folder}; nothing was started; it said:\n{said}")

    def spawn(self, jars: Path, heap: str) -> int:
        """Start the process in a session of its own and return its pid; it is not ready yet."""
        command = [java(), f"-Xmx{heap}", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:+ExitOnOutOfMemoryError"]
        command += ["-Djava.awt.headless=true", *self._log_options(), "-cp", f"{jars}/*", "kafka.Kafka"]
        with (self.folder / "logs" / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                [*command, str(self.properties)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (self.folder / "pid").write_text(f"{self._process.pid}\n", "utf-8")
        return self._process.pid

    @property
    def is_started(self) -> bool:
        """Whether the node was started and neither stopped nor killed since; it may have died by itself."""
        return (self.folder / "pid").is_file()

    def process(self) -> psutil.Process | None:
        """Return the running process, or None. A pid that now belongs to another program is not ours."""
        try:
            process = psutil.Process(int((self.folder / "pid").read_text("utf-8")))
            # A child of ours may not show its command line yet.
            ours = self._is_child(process.pid) or str(self.properties) in process.cmdline()
            return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, ValueError, psutil.Error):
            return None

    def _is_child(self, pid: int) -> bool:
        return self._process is not None and self._process.pid == pid and self._process.poll() is None

    def stop(self, limit_seconds: float = STOP_SECONDS) -> bool:
        """End this node's process by SIGTERM, by SIGKILL after the limit; returns whether one was running."""
        process = self.process()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                # A stopped process would never see SIGTERM.
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(limit_seconds)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait(limit_seconds)
        self._forget()
        return process is not None

    def kill(self) -> None:
        """End this node's process by SIGKILL, as a crash does."""
        process = self.process()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(STOP_SECONDS)
        self._forget()

    def pause(self) -> None:
        """SIGSTOP: the node is there and answers nothing, from the return of this call until ``resume``."""
        process = self.process()
        if process is None:
            raise BrokerUnavailable(f"no broker runs in {self.folder}, so none can be paused")
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_SECONDS
        # The signal reaches the threads of a busy JVM one after the other.
        while process.status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                raise BrokerUnavailable(f"the broker in {self.folder} (pid {process.pid}) does not stop on SIGSTOP")
            time.sleep(0.005)

    def resume(self) -> None:
        """SIGCONT."""
        if (process := self.process()) is not None:
            process.send_signal(signal.SIGCONT)

    def last_words(self) -> str:
        """Return the end of the node's logs, for an error message."""
        lines: list[str] = []
        for name in ("console.log", "server.log"):
            file = self.folder / "logs" / name
            if file.is_file():
                lines += file.read_text("utf-8", "replace").splitlines()[-8:]
        return "\n".join(lines)

    def _forget(self) -> None:
        if self._process is not None:
            self._process.wait(STOP_SECONDS)
            self._process = None
        (self.folder / "pid").unlink(missing_ok=True)

    def _log_options(self) -> list[str]:
        logs = f"-Dmillstream.kafka.logs={self.folder / 'logs'}"
        return [f"-Dlog4j2.configurationFile={resource('log4j2.properties')}", logs]


class KafkaCluster:
    """One or three nodes on free ports, in ``folder``/node-1 and on.

    ``start_processes`` and ``stop`` block; ``start`` and ``wait_ready`` are for a running loop. Nodes are numbered
    from 1, as Kafka's node ids.
    """

    def __init__(
        self, folder: Path, *, jars: Path, size: int = 1, heap: str = "512m", preferred_port: int | None = None
    ) -> None:
        self.folder = folder.absolute()
        self.nodes = {i: KafkaNode(self.folder / f"node-{i}") for i in range(1, size + 1)}
        self._jars = jars
        self._heap = heap
        self.folder.mkdir(parents=True, exist_ok=True)
        id_file = self.folder / "cluster-id"
        if not id_file.is_file():
            id_file.write_text(new_cluster_id() + "\n", "utf-8")
        self._cluster_id = id_file.read_text("utf-8").strip()
        ports = free_ports(2 * size, preferred_port)
        voters = ",".join(f"{i}@{HOST}:{port}" for i, port in zip(self.nodes, ports[size:], strict=True))
        for i, node in self.nodes.items():
            node.configure(
                node_id=i, port=ports[i - 1], controller_port=ports[size + i - 1], voters=voters, replication=size
            )

    @property
    def bootstrap_servers(self) -> str:
        """host:port of every node, comma-separated."""
        return ",".join(node.bootstrap_servers for node in self.nodes.values())

    async def start(self, timeout_seconds: float = 90.0) -> None:
        """Start every node and return when all answer; else end them and raise BrokerUnavailable."""
        await asyncio.to_thread(self.start_processes)
        try:
            await self.wait_ready(timeout_seconds)
        except BaseException:
            await asyncio.to_thread(self.stop, 1.0)
            raise

    def start_processes(self) -> None:
        """Format where needed and start every node that does not run; none is ready yet."""
        for i in self.nodes:
            self.start_node(i)

    def start_node(self, node_id: int) -> None:
        """Start one node (again) on its ports and its data; it is not ready yet."""
        node = self.nodes[node_id]
        if node.process() is None:
            node.format(self._jars, self._cluster_id)
            node.spawn(self._jars, self._heap)

    async def wait_ready(self, timeout_seconds: float = 90.0) -> None:
        """Return when each started node answers an admin request that lists all of them."""
        await _wait_ready({i: node for i, node in self.nodes.items() if node.is_started}, timeout_seconds)

    def stop(self, limit_seconds: float = STOP_SECONDS) -> None:
        """End every node; nodes side by side, since each waits for the others' controllers."""
        for node in self.nodes.values():
            if (process := node.process()) is not None and len(self.nodes) > 1:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
                    process.terminate()
        for node in self.nodes.values():
            node.stop(limit_seconds)


async def _wait_ready(nodes: Mapping[int, KafkaNode], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    for node in nodes.values():
        while not set(nodes) <= await broker_ids(node.bootstrap_servers):
            if node.process() is None:
                raise BrokerUnavailable(f"Kafka ended while starting; its last words:\n{node.last_words()}")
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"Kafka was not ready within {timeout_seconds:.0f} s; its last words:\n{node.last_words()}"
                )
            await asyncio.sleep(0.1)


async def broker_ids(bootstrap_servers: str, timeout_seconds: float = 5.0) -> set[int]:
    """Return the node ids that the first address answers with; empty while it does not answer."""
    host, _, port = bootstrap_servers.split(",")[0].rpartition(":")
    try:
        # A look at the port first: the admin client writes an error line for each refused connection.
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), timeout_seconds)
        writer.close()
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=int(timeout_seconds * 1000))
        try:
            await asyncio.wait_for(admin.start(), timeout_seconds)
            cluster = await asyncio.wait_for(admin.describe_cluster(), timeout_seconds)
        finally:
            await admin.close()
    except (KafkaError, OSError, TimeoutError):
        return set()
    return {int(broker["node_id"]) for broker in cluster["brokers"]}


async def is_ready(settings: Settings) -> bool:
    """Tell whether the cluster in force answers an admin request now."""
    try:
        admin = new_admin(settings)
        try:
            await asyncio.wait_for(admin.start(), settings.kafka.request_timeout_seconds)
            await asyncio.wait_for(admin.describe_cluster(), settings.kafka.request_timeout_seconds)
        finally:
            await admin.close()
    except (KafkaError, BrokerUnavailable, OSError, TimeoutError):
        return False
    return True


async def start(settings: Settings) -> BrokerStatus:
    """Start the local broker and return when it is ready; one that runs already is left as it is.

    Where the settings name a cluster, none is started. Raises BrokerUnavailable where a broker cannot be started.
    """
    if settings.kafka.bootstrap_servers:
        return await status(settings)
    folder = settings.broker.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        node = KafkaNode(folder / LOCAL_NODE)
        if node.process() is None:
            jars = await asyncio.to_thread(fetch_jars, folder)
            cluster = KafkaCluster(folder, jars=jars, heap=settings.broker.heap, preferred_port=settings.broker.port)
            await cluster.start(settings.broker.start_timeout_seconds)
        else:
            # Perhaps the command that started it was interrupted: ready or not, it is the one to wait for.
            await _wait_ready({1: node}, settings.broker.start_timeout_seconds)
        file = folder / BOOTSTRAP_FILE
        file.with_suffix(".new").write_text(node.bootstrap_servers + "\n", "utf-8")
        file.with_suffix(".new").replace(file)
    return await status(settings)


def stop(settings: Settings) -> bool:
    """End the local broker; returns whether one was running. Its data stays."""
    folder = settings.broker.folder.absolute()
    if not folder.is_dir():
        return False
    with _lock(folder):
        (folder / BOOTSTRAP_FILE).unlink(missing_ok=True)
        return KafkaNode(folder / LOCAL_NODE).stop()


async def status(settings: Settings) -> BrokerStatus:
    """Return what runs here, or, where the settings name a cluster, whether that answers."""
    if settings.kafka.bootstrap_servers:
        ready = await is_ready(settings)
        return BrokerStatus(ready, ready, settings.kafka.bootstrap_servers, own=False)
    node = KafkaNode(settings.broker.folder / LOCAL_NODE)
    process = node.process()
    if process is None:
        return BrokerStatus(False, False, None)
    ready = 1 in await broker_ids(node.bootstrap_servers)
    return BrokerStatus(True, ready, node.bootstrap_servers, process.pid, process.memory_info().rss)


def describe(found: BrokerStatus, settings: Settings) -> str:
    """Return a status as the lines that the command line prints."""
    if not found.own:
        answers = "answers" if found.ready else "does not answer"
        return f"the settings name the cluster {found.bootstrap_servers}, which {answers}; no local Kafka is used"
    if not found.running:
        return "Kafka does not run here; start it with `millstream kafka start`"
    ready = "ready" if found.ready else "running, but does not answer"
    return (
        f"Kafka is {ready}: {found.bootstrap_servers}, pid {found.pid}, {(found.rss_bytes or 0) >> 20} MiB; "
        f"data and logs in {settings.broker.folder / LOCAL_NODE}"
    )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against a second start or stop at the same moment."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BrokerUnavailable(
                f"another `millstream kafka` command works in {folder}; nothing was changed; try again when it is done"
            ) from None
        yield
