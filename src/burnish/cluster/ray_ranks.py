"""Ranks as Ray's actors: on a Ray of their own on this host, or on the hosts of a cluster. Ray places and calls them;
batches travel through its object store.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from burnish.cluster.lifeline import Lifeline, Lifelines
from burnish.cluster.phases import phase
from burnish.cluster.placement import await_hosts, connected, number_of, place_actors, shown_as
from burnish.cluster.ranks import (
    DIED,
    POLL,
    Answer,
    ClusterError,
    Failure,
    LostHead,
    Place,
    await_answers,
    counted,
    failures_of,
    first,
    hang,
    raise_failure,
    shared_values,
)
from burnish.cluster.seat import Seat, Setting, show
from burnish.config import ClusterConfig

LOG = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
SHOWN = 8
"""Ranks whose pids a line on the console has room for; each says its own in its log."""
HEAD_SILENCE = 8.0
"""Seconds without an open port after which the cluster's head counts as gone."""


class RayRanks:
    """A world of actors, each with an object of the class `target`.

    `fits` says of a number of ranks whether the recipe can be laid out over them: where it is given, a start goes on
    with fewer hosts than asked for after `cluster.restart_wait`. `meet` forms torch's process group.
    """

    def __init__(
        self,
        config: ClusterConfig,
        target: str,
        args: tuple[Any, ...],
        *,
        device: str,
        logs: Path | None = None,
        log_level: str = "info",
        fits: Callable[[int], bool] | None = None,
        meet: bool = True,
    ) -> None:
        self._config = config
        self._open = ExitStack()
        self._actors: list[Any] = []
        self._settings: list[Setting] = []
        self._pids: dict[int, int] = {}
        self._head_gone = False
        self._over = threading.Lock()
        self._ender: threading.Thread | None = None
        try:
            self._start(target, args, device, None if logs is None else logs.absolute(), log_level, fits, meet)
        except BaseException:
            self.kill()
            raise

    def _start(
        self,
        target: str,
        args: tuple[Any, ...],
        device: str,
        logs: Path | None,
        log_level: str,
        fits: Callable[[int], bool] | None,
        meet: bool,
    ) -> None:
        config = self._config
        self._open.enter_context(connected(config, device))
        import ray

        self._head = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._watch_head, name="head", daemon=True).start()
        resource = "GPU" if device == "cuda" else "CPU"
        deadline = time.monotonic() + config.wait
        hosts, per_host = await_hosts(config, resource, fits, deadline)
        placed = place_actors(Actor, config, hosts, per_host, resource, deadline, self._open)
        self.world_size = len(placed)
        num_hosts = len({host.id for host, _ in placed})
        phase(f"placement: {counted(self.world_size, 'rank')} on {counted(num_hosts, 'host')}")

        key = secrets.token_bytes(32)
        self._lines = Lifelines(ray.util.get_node_ip_address(), key, self._on_message)
        self._open.callback(self._lines.close)
        self._actors = [actor for _, actor in placed]
        counts: dict[str, int] = {}
        for rank, (host, _) in enumerate(placed):
            local = counts[host.id] = counts.get(host.id, -1) + 1
            name = "cuda:0" if device == "cuda" else "cpu"  # Ray shows each process its own device alone
            self._settings.append(
                Setting(
                    place=Place(rank, self.world_size, local, host.ip, name),
                    logs=None if logs is None else str(logs),
                    log_level=log_level,
                    timeout=config.timeout,
                    env={},  # set when Ray starts the process
                    folder=os.getcwd(),
                    import_path=tuple(os.path.abspath(entry) for entry in sys.path),
                )
            )
        pids = self._ask_all("sit", [(setting, self._lines.address, key) for setting in self._settings])
        self._pids = dict(enumerate(pids))
        phase(f"ranks up: {'pids ' + ', '.join(map(str, pids)) if len(pids) <= SHOWN else len(pids)}")
        if meet:
            (store,) = self._ask({0: ("open_store", placed[0][0].ip)})
            self._ask_all("meet", [(store,)] * self.world_size)
        self._ask_all("start", [(target, args)] * self.world_size)

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        if self._over.locked():
            self.kill()  # waits for whoever ends them
            raise ClusterError(f"{method} was asked of ranks that have ended")
        import ray

        common = ray.put(args) if args else ()
        owns: Sequence[Any] = [()] * self.world_size
        if by_rank is not None:
            values, indices = shared_values(by_rank)
            stored = [ray.put((value,)) for value in values]
            owns = [stored[index] for index in indices]
        return self._ask_all("call", [(method, common, own) for own in owns])

    def _ask_all(self, step: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._ask({rank: (step, *given) for rank, given in enumerate(arguments)})

    def _ask(self, steps: Mapping[int, tuple[Any, ...]]) -> list[Any]:
        """What came of a step of each of some ranks. Raises, and ends all, where one failed, is lost or silent."""
        step, *given = steps[0]
        method = given[0] if step == "call" else step
        refs = {rank: self._actors[rank].carry_out.remote(*step) for rank, step in steps.items()}

        def look(waiting: Sequence[int]) -> dict[int, Answer]:
            return self._look(method, {rank: refs[rank] for rank in waiting})

        answers = await_answers(refs, look, self._config.timeout)
        failures = failures_of(answers)
        if failures:
            self.kill()
            failure = first(failures)
            raise_failure(failure, self._settings[failure.rank].log_of(failure.rank))
        if len(answers) < len(refs):
            self._give_up(method, [rank for rank in refs if rank not in answers])
        return [answers[rank][1] for rank in refs]

    def _look(self, method: str, refs: Mapping[int, Any]) -> dict[int, Answer]:
        """Those of `refs`, by rank, of which something came within POLL seconds, or nothing will any more."""
        import ray
        from ray import exceptions

        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=POLL)
        found: dict[int, Answer] = {}
        for rank, ref in refs.items():
            if ref in ready:
                try:
                    found[rank] = ray.get(ref)
                except exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None) or error
                    found[rank] = False, self._failure(rank, method, f"{type(cause).__name__}: {cause}", str(error))
                except exceptions.RayError as error:
                    gone = isinstance(error, exceptions.NodeDiedError)
                    found[rank] = False, self._loss(rank, method, "its host is gone" if gone else DIED)
            elif rank in self._lines.lost:
                found[rank] = False, self._loss(rank, method, DIED)
        if self._head_gone:
            self.kill()
            raise LostHead(f"the head of the Ray cluster at {self._head} is gone; the run ended in {method}")
        return found

    def _failure(self, rank: int, method: str, text: str, traceback: str = "", **more: Any) -> Failure:
        host, at = self._settings[rank].place.host, self._lines.lost.get(rank, time.time())
        return Failure(rank, host, self._pids.get(rank, 0), method, text, traceback, at, **more)

    def _loss(self, rank: int, method: str, text: str) -> Failure:
        return self._failure(rank, method, text, is_lost=True)

    def _give_up(self, method: str, ranks: Sequence[int]) -> NoReturn:
        places = self._lines.stacks(5.0)
        self.kill()
        waited_for = {rank: f"{self._settings[rank].place.host} (pid {self._pids.get(rank)})" for rank in ranks}
        raise hang(method, self._config.timeout, waited_for, places, self.world_size, self._settings[0].logs)

    def _on_message(self, rank: int, message: tuple[Any, ...]) -> None:
        if message[0] == "log":
            show(message)

    def _watch_head(self) -> None:
        host, _, port = self._head.rpartition(":")
        seen = time.monotonic()
        while not self._over.locked():
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
                seen = time.monotonic()
            except OSError:
                self._head_gone = time.monotonic() - seen > HEAD_SILENCE
            time.sleep(2)

    def close(self) -> None:
        """End every rank and hand back what was taken; a Ray that was started here ends too."""
        if not self._over.acquire(blocking=False):
            return
        self._ender = threading.current_thread()
        self._lines.end(0)
        _within(20, self._open.close)

    def kill(self) -> None:
        if not self._over.acquire(blocking=False):
            if self._ender is not None and threading.current_thread() is threading.main_thread() is not self._ender:
                # Whoever ends the ranks beside this thread ends the process next, and with its own exit status.
                self._ender.join(30)
            return
        self._ender = threading.current_thread()
        if self._settings:
            self._lines.end(1)
        if self._head_gone:
            return  # Ray would wait for it; it does so when this process ends, and its processes here end with that
        import ray

        def end() -> None:
            for actor in self._actors:
                with contextlib.suppress(Exception):  # whatever Ray says of an actor that is gone
                    ray.kill(actor)
            self._open.close()

        _within(20, end)


