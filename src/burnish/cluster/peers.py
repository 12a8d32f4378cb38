"""Ranks that torchrun or Slurm started, without Ray: rank 0's process is the driver and holds rank 0's object in a
thread of its own, the others serve its calls.

Calls travel over the lifelines. A value that several ranks share goes to the first of them, which hands it on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import logging
import os
import pickle
import queue
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NoReturn

from burnish.cluster.lifeline import Lifeline, Lifelines, keep_alive
from burnish.cluster.phases import phase
from burnish.cluster.ranks import (
    DIED,
    POLL,
    Answer,
    ClusterError,
    Failure,
    Place,
    await_answers,
    failures_of,
    first,
    hang,
    raise_failure,
    shared_values,
)
from burnish.cluster.seat import Seat, Setting
from burnish.config import ClusterConfig, RecipeError

LOG = logging.getLogger(__name__)

FAREWELL = 10.0
"""Seconds that the driver has, after a failure, to say it and end; a peer that ended first would be torchrun's news."""
LEAVE = 25.0
"""Seconds that other processes have to come, before a driver ends that has nothing for them to do."""
ARRIVAL = 600.0
"""Seconds that other processes wait for a driver to begin."""
DRIVER_KEY = "driver"


@dataclass(frozen=True, slots=True)
class World:
    """What the environment of a process says of its place."""

    rank: int
    size: int
    local_rank: int
    master: str
    port: int


def environment_world(environment: Mapping[str, str]) -> World | None:
    """The world that torchrun's or Slurm's variables describe; None where there is none, or one process alone."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        world = World(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            master=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
        )
    elif "SLURM_STEP_NUM_TASKS" in environment:  # of srun alone: in a batch script one process sees SLURM_NTASKS
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        job = int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
        world = World(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            master=environment.get("MASTER_ADDR") or first_host(nodes),
            port=int(environment.get("MASTER_PORT") or 20000 + job % 20000),
        )
    else:
        return None
    return world if world.size > 1 else None


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: gpu[03-05,9],login1."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise ClusterError(f"SLURM_JOB_NODELIST={nodes} names no host; set MASTER_ADDR to the first one")
    return found[1] + (found[2] or "") + (found[3] or "")


def _store(world: World) -> Any:
    """The store by which the processes meet: torchrun's own, or one that rank 0 holds."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        world.master,
        world.port,
        world.size,
        is_master=world.rank == 0 and not is_launchers,
        timeout=timedelta(seconds=ARRIVAL),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"peers {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _unmet(world: World, error: RuntimeError) -> ClusterError:
    where = f"{world.master}:{world.port}"
    why = (
        f"cannot listen at {where}"
        if world.rank == 0
        else f"found no rank 0 at {where} within {ARRIVAL:g} s, which is not there or has not begun"
    )
    return ClusterError(
        f"rank {world.rank} of {world.size} {why} ({str(error).splitlines()[0]}); MASTER_ADDR must be the host of rank "
        "0, and MASTER_PORT free there"
    )


class Gathering:
    """The other processes as rank 0 sees them, from when it begins: each is connected to it, and so ends with it."""

    def __init__(self, world: World) -> None:
        self.hosts: dict[int, tuple[str, int, Any]] = {}
        """Address, pid and listener of each that is here."""
        self.on_answer: Callable[[int, int, bytes], None] = lambda rank, number, answer: None
        self.is_led = False
        """Whether somebody has taken it upon himself to end the processes."""
        self._others = world.size - 1
        try:
            self.lines = Lifelines(socket.gethostbyname(world.master), secrets.token_bytes(32), self._on_message)
            self.store = _store(world)
        except RuntimeError as error:
            raise _unmet(world, error) from None
        place = {"address": self.lines.address, "key": self.lines.key.hex()}
        self.store.set(DRIVER_KEY, json.dumps(place))

    def _on_message(self, rank: int, message: tuple[Any, ...]) -> None:
        if message[0] == "hello":
            self.hosts[rank] = message[2], message[3], message[4]
        elif message[0] == "answer":
            self.on_answer(rank, message[2], message[3])

    def wait(self, seconds: float) -> list[int]:
        """The ranks that are not here after so long; less, if one is lost meanwhile."""
        self.lines.wait_for(self._others, seconds)
        return sorted(set(range(1, self._others + 1)) - self.hosts.keys())

    def dismiss(self, is_refused: bool) -> None:
        """End those processes, which no ranks were made of."""
        if not self.is_led:
            self.is_led = True
            self.wait(LEAVE)
            for rank in list(self.hosts) if is_refused else ():
                self.lines.send(rank, "refused")
            self.lines.end(0)
            self.lines.close()


