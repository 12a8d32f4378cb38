"""A connection between the driver and every rank: each sees at once that the other is gone, whatever else it waits for.

Over it ranks are told to end and to say where they are, and rank 0's log reaches the console. `multiprocessing`'s
challenge keeps strangers out; nothing is unpickled before it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

LOG = logging.getLogger(__name__)

Address = tuple[str, int]
OnMessage = Callable[[int, tuple[Any, ...]], None]


class Lifeline:
    """A rank's end. The process ends when the driver is gone, or says so."""

    def __init__(
        self, address: Address, key: bytes, hello: tuple[Any, ...], on_message: Callable[[tuple[Any, ...]], None]
    ) -> None:
        self._connection = Client(address, authkey=key)
        keep_alive(self._connection)
        self._lock = threading.Lock()
        self._on_message = on_message
        self.tell(*hello)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def tell(self, *message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def _watch(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if message[0] == "end":
                    os._exit(message[1])
                self._on_message(message)
        except (EOFError, OSError):
            LOG.error("the driver is gone: ending")
            os._exit(1)


class Lifelines:
    """The driver's ends. Each rank's first message is ("hello", rank, ...); `on_message` gets it and all others."""

    def __init__(self, host: str, key: bytes, on_message: OnMessage) -> None:
        self._listener = Listener((host, 0), backlog=1024)
        self.address: Address = self._listener.address  # pyright: ignore[reportAttributeAccessIssue]
        self.lost: dict[int, float] = {}
        """When each rank that is gone was missed."""
        self.key = key
        self._on_message = on_message
        self._lines: dict[int, Connection] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._replies: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._accept, name="lifelines", daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError:
                continue
            threading.Thread(target=self._read, args=(connection,), name="lifeline", daemon=True).start()

    def _read(self, connection: Connection) -> None:
        rank = None
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            keep_alive(connection)
            while True:
                message = connection.recv()
                if message[0] == "hello":
                    rank = int(message[1])
                self._on_message(message[1], message)
                with self._changed:
                    if message[0] == "hello":
                        self._lines[message[1]], self._locks[message[1]] = connection, threading.Lock()
                    elif message[0] == "stacks":
                        self._replies[message[1]] = message[2]
                    self._changed.notify_all()
        except (EOFError, OSError, AuthenticationError):
            with self._changed:
                if rank is not None and not self._closed:
                    self.lost[rank] = time.time()
                self._changed.notify_all()

    def wait_for(self, world_size: int, seconds: float) -> bool:
        """Wait until so many ranks are here."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._lines) >= world_size or bool(self.lost), seconds)

    def send(self, rank: int, *message: Any) -> None:
        """Send to a rank; to one that is gone nothing is sent, which `lost` says."""
        with self._locks[rank], contextlib.suppress(OSError):
            self._lines[rank].send(message)

    def stacks(self, seconds: float) -> dict[int, str]:
        """Have every rank write its stacks into its log; where each is, of those that answer in time."""
        self._replies.clear()
        for rank in list(self._lines):
            self.send(rank, "stacks")
        with self._changed:
            self._changed.wait_for(lambda: len(self._replies) + len(self.lost) >= len(self._lines), seconds)
            return dict(self._replies)

    def end(self, status: int) -> None:
        """Tell every rank to end at once, and listen no longer."""
        self._closed = True
        for rank in list(self._lines):
            self.send(rank, "end", status)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # a connection of our own takes the thread out of accept
            socket.create_connection(self.address, timeout=1).close()
        self._listener.close()


def keep_alive(connection: Connection) -> None:
    """Notice within half a minute a host that went away without a word."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 4)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)  # of what is not acknowledged
