"""The lease on a training's folder: one driver trains a run at a time.

The holder is the driver whose object has the highest number in RUN/lease/. A driver takes a number by put_if_absent, so
only one of several drivers gets it, and no driver writes the object of another one. The holder rewrites its object
every RENEW_SECONDS. It stops if there is a higher number, or if its own object was removed.

Clocks of machines and modification times of objects are not used, because not every storage has the latter. Instead,
another driver watches the holder's object. If the object changes, the holder is alive. If it does not change for
EXPIRE_SECONDS, the lease has expired. If the holder ran on the same machine and its process has ended, the lease has
expired at once, so a killed driver can be restarted without waiting.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from orchestrator import storage

RENEW_SECONDS = 30.0
EXPIRE_SECONDS = 120.0
WATCH_SECONDS = 5.0  # between two reads of a holder's object

log = logging.getLogger(__name__)


class Lease:
    """A context that holds the lease on a run's folder.

    Raises:
        RuntimeError: another driver holds it, and `takeover` is not set.
    """

    def __init__(self, run: str, takeover: bool = False) -> None:
        self._run, self._folder, self._takeover = run, storage.join(run, "lease"), takeover
        self._released, self._lost = threading.Event(), threading.Event()
        self._created = time.monotonic()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def __enter__(self) -> Self:
        while True:
            newest = max(self._names(), default="")
            if not self._takeover and (holder := self._living_holder(newest, logging.WARNING)):
                raise RuntimeError(
                    f"{self._run} is being trained by pid {holder['pid']} on {holder['host']}, which has held the "
                    f"lease for at least {holder['held_seconds']:,.0f} s; wait for it, stop it, or pass --takeover"
                )
            self._name = f"{int(newest.removesuffix('.json') or 0) + 1:06d}.json"
            if storage.put_if_absent(self._uri(self._name), self._content()):
                break
        for name in self._names():
            if name < self._name:  # of an earlier holder
                self._remove(name)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        self._remove(self._name)

    def is_lost(self) -> bool:
        """Return whether another driver has taken over the lease."""
        return self._lost.is_set()

    def is_held(self) -> bool:
        """Return whether a driver holds the lease; wait up to EXPIRE_SECONDS if the driver is on another machine."""
        return self._living_holder(max(self._names(), default=""), logging.DEBUG) is not None

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                if self._names()[-1:] != [self._name]:
                    log.warning("another driver took over %s; this one stops after its next step", self._run)
                    self._lost.set()
                    return
                storage.write_bytes(self._uri(self._name), self._content())
            except Exception as error:  # noqa: BLE001 - one failed renewal must not cost the later ones
                log.warning("the lease on %s could not be renewed; the training continues: %s", self._run, error)

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self._folder) if re.fullmatch(r"\d{6}\.json", name)]

    def _uri(self, name: str) -> str:
        return storage.join(self._folder, name)

    def _remove(self, name: str) -> None:
        """Remove a driver's object; if it cannot be deleted, mark it as released."""
        try:
            storage.delete(self._uri(name))
        except OSError as error:
            log.warning("the released lease on %s could not be removed; the job continues: %s", self._run, error)
            with contextlib.suppress(OSError):
                storage.write_bytes(self._uri(name), storage.json_bytes(None))

    def _content(self) -> bytes:
        pid = os.getpid()
        holder = {"host": socket.gethostname(), "pid": pid, "machine": _machine_id(), "process": _process_start(pid)}
        return storage.json_bytes(holder | {"held_seconds": round(time.monotonic() - self._created, 3)})

    def _living_holder(self, name: str, log_level: int) -> dict[str, Any] | None:
        """Return the content of a holder's object, or None if the holder has ended; may wait for its lease to expire.

        name: of the object; "" = there is none.
        """
        if not name:
            return None
        try:
            content = storage.read_bytes(self._uri(name))
            holder = json.loads(content)
            if not holder:
                return None  # released
            if holder["machine"] and holder["machine"] == _machine_id():
                return holder if holder["process"] == _process_start(holder["pid"]) else None
            log.log(
                log_level, "pid %s on %s holds the lease on %s; waiting up to %g s to see whether it is alive",
                holder["pid"], holder["host"], self._run, EXPIRE_SECONDS,
            )  # fmt: skip
            deadline = time.monotonic() + EXPIRE_SECONDS
            while time.monotonic() < deadline:
                time.sleep(WATCH_SECONDS)
                new_content = storage.read_bytes(self._uri(name))
                if new_content != content:
                    return json.loads(new_content)  # None if it was released meanwhile
        except FileNotFoundError:
            pass  # released
        return None


def _machine_id() -> str:
    """Return an id that processes share if they see each other's pids; "" if it cannot be determined."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers may share a host name but not pids
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Return the start time of a process of this machine in clock ticks; "" if it has ended.

    The start time distinguishes the process from a later one with the same pid.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # zombie or dead
