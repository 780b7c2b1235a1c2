"""How a process becomes one of several, and how they end together."""

__all__ = ["Processes"]

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
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

        A process that loses another one says which, and ends; it cannot go on alone.
        """
        say_last = subprocess.Popen([sys.executable, "-ISc", LAST_WORD, self._ended], stdin=-1, start_new_session=True)
        in_order = False

        def joined() -> int | None:
            nonlocal in_order
            try:
                self._join()
                code = command()
            except AllFailed:
                in_order = True
                raise
            except Exception as error:
                if LOST.search(str(error)):
                    raise CheckpointError(_lost(error)) from error
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
                _leave()
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


def _lost(error: Exception) -> str:
    """Which process is lost, found by the heartbeats that are missing."""
    import jax
    from jax.experimental.multihost_utils import live_devices

    gone: list[int] = []
    with contextlib.suppress(Exception), live_devices(jax.devices()) as living:
        gone = sorted({device.process_index for device in set(jax.devices()) - set(living)})
    names = ", ".join(map(str, gone)) or "not known which"
    plural = "es" if len(gone) > 1 else ""
    reason = str(error).splitlines()[0]
    advice = "what was saved is still there, and the same commands go on"
    return f"process{plural} {names} ended, so this one does: {advice} ({reason})"


def _leave() -> None:
    """The first process ends last: without it the others cannot."""
    import jax
    from jax.experimental.multihost_utils import live_devices, sync_global_devices

    with contextlib.suppress(Exception):
        sync_global_devices("end")
        if is_first():
            with live_devices(jax.devices()):
                pass
        jax.distributed.shutdown()
