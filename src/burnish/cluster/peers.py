"""Ranks that torchrun or Slurm started, without Ray: rank 0's process is the driver and holds rank 0's object in a
thread of its own, the others serve its calls.

Calls travel over the lifelines. A value that several ranks share goes to the first of them, which hands it on.
"""

from __future__ import annotations

import contextlib
import faulthandler
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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from burnish.cluster.lifeline import Lifeline, Lifelines, keep_alive
from burnish.cluster.phases import phase
from burnish.cluster.ranks import ClusterError, Failure, Place, first, hang, raise_failure, shared_values
from burnish.cluster.seat import Seat, Setting
from burnish.config import ClusterConfig, RecipeError

LOG = logging.getLogger(__name__)

POLL = 0.25
"""Seconds between two looks at whether a rank was lost while calls run."""
GATHER = 3.0
"""Seconds after the first failure in which other ranks may tell theirs."""
FAREWELL = 10.0
"""Seconds that the driver has, after a failure, to say it and end; a peer that ended first would be torchrun's news."""
LEAVE = 25.0
"""Seconds that other processes have to read that there is nothing to do for them, before a driver ends."""
DRIVER_KEY = "driver"
REFUSED = "refused"


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


def _store(world: World, seconds: float) -> Any:
    """The store by which the processes meet: torchrun's own, or one that rank 0 holds."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "MASTER_ADDR": world.master,
        "MASTER_PORT": str(world.port),
    }
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    return PrefixStore("peers", store)


_opened = threading.Event()
"""Whether this process, as the driver, has told the others where it is."""


@contextlib.contextmanager
def leading(environment: Mapping[str, str]) -> Iterator[None]:
    """Around all that the driver does: where it ends without having opened ranks, because it was refused or there was
    nothing to train, the other processes end too."""
    world = environment_world(environment)
    if world is None:
        yield
        return
    why = REFUSED
    try:
        yield
        why = ""
    finally:
        if not _opened.is_set():
            with contextlib.suppress(RuntimeError):  # the others, or their store, are gone by themselves
                store = _store(world, LEAVE)
                store.set(DRIVER_KEY, why)
                store.wait([f"left {rank}" for rank in range(1, world.size)], timedelta(seconds=LEAVE))


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
        _check(config, world)
        self._config = config
        self.world_size = world.size
        self._answers: dict[tuple[int, int], Any] = {}
        self._changed = threading.Condition()
        self._hosts: dict[int, tuple[str, int, Any]] = {}
        self._number = 0
        self._last_answer = time.monotonic()
        self._over = threading.Lock()
        self._lines = Lifelines(socket.gethostbyname(world.master), secrets.token_bytes(32), self._on_message)
        try:
            store = _store(world, config.wait)
            place = {"address": self._lines.address, "key": self._lines.key.hex()}
            store.set(DRIVER_KEY, json.dumps(place))
            _opened.set()
            if not self._lines.wait_for(world.size - 1, config.wait):
                missing = sorted(set(range(1, world.size)) - self._hosts.keys())
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
            self._seat = _Seated(store, lambda number, answer: self._store_answer(0, number, answer))
            table = {rank: host[2] for rank, host in self._hosts.items()}
            self._send_to_all("sit", (self._setting, table), (own, table))
            if meet:
                self._send_to_all("meet", ())
            self._send_to_all("build", (target, args))
        except BaseException:
            self.kill()
            raise

    def _send_to_all(self, step: str, args: tuple[Any, ...], own: tuple[Any, ...] | None = None) -> None:
        number = self._next()
        data = pickle.dumps(args)
        for rank in range(1, self.world_size):
            self._lines.send(rank, "call", number, step, data, None, ())
        self._seat.take(number, step, args if own is None else own, None)
        self._wait(number, step)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        return self.start(method, *args, by_rank=by_rank).result()

    def start(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> PeerCall:
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
        self._seat.take(number, "call", (method, args), (by_rank[0],) if by_rank is not None else None)
        return PeerCall(self, number, method)

    def _store_answer(self, rank: int, number: int, answer: Any) -> None:
        with self._changed:
            self._answers[rank, number] = answer
            self._changed.notify_all()

    def _on_message(self, rank: int, message: tuple[Any, ...]) -> None:
        if message[0] == "hello":
            self._hosts[rank] = message[2], message[3], message[4]
        elif message[0] == "answer":
            self._store_answer(rank, message[2], pickle.loads(message[3]))

    def _wait(self, number: int, method: str) -> list[Any]:
        """The answers to call `number`. Raises, and ends all, where ranks failed, are lost or do not answer."""
        begun = max(time.monotonic(), self._last_answer)
        failed_at: float | None = None
        ranks = range(self.world_size)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: all((rank, number) in self._answers for rank in ranks), POLL)
                got = {rank: self._answers[rank, number] for rank in ranks if (rank, number) in self._answers}
            lost = {rank: at for rank, at in self._lines.lost.items() if rank not in got}
            if len(got) + len(lost) == self.world_size:
                break
            now = time.monotonic()
            if failed_at is None and (lost or any(not done for done, _ in got.values())):
                failed_at = now
            if failed_at is not None and now - failed_at > GATHER:
                break
            if failed_at is None and now - begun > self._config.timeout:
                self._give_up(method, [rank for rank in ranks if rank not in got])
        failures = [result for done, result in got.values() if not done]
        for rank, at in lost.items():
            host, pid, _ = self._hosts[rank]
            text = "its process died without a word: killed, out of memory, or its host is gone"
            failures.append(Failure(rank, host, pid, method, text, "", at, is_lost=True))
        if failures:
            self.kill()
            failure = first(failures)
            raise_failure(failure, self._setting.log_of(failure.rank) if failure.rank else None)
        for rank in ranks:
            del self._answers[rank, number]
        self._last_answer = time.monotonic()
        return [got[rank][1] for rank in ranks]

    def _give_up(self, method: str, ranks: Sequence[int]) -> None:
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
        if self._over.acquire(blocking=False):
            self._lines.end(0)
            self._lines.close()

    def kill(self) -> None:
        """The other processes end with this one, or in FAREWELL seconds."""
        if self._over.acquire(blocking=False):
            timer = threading.Timer(FAREWELL, self._lines.end, (1,))
            timer.daemon = True
            timer.start()


@dataclass(frozen=True, slots=True)
class PeerCall:
    """A call that runs on PeerRanks."""

    ranks: PeerRanks
    number: int
    method: str

    def result(self) -> list[Any]:
        return self.ranks._wait(self.number, self.method)


def _check(config: ClusterConfig, world: World) -> None:
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
    device = f"cuda:{local_rank}" if place.device == "cuda" else place.device
    return replace(place, local_rank=local_rank, device=device)


class _Seated:
    """A seat whose calls are done in order by a thread of its own; `answer` is told what came of each."""

    def __init__(self, store: Any, answer: Any) -> None:
        self.seat = Seat()
        self._store = store
        self._answer = answer
        self._calls: queue.Queue[tuple[int, str, Any, Any]] = queue.Queue()
        threading.Thread(target=self._serve, name="rank", daemon=True).start()

    def take(self, number: int, step: str, args: Any, own: Any) -> None:
        self._calls.put((number, step, args, own))

    def _serve(self) -> None:
        while True:
            number, step, args, own = self._calls.get()
            self._answer(number, carry_out(self.seat, self._store, step, args, own))


def carry_out(
    seat: Seat, store: Any, step: str, args: tuple[Any, ...], own: tuple[Any, ...] | None
) -> tuple[bool, Any]:
    """(True, result) or (False, Failure) of one thing that the driver asks of a seat."""
    if step == "call":
        method, given = args
        return seat.call(method, given, own or ())
    if step == "build":
        failure = seat.build(*args)
        return failure is None, failure
    try:
        if step == "sit":
            seat.sit(args[0])
        else:
            seat.join(store)
    except Exception as error:
        return False, Failure.of(error, seat.place, step)
    return True, None


def serve(world: World) -> int:
    """Serve rank 0's calls until it says that all is done, which ends this process with status 0; when it is gone, with
    status 1. Returns 0 where it needs no ranks."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)  # without waiting for the store's answer
    store = _store(world, 24 * 3600)
    told = store.get(DRIVER_KEY).decode()
    if told in ("", REFUSED):
        if told:
            print(f"burnish: rank {world.rank} ends, as rank 0 did before it had ranks; it says why", file=sys.stderr)
        store.set(f"left {world.rank}", "")  # rank 0 may hold the store, and waits until all have read it
        return 0
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # sent to every process, but rank 0 decides: it finishes the step
    driver = json.loads(told)
    address, key = tuple(driver["address"]), bytes.fromhex(driver["key"])
    _Peer(world, store, address, key).serve()
    return 1


