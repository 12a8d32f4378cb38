"""One rank's process: its log, its place in the process group, and the object that calls go to.

How calls get here is the backends' affair; what is called is a class of somebody else, given by its dotted path.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import socket
import struct
import sys
import sysconfig
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from burnish.cluster import numa
from burnish.cluster.lifeline import Address, Lifeline
from burnish.cluster.phases import phase
from burnish.cluster.ranks import Answer, Failure, Place

LOG = logging.getLogger(__name__)

LOGGERS = ("burnish", "py.warnings")
SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface."""
PATIENCE = 60.0
"""Seconds by which collectives outlast the driver: who waits for a rank that hangs must not be the first to fail."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the driver tells a rank of its place and surroundings."""

    place: Place
    logs: str | None
    """Folder of rank-N.log; None leaves standard output and logging as they are."""
    log_level: str
    timeout: float
    env: dict[str, str]
    folder: str
    """The driver's working directory, which relative paths of a recipe mean."""
    import_path: tuple[str, ...]

    def log_of(self, rank: int) -> str | None:
        return None if self.logs is None else str(Path(self.logs) / f"rank-{rank}.log")


class Seat:
    """Holds a rank's object and carries out what the driver asks, one thing at a time. `store` is where the ranks meet,
    if that is there already."""

    def __init__(self, store: Any = None) -> None:
        self._object: Any = None
        self._store: Any = store
        self._line: Lifeline | None = None
        self._log: Any = None
        self._calling: str | None = None
        self._thread = threading.get_ident()

    def carry_out(self, step: str, *args: Any) -> Answer:
        """What came of `step`, a method of this class: `sit`, `meet`, `start`, `call`, `leave`."""
        name = args[0] if step == "call" else step
        self._calling, self._thread = name, threading.get_ident()
        if self._log is not None:
            # For a rank that holds the interpreter's lock and so cannot answer the driver.
            faulthandler.dump_traceback_later(self.setting.timeout + 2, file=self._log)
        try:
            return True, getattr(self, step)(*args)
        except BaseException as error:  # sys.exit too: whoever serves the calls goes on, and the driver is told
            LOG.debug("failed in %s", name, exc_info=True)
            if self._log is not None:
                traceback.print_exception(error, file=self._log)
            return False, Failure.of(error, self.place, name)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._calling = None

    def sit(self, setting: Setting) -> None:
        """Take the place: environment, working directory, log."""
        self.setting, self.place = setting, setting.place
        os.environ |= {
            **setting.env,
            "RANK": str(self.place.rank),
            "WORLD_SIZE": str(self.place.world_size),
            "LOCAL_RANK": str(self.place.local_rank),
        }
        if os.path.isdir(setting.folder):
            os.chdir(setting.folder)
        sys.path += [entry for entry in setting.import_path if entry not in sys.path]
        log = setting.log_of(self.place.rank)
        if log is not None:
            self._write_into(log)

    def _write_into(self, log: str) -> None:
        """Everything that this process writes, that of libraries in C too, goes to the end of the file `log`."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the process's life
        sys.stderr = self._log = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        faulthandler.enable(self._log)
        handler = logging.StreamHandler(self._log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        logging.captureWarnings(True)
        for name in LOGGERS:
            logging.getLogger(name).setLevel(self.setting.log_level.upper())
            logging.getLogger(name).addHandler(handler)

    def hold_line(self, line: Lifeline) -> None:
        """Take the connection to the driver; the console shows what rank 0 logs."""
        self._line = line
        if self.place.rank == 0:
            for name in LOGGERS:
                logging.getLogger(name).addHandler(_ToDriver(line))

    def open_store(self, host: str) -> Address:
        """On rank 0: the store by which all ranks meet, at a port that is held from when it is found."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        listener = socket.create_server((host, 0), backlog=1024)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            port,
            self.place.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.setting.timeout),
            master_listen_fd=listener.detach(),
        )
        return host, port

    def meet(self, address: Address | None = None) -> None:
        """Form torch's process group with the others; where no store is there yet, at rank 0's, which has `address`."""
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.distributed_c10d import PrefixStore

        if self._store is None:
            assert address is not None
            timeout = timedelta(seconds=self.setting.timeout)
            self._store = TCPStore(*address, self.place.world_size, is_master=False, timeout=timeout)
        cuda = self.place.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(self.place.device)
            cores = numa.bind_to_device(self.place.device)
            if cores is not None:
                LOG.info("bound to the cores of its device's NUMA node: %s", cores)
        interface = interface_of(self.place.host)
        if interface is not None:
            # By itself gloo goes by the host's name, which on many hosts leads to loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("burnish", self._store),
            rank=self.place.rank,
            world_size=self.place.world_size,
            timeout=timedelta(seconds=self.setting.timeout + PATIENCE),
        )
        phase("joined the process group")

    def leave(self) -> None:
        """Give back the object and the process group, for what this process does next."""
        import torch.distributed as dist

        self._object = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def start(self, target: str, args: tuple[Any, ...]) -> None:
        """Make the object `target(place, *args)`, module:Class."""
        self._object = resolve_name(target)(self.place, *args)

    def call(self, method: str, args: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
        """What the object's method returns."""
        return getattr(self._object, method)(*args, *own)

    def stacks(self) -> str:
        """Write the stacks of all threads into the log, where there is one; where the object's thread is."""
        if self._log is not None:
            faulthandler.dump_traceback(file=self._log, all_threads=True)
        return self.whereabouts()

    def whereabouts(self) -> str:
        """The innermost line of the thread that carries out calls, and the innermost of it outside libraries."""
        frame = sys._current_frames().get(self._thread)
        if frame is None:
            return "between calls"
        calls = traceback.extract_stack(frame)
        libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
        own = [call for call in calls if not call.filename.startswith((*libraries, "<", os.path.dirname(__file__)))]
        shown = [calls[-1], *(own[-1:] if own and own[-1] != calls[-1] else [])]
        where = ", in ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in shown)
        return where if self._calling is not None else f"between calls, in {where}"  # such as a handler of signals


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None where there is none, or the address is of another kind."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


class _ToDriver(logging.Handler):
    def __init__(self, line: Lifeline) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the line's own thread is about to end this process
            self._line.tell("log", 0, record.name, record.levelno, record.getMessage())


def show(message: tuple[Any, ...]) -> None:
    """On the driver: log what rank 0 logged."""
    _, _, name, level, text = message
    logger = logging.getLogger(name)
    if logger.isEnabledFor(level):
        logger.handle(logger.makeRecord(name, level, "", 0, text, (), None))
