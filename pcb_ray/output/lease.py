"""The lease on an output in an object store: one run at a time, by an object that only one can have made.

The object names its run. Its holder renews it every 15 s, by a write that succeeds only if nobody else has written. Whoever finds
it held looks whether it is renewed: no clock of another machine is believed. If it is not within 60 s, its holder is dead, or cut
off from the store, and the lease is taken over in the same way. A writer that was cut off finds the other's name in it before it
finishes an object.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import secrets
import threading
import time
from typing import Literal

from pcb_ray.errors import RequestError
from pcb_ray.files.objects import Exists, Fence, Objects, Storage, Version, lost_place
from pcb_ray.output.lock import Holder

log = logging.getLogger("pcb_ray")

RENEWED_S = 15.0
DEAD_S = 60.0
LOOK_S = 3.0
END_S = 1.0  # who is asked to stop has little time


class Lease:
    """Holds the object at `uri` until `release`. Raises RequestError if another run holds it, OSError; `out` is for messages."""

    def __init__(self, uri: str, out: str, storage: Storage | None = None) -> None:
        objects = Objects(storage)
        self._at_the_end = Objects(storage, patience_s=END_S)
        self.fence = Fence(uri, secrets.token_hex(8))
        self._out, self._objects = out, objects
        self._me, self._renewals = Holder.this_process(), 0
        self._ended, self._lost, self._conditional = threading.Event(), False, True
        self._version = self._taken()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _taken(self) -> Version:
        try:
            version = self._put("new")
        except Exists:
            return self._taken_over()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return self._without_conditions()
        try:
            self._put("new", mine=False)
        except Exists:
            return version
        return self._without_conditions()

    def _without_conditions(self) -> Version:
        log.warning(
            "note: %s: this store has no conditional writes, so that nothing keeps two runs to one OUT apart: start one at a time",
            self._out,
        )
        self._conditional = False
        return self._put("")

    def _taken_over(self) -> Version:
        try:
            text, version = self._objects.look(self.fence.uri)
        except FileNotFoundError:  # it was released just now
            raise self._refusal(None) from None
        holder, begin = _holder_in(text), time.monotonic()
        if holder is None or not holder.is_dead():
            log.warning(
                "%s: is held by %s; if nothing is heard of it for %.0f s it is taken over", self._out, holder or "a run", DEAD_S
            )
            while time.monotonic() - begin < DEAD_S:
                time.sleep(LOOK_S)
                try:
                    now = self._objects.look(self.fence.uri)[1]
                except FileNotFoundError:
                    return self._taken()
                if now != version:
                    raise self._refusal(holder)
        try:
            return self._put(version)
        except Exists:
            raise self._refusal(None) from None

    def _put(self, only: Literal["", "new"] | Version, *, mine: bool = True) -> Version:
        """Write it under this condition. What was written by a request whose answer was lost is `mine`, too."""
        try:
            return self._objects.put(self.fence.uri, self._content(), only=only if self._conditional else "")
        except Exists:
            if mine:
                with contextlib.suppress(FileNotFoundError):
                    text, version = self._objects.look(self.fence.uri)
                    if text == self._content():
                        return version
            raise

    def _content(self) -> bytes:
        return json.dumps({"run": self.fence.run, "renewals": self._renewals, "holder": self._me.to_json()}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_S):
            self._renewals += 1
            try:
                self._version = self._put(self._version)
            except (Exists, FileNotFoundError):
                self._lost = True
                return
            except OSError as error:  # writers ask the store itself whether the lease is still ours
                log.warning("%s: the lease could not be renewed: %s", self._out, error.strerror)

    def check(self) -> None:
        """Raises RunError if another run has taken it over."""
        if self._lost:
            raise lost_place(self._out)

    def release(self) -> None:
        """Let others have it."""
        self._ended.set()  # a renewal that is on its way finds no object to renew
        if not self._lost:
            with contextlib.suppress(OSError):
                if self._at_the_end.holds(self.fence):
                    self._at_the_end.delete(self.fence.uri)

    def _refusal(self, holder: Holder | None) -> RequestError:
        by = f"by {holder}" if holder else "by another run"
        return RequestError(
            f"{self._out}: another merge is writing it now: wanted it for this one, found it held {by} ({self.fence.uri}). "
            "Fix: wait for it, or choose another prefix."
        )


def _holder_in(text: bytes) -> Holder | None:
    try:
        return Holder.of(json.loads(text)["holder"])
    except (ValueError, KeyError, TypeError):
        return None
