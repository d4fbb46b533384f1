"""What a dispatcher needs done on machines, so that it can be told what to do without there being any."""

from __future__ import annotations

from typing import Protocol

from vast_utils.account import Container
from vast_utils.job import Job
from vast_utils.rental import Rental
from vast_utils.rows import Instance
from vast_utils.tasks import Task


class Crew(Protocol):
    """What a dispatcher does on machines: `hands.Hands`, or a pretence of it in tests."""

    @property
    def public_key(self) -> str: ...

    def furnish(self, rental: Rental) -> Container: ...

    def check(self, rental: Rental, instance: Instance) -> None: ...

    def unguarded(self, rental: Rental) -> str: ...

    def meet(self, rental: Rental, instance: Instance) -> None: ...

    def job(self, rental: Rental, task: Task) -> Job: ...

    def start(self, rental: Rental, task: Task, again: bool) -> None: ...

    def log(self, rental: Rental, task: Task, offset: int) -> bytes: ...

    def fetch(self, rental: Rental, task: Task, last: bool) -> tuple[str, ...]: ...

    def stop(self, rental: Rental, task: Task) -> Job: ...

    def release(self, rental: Rental) -> None: ...

    def forget(self, rental: Rental) -> None: ...
