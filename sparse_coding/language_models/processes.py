"""The processes of one training run: one alone, or those that `torchrun` started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_coding.errors import UserError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """Who of how many this process is. Methods that say "all" must be called by all, in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU  # of the messages between them

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message; all are float32 on one device."""
        if self.size > 1:
            message = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(message)
            for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, mine: bool) -> bool:
        """Whether it is true in any of all processes."""
        if self.size == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Inside, the first process alone, then all others at once: they find the files that it made.

        Where it fails the others end quietly: it has said why.
        """
        if not self.first:
            if self.any(False):
                raise SystemExit(2)
            yield
            return
        failed = True
        try:
            yield
            failed = False
        finally:
            self.any(failed)


ALONE = Processes()
WAIT = datetime.timedelta(days=7)
"""How long the others wait for the first: a large text takes it hours to tokenize."""


@contextmanager
def processes(device: torch.device, backend: str = "auto") -> Iterator[tuple[Processes, torch.device]]:
    """This process among those of `torchrun`, and its device: with several GPUs each process takes the next one.

    Raises `UserError` where there are more processes than GPUs, or nccl is asked for without one.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE, device
        return
    if device.type == "cuda":
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > count:
            raise UserError(f"torchrun started {here} processes, and this machine has {count} GPUs: one process each")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif backend == "nccl":
        raise UserError(
            f"backend = 'nccl' is for CUDA GPUs, and the device is {device}: set backend=gloo or leave it out"
        )
    chosen = backend if backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(chosen, timeout=WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device), device
    finally:
        dist.destroy_process_group()
