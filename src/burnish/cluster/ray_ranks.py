"""Ranks as Ray's actors: on a Ray of their own on this host, or on the hosts of a cluster. Ray places and calls them;
batches travel through its object store.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.cluster.lifeline import Lifeline, Lifelines
from burnish.cluster.phases import phase
from burnish.cluster.placement import await_hosts, connected, number_of, place_actors, shown_as
from burnish.cluster.ranks import ClusterError, Failure, Place, counted, first, hang, raise_failure, shared_values
from burnish.cluster.seat import Seat, Setting, show
from burnish.config import ClusterConfig

LOG = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
POLL = 0.25
"""Seconds between two looks at whether a rank was lost while calls run."""
GATHER = 3.0
"""Seconds after the first failure in which others may tell theirs: what comes first here need not have come first."""
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
        self._last_answer = time.monotonic()
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
        pids = self._all("sit", [(setting, self._lines.address, key) for setting in self._settings])
        self._pids = dict(enumerate(pids))
        phase(f"ranks up: {'pids ' + ', '.join(map(str, pids)) if len(pids) <= SHOWN else len(pids)}")
        if meet:
            store = self._resolve([self._actors[0].open_store.remote(placed[0][0].ip)], "meet", [0])[0]
            self._all("meet", [(store,)] * self.world_size)
        failures = self._all("build", [(target, args)] * self.world_size)
        self._raise_any([failure for failure in failures if failure is not None])

    def _all(self, step: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        refs = [getattr(actor, step).remote(*given) for actor, given in zip(self._actors, arguments, strict=True)]
        return self._resolve(refs, step, range(self.world_size))

    def call(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> list[Any]:
        return self.start(method, *args, by_rank=by_rank).result()

    def start(self, method: str, *args: Any, by_rank: Sequence[Any] | None = None) -> RayCall:
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
        refs = [actor.call.remote(method, common, own) for actor, own in zip(self._actors, owns, strict=True)]
        return RayCall(self, refs, method)

    def _answers(self, refs: list[Any], method: str) -> list[Any]:
        answers = self._resolve(refs, method, range(self.world_size))
        self._raise_any([result for done, result in answers if not done])
        return [result for _, result in answers]

    def _resolve(self, refs: list[Any], method: str, ranks: Sequence[int]) -> list[Any]:
        """What `refs`, one of each of `ranks`, come to. Raises, and ends all, where ranks are lost or do not answer."""
        import ray
        from ray import exceptions

        begun = max(time.monotonic(), self._last_answer)
        failures: dict[int, Failure] = {}
        answers: dict[int, Any] = {}
        failed_at: float | None = None
        while len(answers) + len(failures) < len(refs):
            waiting = [i for i in range(len(refs)) if i not in answers and i not in failures]
            ready, _ = ray.wait([refs[i] for i in waiting], num_returns=len(waiting), timeout=POLL)
            for i in waiting:
                if refs[i] in ready:
                    try:
                        answers[i] = ray.get(refs[i])
                    except exceptions.RayTaskError as error:
                        failures[i] = self._unexpected(ranks[i], method, error)
                    except exceptions.RayError as error:
                        failures[i] = self._loss(ranks[i], method, error)
                elif ranks[i] in self._lost:
                    failures[i] = self._loss(ranks[i], method, None)
            if self._head_gone:
                self.kill()
                raise ClusterError(f"the head of the Ray cluster at {self._head} is gone; the run ended in {method}")
            bad = failures or any(_failed(answer) for answer in answers.values())
            if bad and failed_at is None:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GATHER:
                break
            if failed_at is None and time.monotonic() - begun > self._config.timeout and len(answers) < len(refs):
                self._give_up(method, [ranks[i] for i in range(len(refs)) if i not in answers])
        told = [answer[1] for answer in answers.values() if _failed(answer)]
        self._raise_any([*failures.values(), *told])
        self._last_answer = time.monotonic()
        return [answers[i] for i in range(len(refs))]

    @property
    def _lost(self) -> dict[int, float]:
        return self._lines.lost if self._settings else {}

    def _loss(self, rank: int, method: str, error: Exception | None) -> Failure:
        from ray import exceptions

        text = "its process died without a word: killed, out of memory, or its host is gone"
        if isinstance(error, exceptions.NodeDiedError):
            text = "its host is gone"
        at = self._lost.get(rank, time.time())
        host = self._settings[rank].place.host if self._settings else "a host"
        return Failure(rank, host, self._pids.get(rank, 0), method, text, "", at, is_lost=True)

    def _unexpected(self, rank: int, method: str, error: Exception) -> Failure:
        cause = getattr(error, "cause", None) or error
        host = self._settings[rank].place.host if self._settings else "a host"
        text = f"{type(cause).__name__}: {cause}"
        return Failure(rank, host, self._pids.get(rank, 0), method, text, str(error), time.time())

    def _raise_any(self, failures: Sequence[Failure]) -> None:
        if failures:
            self.kill()
            failure = first(failures)
            raise_failure(failure, self._settings[failure.rank].log_of(failure.rank) if self._settings else None)

    def _give_up(self, method: str, ranks: Sequence[int]) -> None:
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
        import ray

        if self._head_gone:
            # Ray would wait for its head, and hold the interpreter meanwhile; its processes here end with this one.
            atexit.unregister(ray.shutdown)
            atexit.register(_end_without_ray)
            return

        def end() -> None:
            for actor in self._actors:
                with contextlib.suppress(Exception):  # whatever Ray says of an actor that is gone
                    ray.kill(actor)
            self._open.close()

        _within(20, end)


@dataclass(frozen=True, slots=True)
class RayCall:
    """A call that runs on RayRanks."""

    ranks: RayRanks
    refs: list[Any]
    method: str

    def result(self) -> list[Any]:
        return self.ranks._answers(self.refs, self.method)


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


def _end_without_ray() -> None:
    """End this process, which failed, before Ray's threads, which nobody stopped, crash the interpreter's end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(1)


def _failed(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and answer[0] is False and isinstance(answer[1], Failure)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do it, or go on without: an end that hangs must not keep the driver from its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