class _Peer:
    """A process that serves; values that it shares with others come from one of them, or go to them."""

    def __init__(self, world: World, store: Any, address: tuple[str, int], key: bytes) -> None:
        self._world, self._store, self._key = world, store, key
        self._seat = Seat()
        self._calls: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self._values: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._links: dict[int, Connection] = {}
        self._peers: dict[int, tuple[str, int]] = {}
        with socket.create_connection(address) as probe:
            self._host = probe.getsockname()[0]
        self._listener = Listener((self._host, 0), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()
        hello = ("hello", world.rank, self._host, os.getpid(), self._listener.address)
        self._line = Lifeline(address, key, hello, self._on_message)

    def serve(self) -> None:
        while True:
            _, number, step, data, value, _ = self._calls.get()
            args = pickle.loads(data)
            own = None
            if value is not None:
                own = (pickle.loads(value or self._await_value(number)),)
            if step == "sit":
                setting, self._peers = args
                place = replace(setting.place, rank=self._world.rank, host=self._host)
                args = (replace(setting, place=_device(place, self._world.local_rank)),)
            done, result = carry_out(self._seat, self._store, step, args, own)
            self._line.tell("answer", self._world.rank, number, pickle.dumps((done, result), protocol=5))

    def _on_message(self, message: tuple[Any, ...]) -> None:
        if message[0] == "stacks":
            self._line.tell("stacks", self._world.rank, self._seat.stacks())
            return
        _, number, _, _, value, followers = message
        self._calls.put(message)
        for rank in followers:
            with contextlib.suppress(OSError):  # a peer that is gone, of which the driver knows
                if rank not in self._links:
                    self._links[rank] = Client(self._peers[rank], authkey=self._key)
                self._links[rank].send((number, value))

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