class Actor(Seat):
    """A rank's process, as Ray starts it."""

    def identify(self, device: int | None) -> tuple[str, int]:
        """Ray's node and the number of the device, among those that its host shows; 0 on a CPU. `device` is the one to
        take, where Ray has not chosen."""
        import ray
        from ray._private.worker import global_worker

        shown = global_worker.original_visible_accelerator_ids.get("GPU")
        context = ray.get_runtime_context()
        given = context.get_accelerator_ids()["GPU"]
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown_as(device, shown)
        elif given:
            device = number_of(given[0], shown)
        return context.get_node_id(), device or 0

    def sit(self, setting: Setting, address: tuple[str, int], key: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        _die_with_parent()
        super().sit(setting)
        self.hold_line(Lifeline(address, key, ("hello", setting.place.rank), self._on_message))
        phase(f"up on {setting.place.host}")
        return os.getpid()

    def _on_message(self, message: tuple[Any, ...]) -> None:
        assert message[0] == "stacks", message
        assert self._line is not None
        self._line.tell("stacks", self.place.rank, self.stacks())


def _die_with_parent() -> None:
    """Have Linux kill this process with the one of Ray's that started it, whoever holds the interpreter's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Do it, or go on without: an end that hangs must not keep the driver from its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        LOG.warning("ending Ray takes longer than %g s: going on without", seconds)
