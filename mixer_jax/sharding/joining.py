"""How a process becomes one of several, and how they end together."""

__all__ = ["Processes"]

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert import CheckpointError
from convert.cli import run_guarded

from .processes import AllFailed, exchanged, is_first

PATIENCE = 60  # seconds to find each other
HEARTBEAT = 20  # seconds after which a silent process is dead
INTERVAL = 1  # seconds from one question whether it lives to the next
ADVICE = "what was saved is still there, and the same commands go on"
LOST = re.compile("Gloo|NCCL|onnection (closed|reset|refused)|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
# What a process says that the runtime ended at once, by a child that outlives it.
LAST_WORD = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr)"


@dataclass(frozen=True)
class Processes:
    """How this process joins others: the coordinator is process 0's "host:port", there are `count`, and this is `index`.

    Without them they are what the variables of SLURM, Open MPI or a TPU pod say.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def run(self, command: Callable[[], int | None]) -> int:
        """As `run_guarded`, as one of the processes. Standard output is that of the first alone.

        A process that loses another one says which, and ends, whatever it is waiting for: it cannot go on alone.
        """
        say_last = subprocess.Popen([sys.executable, "-ISc", LAST_WORD, self._ended], stdin=-1, start_new_session=True)
        watch, in_order = _Watch(say_last), False

        def joined() -> int | None:
            nonlocal in_order
            try:
                self._join()
                watch.start()
                code = command()
            except AllFailed:
                in_order = True
                raise
            except Exception as error:
                if watch.is_alive() and LOST.search(str(error)):
                    watch.join(3 * HEARTBEAT)  # it knows which one, says so, and ends this process
                    raise CheckpointError(f"another process ended, so this one does: {ADVICE} ({error})") from None
                raise
            in_order = True
            return code

        code = 1
        try:
            code = run_guarded(joined)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            if in_order:
                watch.leave()
            say_last.communicate(b"this process has said all")
            if not in_order:
                os._exit(code or 1)  # at once: what waits for the other processes would wait for ever
        return code

    @property
    def _ended(self) -> str:
        which = "this process" if self.index is None else f"process {self.index} of {self.count}"
        return f"error: {which} was killed, or ended by JAX since another one was lost or did not come; its message is above"

    def _join(self) -> None:
        if self.coordinator is not None and self.index:
            _require_coordinator(self.coordinator)
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # what JAX sets
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # without the runtime's warnings
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # gloo takes what it is sent in the order of arrival
        jax.config.update("jax_enable_recoverability", True)  # so that the loss of one can be said, before all end
        options: dict[str, Any] = {"initialization_timeout": PATIENCE, "heartbeat_timeout_seconds": HEARTBEAT}
        try:
            jax.distributed.initialize(self.coordinator, self.count, self.index, **options)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"the processes do not find each other: {str(error).splitlines()[0]}") from None
        _standard_output_of_first()
        exchanged(None)  # the connections are made here


def _require_coordinator(address: str) -> None:
    """Raise CheckpointError unless the first process is there within a minute."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, ValueError, OverflowError) as error:
            if time.monotonic() > end or not isinstance(error, ConnectionError | TimeoutError):
                fault = f"no coordinator at {address}: {error}"
                raise CheckpointError(f"{fault}: start process 0 there, within {PATIENCE} s of the others") from None
        time.sleep(0.5)


def _standard_output_of_first() -> None:
    """What the other processes print goes nowhere, and what libraries print beside Python."""
    own = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    target = own if is_first() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = io.TextIOWrapper(os.fdopen(target, "wb"), errors="backslashreplace", line_buffering=True)


class _Watch(threading.Thread):
    """Asks all processes again and again whether they live, in each of them."""

    def __init__(self, say_last: "subprocess.Popen[bytes]"):
        super().__init__(daemon=True)
        self._say_last, self._leaving, self._alone = say_last, False, threading.Event()

    def run(self) -> None:
        import jax
        from jax.experimental.multihost_utils import live_devices

        everyone, living = {device.process_index for device in jax.devices()}, jax.devices()
        while not (gone := sorted(everyone - {device.process_index for device in living})):
            with contextlib.suppress(Exception), live_devices(jax.devices()) as living:
                time.sleep(INTERVAL)
        self._alone.set()
        if not self._leaving:
            plural = "es" if len(gone) > 1 else ""
            print(f"error: process{plural} {', '.join(map(str, gone))} ended, so this one does: {ADVICE}", file=sys.stderr)
            self._say_last.communicate(b"this process has said all")
            os._exit(1)

    def leave(self) -> None:
        """End in good order, after all have come here. The first process ends last: without it the others cannot."""
        import jax
        from jax.experimental.multihost_utils import sync_global_devices

        self._leaving = True
        with contextlib.suppress(Exception):
            sync_global_devices("end")
            if is_first():
                self._alone.wait(3 * HEARTBEAT)
            jax.distributed.shutdown()
