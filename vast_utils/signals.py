"""Ctrl-C, SIGTERM and a closed terminal, as an exception that leaves time to save, fetch and destroy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sparse_coding.errors import Interrupted
from vast_utils.clock import Clock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Asked to stop (Ctrl-C, SIGTERM): save, fetch, destroy."""


@dataclass
class Ear:
    """deaf: from now on a signal is answered with words alone."""

    deaf: bool = False


@contextmanager
def stopping(say: Callable[[str], None] = print) -> Iterator[Ear]:
    """Raise `Stopped` in the main thread at each signal, until the ear is made deaf. `nohup` is respected.

    One that nobody minds leaves the block as `Interrupted`.
    """
    ear = Ear()

    def heard(number: int, frame: Any) -> None:
        if not ear.deaf:
            raise Stopped
        with suppress(RuntimeError):  # it came in the middle of a line: what destroys is not to fail for that
            say("the machines are being destroyed: please wait, or they may go on costing money")

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield ear
        return
    left = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    before = {number: signal.signal(number, heard) for number in SIGNALS if number not in left}
    try:
        yield ear
    except Stopped:
        raise Interrupted("nothing was rented; the same command begins anew, or goes on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class HaltingClock:
    """A clock in whose waits the threads of a dispatcher are stopped; the main thread waits in peace."""

    def __init__(self, clock: Clock, halt: threading.Event):
        self._clock, self._halt = clock, halt

    def now(self) -> float:
        return self._clock.now()

    def sleep(self, seconds: float) -> None:
        until = self._clock.now() + seconds
        while True:
            if self._halt.is_set() and threading.current_thread() is not threading.main_thread():
                raise Stopped
            if (left := until - self._clock.now()) <= 0:
                return
            self._clock.sleep(min(left, 2.0))
