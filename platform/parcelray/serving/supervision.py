"""What `parcelray serve` watches while it runs: signals, the processes of its Ray, and the port.

Signals and Ray are watched in threads of their own, because the main thread may be inside a call into a dead Ray, which
never returns.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NoReturn

from rich.console import Console

from parcelray.cluster.local_ray import dead_process, kill_local_ray
from parcelray.config.serve import HttpConfig
from parcelray.errors import UserError

_PERIOD_S = 1.0
"""Time between two checks of Ray's processes, seconds."""
_STOP = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The signals that the process has received.

    Args:
        console: where stopping is announced.
        end: ends the process at once with an exit code.
    """

    def __init__(self, console: Console, end: Callable[[int], None]) -> None:
        self.stop = threading.Event()
        self.reload = threading.Event()
        self.number: int | None = None
        """The first signal to stop; None: there was none."""
        self._console = console
        self._end = end
        self._answers = False

    @property
    def exit_code(self) -> int:
        """Exit code of a process that a signal ended, as of a shell."""
        return 128 + (self.number or 0)

    def answers(self) -> None:
        """Called when the endpoint answers: from now on, a signal does not interrupt the main thread.

        Before, SIGINT and SIGTERM raise `KeyboardInterrupt` and `SystemExit` there. Ray installs its own handler when
        it starts, so this comes after that.
        """
        self._answers = True
        for number in _STOP:
            signal.signal(number, _ignored)

    def received(self, number: int) -> None:
        """Acts on one signal: the first to stop is announced, the second ends the process at once."""
        if number == signal.SIGHUP:
            self.reload.set()
        elif number not in _STOP:
            return
        elif self.number is None:
            self.number = number
            self._console.print(
                "Stopping: finishing requests in flight; another signal ends them"
                if self._answers
                else "Stopping before the endpoint answers"
            )
            self.stop.set()
        else:
            self._console.print("Ended at once; requests in flight are lost")
            self._end(128 + number)


@contextmanager
def signals(console: Console) -> Iterator[Signals]:
    """Receives the signals of this process for the duration of the context; only in the main thread."""
    received = Signals(console, end_now)
    with ExitStack() as cleanup:
        receiver, sender = (cleanup.enter_context(end) for end in socket.socketpair())
        sender.setblocking(False)
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, _exit),
            (signal.SIGHUP, _ignored),
        ):
            cleanup.callback(signal.signal, number, signal.signal(number, handler))
        # The system calls write the number of each signal here, even if the main thread runs no Python code.
        cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
        reader = threading.Thread(target=_read, args=(receiver, received), name="parcelray-signals", daemon=True)
        reader.start()
        yield received


def _read(receiver: socket.socket, received: Signals) -> None:
    # The end of the context closes the sockets.
    with suppress(OSError):
        while numbers := receiver.recv(64):
            for number in numbers:
                received.received(number)


def _exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _ignored(number: int, frame: object) -> None:
    """Does nothing: the signal is handled by the thread that reads its number."""


@contextmanager
def ray_watched(console: Console) -> Iterator[None]:
    """Ends this process with exit code 1 when a process of Ray died without which the endpoint cannot answer.

    A supervisor then starts the endpoint again. Ray itself would leave a process that answers nothing.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PERIOD_S):
            if (name := dead_process()) is not None and not ended.is_set():
                console.print(
                    f"failed: Ray's process {name} died, so the endpoint cannot answer; start it again.",
                    style="red",
                    soft_wrap=True,
                )
                end_now(1)

    watcher = threading.Thread(target=watch, name="parcelray-ray-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def end_now(code: int) -> None:
    """Ends this process and its local Ray at once. Requests in flight are lost."""
    kill_local_ray()
    os._exit(code)


@contextmanager
def held_port(http: HttpConfig) -> Iterator[None]:
    """Holds the port of an endpoint whose proxy will be started on this machine, against other endpoints.

    Serve's proxy shares its port with every process of the user that asks for it, and each gets a part of the requests.
    This socket excludes all others except such a proxy, and receives no connections itself.

    Raises:
        UserError: the port is in use, or held by an endpoint that is starting.
    """
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as holder:
        try:
            # Without this, connections of an endpoint that has just ended would block the port.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((http.host, http.port))
            # Binding alone does not exclude another socket that is only bound.
            holder.listen()
        except OSError as error:
            raise UserError(
                f"Cannot listen on port {http.port} of {http.host} ({error.strerror}); choose another port with --port."
            ) from None
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # It stays bound, but no longer listens.
        with suppress(OSError):
            holder.shutdown(socket.SHUT_RD)
        yield
