"""One CUDA graph for an update of all stacks: its kernels are recorded once and then launched together.

On a GPU an update is the same list of kernels on the same tensors again and again, but for what the host decides:
whether a latent can be dead by now, whether a sampling window ends, at which stage an annealed exponent is. These
decisions are the update's *branch* (see `Stack.branch`); each branch has a graph of its own. Numbers that move from one
update to the next lie on the device: the learning rates' factor here, Adam's count of updates in its own state.

An update is launched kernel by kernel

    the first WARM_UP times that its branch is met: libraries choose and compile kernels then, and reserve memory
    while sparsity warms up, and with prefixes drawn anew at each step: no two of these updates are alike
    where batches are taken in pieces, or looked at before they are trained on (after NaN was met)
    always, where a language model is part of the loss, or the optimiser keeps numbers on the CPU (schedule-free)
    from then on, where recording fails, which is told on stderr

and it makes no difference to what is trained: the same kernels read the same numbers. In a graph, stacks run beside one
another. The tests record and replay operators on a CPU, and compare real graphs where there is a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_coding.training.stack import Stack
    from sparse_coding.training.trainer import Trainer

WARM_UP = 3
STREAMS = 4
"""On which stacks are recorded, so that small ones fill the gaps that others leave."""
MOST = 8
"""Graphs kept; the one recorded first gives way."""

Run = Callable[[], None]


class Recorder(Protocol):
    """What turns a function that launches kernels into one launch."""

    def warm_up(self, run: Run) -> None:
        """Run it as it will be recorded."""

    def record(self, run: Run) -> Run:
        """What does on the device all that `run` would do; `run` is called once, and the device does nothing yet."""
        ...

    def beside(self, number: int) -> AbstractContextManager[Any]:
        """What is recorded inside may run beside what is recorded outside, until `join`."""
        ...

    def join(self) -> None:
        """What is recorded from here on comes after all that."""
        ...


class CudaRecorder:
    """Records on a stream of its own. Graphs share one pool of memory, as no two of them run side by side."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.sides: list[torch.cuda.Stream] = []
        self.forked: list[torch.cuda.Stream] = []

    def warm_up(self, run: Run) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Run) -> Run:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        try:
            # thread_local: a store's reading threads go on meanwhile, and may ask the driver what they like
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                run()
        except BaseException:
            torch.cuda.set_stream(current)  # which torch does not do where recording ends in an error
            raise
        finally:
            self.forked.clear()
        return graph.replay

    @contextmanager
    def beside(self, number: int) -> Iterator[None]:
        while len(self.sides) <= number % STREAMS:
            self.sides.append(torch.cuda.Stream(self.stream.device))
        side = self.sides[number % STREAMS]
        side.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.forked.append(side)
        with torch.cuda.stream(side):
            yield

    def join(self) -> None:
        for side in self.forked:
            torch.cuda.current_stream(self.stream.device).wait_stream(side)
        self.forked.clear()


class Graphs:
    """The recorded updates of a trainer, by branch."""

    def __init__(self, trainer: Trainer, recorder: Recorder | None = None):
        device = torch.device(trainer.device)
        if recorder is None and device.type == "cuda":
            recorder = CudaRecorder(device)
        self.trainer, self.recorder = trainer, recorder
        self.scale = torch.ones((), device=device)
        self.inputs: dict[str, Tensor] = {}
        self._graphs: dict[Hashable, tuple[Run, list[int]]] = {}
        """What replays an update, and the versions of the parameters since."""
        self._met: Counter[Hashable] = Counter()
        self._stacks: list[Stack] = []
        self._recording = False
        self.refused = False
        """Updates are launched kernel by kernel from now on."""
        self._told = False

    def update(self, batch: Mapping[str, Tensor], scale: float) -> bool:
        """One update of all stacks; False, and nothing done, where the device or the optimiser has no use for this.

        Whether it is replayed or not, the factor `scale` of the learning rates comes from the device: a number from
        the host would be rounded otherwise.
        """
        trainer = self.trainer
        if self.recorder is None or not all(stack.optimizer.on_device for stack in trainer.stacks):
            return False
        self.scale.fill_(scale)
        if self._stacks != trainer.stacks:  # after a restore, or when members were set aside: the tensors are others
            self._stacks, self.inputs = list(trainer.stacks), {}
            self._graphs.clear()
            self._met.clear()
        branch = self._branch()
        if branch is None:
            trainer.update(batch, self.scale)
            return True
        self._read(batch)
        replay = self._replay(branch)
        if replay is None:
            self.recorder.warm_up(self._run)
        else:
            replay()
            for stack in self._going():
                stack.steps_summed += 1
        return True

    def beside(self, number: int) -> AbstractContextManager[Any]:
        """For stack `number` of an update: stacks are independent of one another, until `join`."""
        if self._recording and self.recorder is not None and len(self._going()) > 1:
            return self.recorder.beside(number)
        return nullcontext()

    def join(self) -> None:
        if self._recording and self.recorder is not None:
            self.recorder.join()

    def _run(self) -> None:
        self.trainer.update(self.inputs, self.scale)

    def _read(self, batch: Mapping[str, Tensor]) -> None:
        """Put what an update reads of a batch where graphs read it."""
        sites = {site for stack in self._going() for site in (stack.site, stack.target) if site}
        for site in sites | {*self.trainer.moments}:
            if site not in self.inputs:
                self.inputs[site] = torch.empty_like(batch[site])
            self.inputs[site].copy_(batch[site])

    def _going(self) -> list[Stack]:
        return [stack for stack in self.trainer.stacks if not stack.resting]

    def _branch(self) -> Hashable | None:
        """What the host decides in the next update; None where that must be launched kernel by kernel."""
        trainer = self.trainer
        sparsity = trainer.settings.sparsity(trainer.step)
        if self.refused or trainer.careful or trainer.error is not None or sparsity < 1:
            return None
        branches = [stack.branch(trainer.moment(stack), trainer.stream.batch_size) for stack in self._going()]
        return None if None in branches else tuple(branches)

    def _replay(self, branch: Hashable) -> Run | None:
        """What replays an update of this branch; None where it has to be launched kernel by kernel once more.

        A graph may read copies of weights in another dtype that its kernels keep up. So it is recorded anew once torch
        has changed the weights (in a branch without a graph, by resampling, by loading); replays do not count as that.
        """
        if branch in self._graphs:
            replay, versions = self._graphs[branch]
            if versions == self._versions():
                return replay
            del self._graphs[branch]
            self._met[branch] = WARM_UP - 1
        self._met[branch] += 1
        return self._record(branch) if self._met[branch] > WARM_UP else None

    def _versions(self) -> list[int]:
        return [value._version for stack in self._stacks for value in stack.dictionary.tensors().values()]

    def _record(self, branch: Hashable) -> Run | None:
        """The graph of a branch, kept for the next time; None where it cannot be recorded."""
        assert self.recorder is not None
        before = [stack.steps_summed for stack in self._stacks]
        self._recording = True
        try:
            replay = self.recorder.record(self._run)
        except Exception as error:
            self.refused = True
            words = str(error).strip().splitlines() or [type(error).__name__]
            tell(f"updates cannot be recorded as a CUDA graph ({words[0]}): they go on kernel by kernel")
            return None
        finally:
            self._recording = False
            for stack, summed in zip(self._stacks, before, strict=True):
                stack.steps_summed = summed
        if len(self._graphs) == MOST:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[branch] = replay, self._versions()
        if not self._told:
            self._told = True
            tell(f"from update {self.trainer.step + 1:,} on, updates are launched as one CUDA graph")
        return replay


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