@functools.cache
def gathering(world: World) -> Gathering:
    """The one of this process, rank 0; opened when it is first asked for."""
    return Gathering(world)


@contextlib.contextmanager
def leading(environment: Mapping[str, str]) -> Iterator[None]:
    """Around all that the driver does: the other processes end with it, and also where it ends without having opened
    ranks, because it was refused or there was nothing to train."""
    world = environment_world(environment)
    if world is None:
        yield
        return
    others, is_refused = gathering(world), True
    try:
        yield
        is_refused = False
    finally:
        others.dismiss(is_refused)


class PeerRanks:
    """The ranks of processes that are there already; this one is rank 0."""

    def __init__(
        self,
        config: ClusterConfig,
        world: World,
        target: str,
        args: tuple[Any, ...],
        *,
        device: str,
        logs: Path | None = None,
        log_level: str = "info",
        meet: bool = True,
    ) -> None:
        check_keys(config, world)
        others = gathering(world)
        if others.is_led:
            raise ClusterError(
                "the other processes that torchrun or Slurm started have ended with this one's first run; start the "
                "launcher once for each run"
            )
        others.is_led = True
        others.on_answer = lambda rank, number, answer: self._keep(rank, number, pickle.loads(answer))
        self._config = config
        self.world_size = world.size
        self._answers: dict[tuple[int, int], Any] = {}
        self._changed = threading.Condition()
        self._hosts, self._lines = others.hosts, others.lines
        self._number = 0
        self._over = threading.Lock()
        try:
            missing = others.wait(config.wait)
            if self._lines.lost:
                raise_failure(first(self._loss(rank, "start") for rank in list(self._lines.lost)))
            if missing:
                raise ClusterError(f"ranks {missing} did not come up within cluster.wait={config.wait:g} s")
            phase(f"ranks up: {world.size}")
            self._setting = Setting(
                place=Place(0, world.size, 0, self._lines.address[0], device),
                logs=None if logs is None else str(logs.absolute()),
                log_level=log_level,
                timeout=config.timeout,
                env={name: str(value) for name, value in config.env.items()},
                folder=os.getcwd(),
                import_path=tuple(os.path.abspath(entry) for entry in sys.path),
            )
            own = replace(self._setting, logs=None, place=_device(self._setting.place, world.local_rank))
            self._seat = _Seated(others.store, lambda number, answer: self._keep(0, number, answer))
            table = {rank: host[2] for rank, host in self._hosts.items()}
            self._ask_all("sit", (self._setting, table), (own,))
            if meet:
                self._ask_all("meet", ())
            self._ask_all("start", (target, args))
        except BaseException:
            self.kill()
            raise

    def _ask_all(self, step: str, args: tuple[Any, ...], own: tuple[Any, ...] | None = None) -> None:
        """A step that is the same for all, but for this process, where it has `own` arguments."""
        number, data = self._next(), pickle.dumps(args)
        for rank in range(1, self.world_size):
            self._lines.send(rank, "call", number, step, data, None, ())
        self._seat.take(number, step, *(args if own is None else own))
        self._answered(number, step)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        if self._over.locked():
            raise ClusterError(f"{method} was asked of ranks that have ended")
        number, common = self._next(), pickle.dumps((method, args), protocol=5)
        values, indices = shared_values([None] * self.world_size if by_rank is None else by_rank)
        with_value = by_rank is not None
        for index, value in enumerate(values if with_value else [None]):
            ranks = [rank for rank in range(1, self.world_size) if indices[rank] == index]
            data = pickle.dumps(value, protocol=5) if with_value and ranks else b""
            leader = ranks[0] if with_value and ranks else None
            for rank in ranks:
                if rank == leader:
                    self._lines.send(rank, "call", number, "call", common, data, tuple(ranks[1:]))
                else:
                    self._lines.send(rank, "call", number, "call", common, b"" if with_value else None, ())
        self._seat.take(number, "call", method, args, () if by_rank is None else (by_rank[0],))
        return self._answered(number, method)

    def _keep(self, rank: int, number: int, answer: Answer) -> None:
        with self._changed:
            self._answers[rank, number] = answer
            self._changed.notify_all()

    def _answered(self, number: int, method: str) -> list[Any]:
        """What came of call `number`, by rank. Raises, and ends all, where any failed, is lost or does not answer."""

        def look(waiting: Sequence[int]) -> dict[int, Answer]:
            with self._changed:
                self._changed.wait_for(lambda: all((rank, number) in self._answers for rank in waiting), POLL)
                lost = {rank: (False, self._loss(rank, method)) for rank in waiting if rank in self._lines.lost}
                came = [rank for rank in waiting if (rank, number) in self._answers]
                return lost | {rank: self._answers.pop((rank, number)) for rank in came}

        answers = await_answers(range(self.world_size), look, self._config.timeout)
        failures = failures_of(answers)
        if failures:
            self.kill()
            failure = first(failures)
            raise_failure(failure, self._setting.log_of(failure.rank) if failure.rank else None)
        if len(answers) < self.world_size:
            self._give_up(method, [rank for rank in range(self.world_size) if rank not in answers])
        return [answers[rank][1] for rank in range(self.world_size)]

    def _loss(self, rank: int, method: str) -> Failure:
        host, pid, _ = self._hosts[rank]
        return Failure(rank, host, pid, method, DIED, "", self._lines.lost[rank], is_lost=True)

    def _give_up(self, method: str, ranks: Sequence[int]) -> NoReturn:
        places = {**self._lines.stacks(5.0), 0: self._seat.seat.whereabouts()}
        own_log = self._setting.log_of(0)
        if own_log is not None:
            with open(own_log, "a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self.kill()
        hosts = {0: (socket.gethostname(), os.getpid()), **{rank: host[:2] for rank, host in self._hosts.items()}}
        waited_for = {rank: f"{hosts[rank][0]} (pid {hosts[rank][1]})" for rank in ranks}
        raise hang(method, self._config.timeout, waited_for, places, self.world_size, self._setting.logs)

    def close(self) -> None:
        if not self._over.locked():
            self._ask_all("leave", ())  # this process may have more to do, alone
        if self._over.acquire(blocking=False):
            self._lines.end(0)
            self._lines.close()

    def kill(self) -> None:
        """The other processes end with this one, or in FAREWELL seconds."""
        if self._over.acquire(blocking=False):
            timer = threading.Timer(FAREWELL, self._lines.end, (1,))
            timer.daemon = True
            timer.start()


def check_keys(config: ClusterConfig, world: World) -> None:
    """Raises RecipeError for keys that are about Ray, which here has no say."""
    default = ClusterConfig()
    for name in ("address", "num_nodes", "devices_per_node", "device_mapping", "max_restarts"):
        if getattr(config, name) != getattr(default, name):
            remedy = (
                "torchrun --max-restarts=N" if name == "max_restarts" else "its launcher's options, or start without"
            )
            raise RecipeError(
                f"cluster.{name}={getattr(config, name)} is about processes that Ray starts, and the environment says "
                f"that torchrun or Slurm started {world.size}; remove it, and use {remedy}"
            )


def _device(place: Place, local_rank: int) -> Place:
    """`place` in this process, whose launcher shows it all devices of the host, or its own alone."""
    if place.device != "cuda":
        return replace(place, local_rank=local_rank)
    import torch

    number = 0 if torch.cuda.device_count() == 1 else local_rank
    return replace(place, local_rank=local_rank, device=f"cuda:{number}")


class _Seated:
    """A seat whose calls are done in order by a thread of its own; `answer` is told what came of each."""

    def __init__(self, store: Any, answer: Callable[[int, Answer], None]) -> None:
        self.seat = Seat(store)
        self._answer = answer
        self._calls: queue.Queue[tuple[int, str, tuple[Any, ...]]] = queue.Queue()
        threading.Thread(target=self._serve, name="rank", daemon=True).start()

    def take(self, number: int, step: str, *args: Any) -> None:
        self._calls.put((number, step, args))

    def _serve(self) -> None:
        while True:
            number, step, args = self._calls.get()
            self._answer(number, self.seat.carry_out(step, *args))


def serve(world: World) -> NoReturn:
    """Serve rank 0's calls until it says that all is done, or needs no ranks, which ends this process with status 0;
    when it is gone, with status 1."""
    sys.stdout.flush()  # which the end of this process does not do
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)  # without waiting for the store's answer
    try:
        store = _store(world)
        driver = json.loads(store.get(DRIVER_KEY))
    except RuntimeError as error:
        raise _unmet(world, error) from None
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # sent to every process, but rank 0 decides: it finishes the step
    try:
        peer = _Peer(world, store, tuple(driver["address"]), bytes.fromhex(driver["key"]))
    except OSError:
        LOG.error("the driver is gone: ending")
        sys.exit(1)
    peer.serve()


