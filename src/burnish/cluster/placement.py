"""Connects to Ray and finds hosts and devices for ranks: which there are, which are taken, and in what order."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import ipaddress
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.cluster.janitor import MARK, janitor
from burnish.cluster.ranks import ClusterError, LostRanks, counted
from burnish.config import ClusterConfig, RecipeError

if "ray" not in sys.modules:
    # Read by Ray when it is imported: nothing is sent to its makers, and its own advice stays out of the log.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

LOG = logging.getLogger(__name__)

ANSWER = 10.0
"""Seconds in which a cluster must answer that is joined."""
FOLDER = "burnish-ray-"
"""What names of folders begin with in which a Ray of our own is at home."""


@dataclass(frozen=True, slots=True)
class Host:
    """A node of Ray's. Hosts are ordered by address, and by name and port where several share one."""

    address: tuple[int, ...]
    name: str
    port: int
    id: str
    ip: str
    devices: int

    @property
    def order(self) -> tuple[Any, ...]:
        return self.address, self.name, self.port


@contextlib.contextmanager
def connected(config: ClusterConfig, device: str) -> Iterator[None]:
    """Ray, started here for this process, on loopback, or joined; what is changed in it is put back at the end."""
    excepthook = sys.excepthook  # before Ray's import, which sets its own
    import ray
    from ray._private import worker

    if ray.is_initialized():
        raise ClusterError("this process is in a Ray cluster already; call ray.shutdown() before the run")
    logger = logging.getLogger("ray")
    level, logs_enabled = logger.level, worker._worker_logs_enabled
    logger.setLevel("ERROR")
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    stack = ExitStack()
    try:
        if config.address is not None:
            namespace = f"burnish-{secrets.token_hex(4)}"
            try:
                with _apart_from_signals():
                    ray.init(address=config.address, namespace=namespace, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _no_cluster(config.address, error) from None
        else:
            devices = local_devices(config, device)
            folder = stack.enter_context(_own_folder())
            stack.enter_context(janitor(folder))
            with _apart_from_signals(), _on_loopback(), _environment({MARK: str(folder)}):
                ray.init(
                    address="local",
                    num_cpus=devices,
                    object_store_memory=config.object_store_memory,
                    include_dashboard=False,
                    _temp_dir=str(folder),
                    **quiet,
                )
            address = ray.util.get_node_ip_address()
            if not ipaddress.ip_address(address).is_loopback:
                raise ClusterError(
                    f"the run's own Ray took the address {address}, where others reach it, and not loopback: this "
                    "version of Ray is not known; start a cluster with `ray start --head`, and set cluster.address=auto"
                )
        logger.setLevel("ERROR")
        # Ray's tells the head before it shows anything, and waits if that is gone.
        sys.excepthook = worker.normal_excepthook if excepthook is worker.custom_excepthook else excepthook
        worker._worker_logs_enabled = False  # else the end of its own log is shown of a host that is gone
        yield
    finally:
        ray.shutdown()
        sys.excepthook = excepthook
        worker._worker_logs_enabled = logs_enabled
        logger.setLevel(level)
        stack.close()


def num_gpus(address: str) -> int:
    """How many CUDA devices the Ray cluster at `address` has, which is not joined for that. Raises ClusterError where
    none answers within some seconds: Ray itself would try for minutes."""
    from ray._private import services
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import RayError

    try:
        found = services.canonicalize_bootstrap_address_or_die(address)
        await_port(found, ANSWER)
        nodes = GcsClient(address=found).get_all_node_info(timeout=ANSWER)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise _no_cluster(address, error) from None
    return sum(int(node.resources_total.get("GPU", 0)) for node in nodes.values() if node.state == node.ALIVE)


def await_port(address: str, seconds: float) -> None:
    """Wait until something listens at HOST:PORT. Raises OSError where nothing does after so long."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _no_cluster(address: str | None, error: Exception) -> ClusterError:
    return ClusterError(
        f"cluster.address={address}: no Ray cluster answers there ({str(error).strip().splitlines()[0]}); start one "
        "with `ray start --head`, or set it to null"
    )


@contextlib.contextmanager
def _apart_from_signals() -> Iterator[None]:
    """For a start of Ray: its processes get process groups of their own, so that Ctrl-C in a terminal and whatever else
    is sent to ours reaches the driver alone; and what the driver does at a signal stays as it is. What comes meanwhile
    is handled at the end: Ray that was left half started brings the interpreter down."""
    from ray._private import services, utils

    popen, set_handler = services.ConsolePopen, utils.set_sigterm_handler
    is_main = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in ((signal.SIGINT, signal.SIGTERM) if is_main else ())
    }
    services.ConsolePopen = functools.partial(popen, process_group=0)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, set_handler
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """For a start of Ray: it takes loopback for this host's address, so that nothing of it can be reached from
    elsewhere. Its processes read that from their environment; Ray here did so when it was imported."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for a Ray of our own, with a lock that is held while it is in use; those of dead processes go."""
    for stale in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), (stale / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
    # Named so that others look at it only once its lock is held, which goes with it.
    new = Path(tempfile.mkdtemp(prefix="burnish-new-"))
    with (new / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield new.rename(new.with_name(new.name.replace("burnish-new-", FOLDER)))


def local_devices(config: ClusterConfig, device: str) -> int:
    """How many devices a Ray of our own must hold; on a CPU, as many processes."""
    if config.devices_per_node != "auto":
        return config.devices_per_node
    if device == "cpu":
        return max(config.device_mapping or (0,)) + 1
    import torch

    return torch.cuda.device_count()


def hosts_of(resource: str) -> list[Host]:
    """The hosts that are up, in order, with how many of `resource` each has."""
    import ray

    hosts = [
        Host(
            address=_number(node["NodeManagerAddress"]),
            name=node["NodeName"],
            port=node["NodeManagerPort"],
            id=node["NodeID"],
            ip=node["NodeManagerAddress"],
            devices=int(node["Resources"].get(resource, 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted((host for host in hosts if _answers(host)), key=lambda host: host.order)


def _answers(host: Host) -> bool:
    """Whether a host is really up: of one that is lost, Ray knows only after some missed heartbeats."""
    try:
        socket.create_connection((host.ip, host.port), timeout=2).close()
    except OSError:
        return False
    return True


def _number(address: str) -> tuple[int, ...]:
    """An address as numbers, so that 10.0.0.9 comes before 10.0.0.10."""
    return tuple(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address))


def await_hosts(
    config: ClusterConfig, resource: str, fits: Callable[[int], bool] | None, deadline: float
) -> tuple[list[Host], int]:
    """The hosts to run on and the ranks of each, once enough are up."""
    patience = time.monotonic() + config.restart_wait
    said = -float("inf")
    while True:
        hosts = hosts_of(resource)
        per_host = _devices_per_node(config, [host for host in hosts if host.devices], resource)
        able = [host for host in hosts if host.devices >= per_host]
        if len(able) >= config.num_nodes:
            return able, per_host
        now = time.monotonic()
        if fits is not None and now >= patience:
            left = next((n for n in range(len(able), 0, -1) if fits(n * per_host)), None)
            if left is not None:
                going_on = counted(left * per_host, "rank")
                LOG.warning("%d of %d hosts are left: going on with %s", len(able), config.num_nodes, going_on)
                return able[:left], per_host
        if now >= deadline:
            raise ClusterError(
                f"cluster.num_nodes={config.num_nodes}: {len(able)} hosts with {per_host} {resource}s are up after "
                f"cluster.wait={config.wait:g} s{_too_small(hosts, per_host, resource)}; start Ray on others (`ray "
                "start --address=HOST:PORT`), or lower cluster.num_nodes or cluster.devices_per_node"
            )
        if now - said >= 10:
            said, small = now, _too_small(hosts, per_host, resource)
            LOG.info(
                "waiting for hosts: %d of %d are up, %.0f s left%s", len(able), config.num_nodes, deadline - now, small
            )
        time.sleep(0.5)


def _too_small(hosts: Sequence[Host], per_host: int, resource: str) -> str:
    """Says which hosts are up that have not enough."""
    few = [f"{host.ip} has {host.devices}" for host in hosts if host.devices < per_host]
    return f" (too few of the {per_host} {resource}s asked for: {', '.join(few)})" if few else ""


def _devices_per_node(config: ClusterConfig, hosts: Sequence[Host], resource: str) -> int:
    if config.devices_per_node != "auto":
        return config.devices_per_node
    if resource == "CPU":
        # A mapping counts its devices host by host, and on a CPU a device is a process.
        return 1 if config.device_mapping is None else -(-(max(config.device_mapping) + 1) // config.num_nodes)
    numbers = {host.devices for host in hosts}
    if len(numbers) > 1:
        raise RecipeError(
            f"cluster.devices_per_node=auto: hosts have {', '.join(map(str, sorted(numbers)))} CUDA devices; set it to "
            f"{min(numbers)}"
        )
    return max(numbers, default=1)


def place_actors(
    rank_class: type,
    config: ClusterConfig,
    hosts: Sequence[Host],
    per_host: int,
    resource: str,
    deadline: float,
    opened: ExitStack,
) -> list[tuple[Host, Any]]:
    """An actor for every rank, in the order of ranks, each with its host.

    Without a mapping Ray chooses hosts and devices: a bundle holds the devices of one host, so that its ranks lie
    together. With one, rank i takes device mapping[i], counted over the hosts in order; in a cluster that others use,
    where no run of theirs holds it.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

    on_gpu = resource == "GPU"
    environment = {name: str(value) for name, value in config.env.items()}
    by_id = {host.id: host for host in hosts}
    actor_class: Any = ray.remote(rank_class)

    def start(strategy: Any) -> Any:
        return actor_class.options(
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": environment} if environment else None,
        ).remote()

    chosen: list[tuple[Any, int | None]] = []
    if config.device_mapping is None:
        num_nodes = min(config.num_nodes, len(hosts))
        bundle: dict[str, float] = {"CPU": per_host, **({"GPU": per_host} if on_gpu else {})}
        group = placement_group([bundle] * num_nodes, strategy="PACK" if num_nodes == 1 else "STRICT_SPREAD")
        opened.callback(_quietly, remove_placement_group, group)
        if not group.wait(max(1.0, deadline - time.monotonic())):
            free = ray.available_resources()
            raise ClusterError(
                f"cluster.num_nodes={num_nodes} x {per_host} {resource}s are not free after cluster.wait="
                f"{config.wait:g} s; free are {free.get(resource, 0):g} {resource}s and {free.get('CPU', 0):g} CPUs: "
                "wait for other runs, or lower cluster.devices_per_node"
            )
        chosen = [
            (PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle), None)
            for bundle in range(num_nodes)
            for _ in range(per_host)
        ]
    else:
        if max(config.device_mapping) >= len(hosts) * per_host:
            raise RecipeError(
                f"cluster.device_mapping names device {max(config.device_mapping)}, and {len(hosts)} hosts with "
                f"{per_host} {resource}s are devices 0 to {len(hosts) * per_host - 1}; name some of those"
            )
        places = [divmod(device, per_host) for device in config.device_mapping]
        if on_gpu and config.address is not None:
            wanted = [(hosts[host].id, local) for host, local in places]
            held = hold_devices(
                lambda node: start(NodeAffinitySchedulingStrategy(node, soft=False)), wanted, deadline, config.wait
            )
            return [(by_id[node], actor) for (node, _), actor in zip(wanted, held, strict=True)]
        # Ray of our own would show other devices than those that the mapping names.
        environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        for host, local in places:
            strategy = NodeAffinitySchedulingStrategy(hosts[host].id, soft=False)
            chosen.append((strategy, local if on_gpu else None))
    actors = [start(strategy) for strategy, _ in chosen]
    refs = [actor.identify.remote(device) for actor, (_, device) in zip(actors, chosen, strict=True)]
    while len(up := ray.wait(refs, num_returns=len(refs), timeout=10)[0]) < len(refs):
        LOG.info("waiting for ranks: %d of %d are up", len(up), len(refs))
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{len(up)} of {len(refs)} ranks came up within cluster.wait={config.wait:g} s; wait for other runs, "
                "look at Ray's logs, or raise it"
            )
    places = _got(refs)
    placed = [(by_id[node], device, actor) for (node, device), actor in zip(places, actors, strict=True)]
    if config.device_mapping is None:
        placed = [placed[i] for i in rank_order([(host.order, device) for host, device, _ in placed])]
    return [(host, actor) for host, _, actor in placed]


def hold_devices(
    start: Callable[[str], Any], wanted: Sequence[tuple[str, int]], deadline: float, wait: float
) -> list[Any]:
    """Actors that hold just the devices `wanted`, of (node, device). `start` starts one on a node, with whatever device
    Ray gives it: more are started until those are among them, and the others end. Where none comes for a while, all
    others are given back and it begins again: another run that seeks its own may wait for them."""
    import ray

    def begin(nodes: Iterable[str]) -> dict[Any, Any]:
        return {(actor := start(node)).identify.remote(None): actor for node in nodes}

    starting = begin(node for node, _ in wanted)
    held: dict[tuple[str, int], Any] = {}
    while missing := [device for node, device in wanted if (node, device) not in held]:
        ready, _ = ray.wait(list(starting), timeout=5)
        for ref in ready:
            (place,), held_by = _got([ref]), starting.pop(ref)
            held[place] = held_by
            if place not in wanted:
                starting |= begin([place[0]])
        if not ready and time.monotonic() > deadline:
            raise ClusterError(
                f"cluster.device_mapping: devices {', '.join(map(str, missing))} of their hosts are not free after "
                f"cluster.wait={wait:g} s; wait for other runs, or name other devices"
            )
        if not ready:
            LOG.info("waiting for devices: %d of %d are free", len(wanted) - len(missing), len(wanted))
            for actor in [*(held.pop(place) for place in held.keys() - set(wanted)), *starting.values()]:
                ray.kill(actor)
            time.sleep(random.random())  # not in step with that run
            starting = begin(node for node, device in wanted if (node, device) not in held)
    for actor in [*(held[place] for place in held if place not in wanted), *starting.values()]:
        ray.kill(actor)
    return [held[place] for place in wanted]


def _got(refs: Sequence[Any]) -> list[Any]:
    """What actors said of where they are."""
    import ray
    from ray import exceptions

    try:
        return ray.get(refs)
    except exceptions.RayError as error:
        raise LostRanks(f"a rank's process did not come up: {error}") from None


def shown_as(device: int, shown: Sequence[str] | None) -> str:
    """The name in CUDA_VISIBLE_DEVICES of the device number `device` of a host that shows `shown`, or all for None."""
    return str(device) if shown is None else shown[device]


def number_of(name: str, shown: Sequence[str] | None) -> int:
    """Which device of a host that shows `shown`, or all for None, goes by `name` in CUDA_VISIBLE_DEVICES."""
    return int(name) if shown is None else list(shown).index(name)


def rank_order(places: Sequence[tuple[Any, int]]) -> list[int]:
    """Indices of (host, device) pairs by host, then device: whatever order they come up in, ranks are the same."""
    return sorted(range(len(places)), key=lambda i: (places[i], i))


def _quietly(work: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(Exception):  # whatever Ray says once the cluster is gone
        work(*args)
