"""What a CUDA graph does to an update, on a CPU: operators are recorded once with their tensors, and run again on them.

Whatever a recorded update took from Python (a number, a branch, a tensor that was put in the place of another) is in
the recording for good, as it is in a CUDA graph. `Waits` is the other half: it runs on the device "meta", where no
tensor has a value, and fails whatever would ask a GPU for one or send it something the CPU has to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recorder:
    """As `graph.Recorder` wants it: nothing that is recorded has happened when `record` returns."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.warmed_up = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        self.warmed_up += 1
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        recording = Recording()
        with recording:
            run()
        recording.undo()

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return replay

    def beside(self, number: int) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        pass


class Recording(TorchDispatchMode):
    """The operators that run inside, with the tensors they ran on."""

    active: ClassVar[Recording | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(args[index] if index < len(args) else kwargs.get(argument.name)):
                    self.keep(tensor)
        found = func(*args, **kwargs)
        inputs = {storage(tensor) for tensor in tensors((args, kwargs))}
        own = tree_map(lambda one: one if isinstance(one, Tensor) and storage(one) not in inputs else None, found)
        self.made |= {storage(tensor) for tensor in tensors(own)}
        self.calls.append((func, args, kwargs, own))
        return found

    def __enter__(self) -> Recording:
        Recording.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Recording.active = None
        super().__exit__(*error)

    def launch(self, kernel: Callable[[], None], touched: list[Tensor]) -> None:
        """A kernel that is no operator; it may write to any of its tensors."""
        for tensor in touched:
            self.keep(tensor)
        kernel()
        self.calls.append((kernel, (), {}, None))

    def keep(self, tensor: Tensor) -> None:
        """What is there before the recording first writes to it."""
        self.written.append(tensor)
        key = storage(tensor)
        if key not in self.made and key not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[key] = whole, whole.clone()

    def undo(self) -> None:
        for whole, value in self.before.values():
            whole.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.written)):  # as no replay on a GPU changes it
            for func, args, kwargs, own in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(own), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Waits(TorchDispatchMode):
    """Fails where tensors of a device meet those of the CPU: a transfer, for which one has to wait for the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "_fused_adam" in func.name():  # has no form for this device
            return None
        found = func(*args, **kwargs)
        kinds = {one.device.type for one in tensors((args, kwargs, found)) if one.dim()}
        assert len(kinds) < 2, f"{func} moves between {kinds}"
        return found