class _Peer:
    """A process that serves; values that it shares with others come from one of them, or go to them."""

    def __init__(self, world: World, store: Any, address: tuple[str, int], key: bytes) -> None:
        self._world, self._key = world, key
        self._seat = Seat(store)
        self._calls: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self._values: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._links: dict[int, queue.SimpleQueue[tuple[int, bytes]]] = {}
        self._peers: dict[int, tuple[str, int]] = {}
        with socket.create_connection(address) as probe:
            self._host = probe.getsockname()[0]
        self._listener = Listener((self._host, 0), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()
        hello = ("hello", world.rank, self._host, os.getpid(), self._listener.address)
        self._line = Lifeline(address, key, hello, self._on_message)

    def serve(self) -> NoReturn:
        while True:
            _, number, step, data, value, _ = self._calls.get()
            args = pickle.loads(data)
            if step == "sit":
                setting, self._peers = args
                place = replace(setting.place, rank=self._world.rank, host=self._host)
                args = (replace(setting, place=_device(place, self._world.local_rank)),)
            elif step == "call":
                args = (*args, () if value is None else (pickle.loads(value or self._await_value(number)),))
            answer = self._seat.carry_out(step, *args)
            self._line.tell("answer", self._world.rank, number, pickle.dumps(answer, protocol=5))

    def _on_message(self, message: tuple[Any, ...]) -> None:
        if message[0] == "stacks":
            self._line.tell("stacks", self._world.rank, self._seat.stacks())
            return
        if message[0] == "refused":
            rank = self._world.rank
            print(f"burnish: rank {rank} ends, as rank 0 did before it had ranks; it says why", file=sys.stderr)
            return
        _, number, _, _, value, followers = message
        self._calls.put(message)
        for rank in followers:
            if rank not in self._links:
                self._links[rank] = queue.SimpleQueue()
                threading.Thread(target=self._hand_on, args=(rank,), daemon=True).start()
            self._links[rank].put((number, value))

    def _hand_on(self, rank: int) -> None:
        """Apart from the thread that reads what the driver says, which no peer that stands still may hold up."""
        with contextlib.suppress(OSError):  # a peer that is gone, of which the driver knows
            link = Client(self._peers[rank], authkey=self._key)
            keep_alive(link)
            while True:
                link.send(self._links[rank].get())

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection = self._listener.accept()
                threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            keep_alive(connection)
            while True:
                number, value = connection.recv()
                with self._changed:
                    self._values[number] = value
                    self._changed.notify_all()

    def _await_value(self, number: int) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: number in self._values)
            return self._values.pop(number)
