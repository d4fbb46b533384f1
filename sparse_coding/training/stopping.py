"""Ctrl-C and SIGTERM as a wish to stop, met where the state of training is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequested(Exception):
    """Raised at once where work can be abandoned: reading activations, which may take minutes, changes no state."""


class Stopping:
    """`reason` is the name of the signal that asked for a stop; None while nothing did."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._abandon = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM becomes a wish; a second one acts as it always does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: object) -> None:
            self.reason = signal.Signals(number).name
            signal.signal(number, before[signal.Signals(number)])
            if self._abandon:
                raise StopRequested

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """What runs inside is given up when a stop is asked for; a wish from before counts too."""
        self._abandon = True
        try:
            if self.reason:
                raise StopRequested
            yield
        finally:
            self._abandon = False
