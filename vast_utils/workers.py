"""Several machines at once: a thread for each, ended together."""

from __future__ import annotations

import threading
import time

from sparse_coding.errors import UserError
from vast_utils.destroy import Unconfirmed
from vast_utils.dispatch import Dispatcher
from vast_utils.rental import Rental
from vast_utils.results import NotFetched
from vast_utils.signals import Stopped


def run(dispatcher: Dispatcher, machines: int, halt: threading.Event, patience: float = 900.0) -> None:
    """Work off a dispatcher's queue on so many machines at once, those of an earlier dispatcher first.

    One machine is looked after by the calling thread, several by threads of their own, which `halt` ends: their clock
    is a `HaltingClock` of it. Raises what `Dispatcher.work` does, the worst of it.
    """
    rentals: list[Rental | None] = [*dispatcher.take_over()]
    rentals += [None] * (min(machines, len(dispatcher.queue.open)) - len(rentals))
    if len(rentals) <= 1:
        for rental in rentals:
            dispatcher.work(rental)
        return
    errors: list[BaseException] = []
    threads = [threading.Thread(target=_guarded, args=(dispatcher, one, errors, halt), daemon=True) for one in rentals]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except Stopped:
        halt.set()
        end = time.monotonic() + patience
        while dispatcher.carrying and time.monotonic() < end:  # who has no job has nothing to save
            time.sleep(0.1)
        raise
    for kind in (Unconfirmed, NotFetched, UserError, BaseException):
        if worst := next((error for error in errors if isinstance(error, kind)), None):
            raise worst


def _guarded(dispatcher: Dispatcher, rental: Rental | None, errors: list[BaseException], halt: threading.Event) -> None:
    """A worker in a thread; a mistake that only the user can mend ends the others too."""
    try:
        dispatcher.work(rental)
    except Stopped:
        pass
    except BaseException as error:
        errors.append(error)
        dispatcher.say(f"{type(error).__name__}: {error}")
        if not isinstance(error, NotFetched | Unconfirmed):
            halt.set()
