"""Members that train together as one batched computation: parameters, optimiser, dead-latent clocks and metrics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries import Moment, Sample, TrainableDictionary, architecture
from sparse_coding.dictionaries.base import SETTLED
from sparse_coding.kernels import triton
from sparse_coding.kernels.result import StepResult, runs
from sparse_coding.training.allocator import keep_freed_memory
from sparse_coding.training.dead import Clocks, DeadSettings
from sparse_coding.training.loss_scale import LossScale
from sparse_coding.training.micro_batches import MicroBatches, looks_at_whole_batch
from sparse_coding.training.optimizer import OptimizerSettings, make_optimizer
from sparse_coding.training.sweep import TILE_BYTES, Member, members_within

METRICS = ("loss", "squared_error", "l1", "l0")


def gradients_by_autograd(
    dictionary: TrainableDictionary,
    x: Float[Tensor, "B d_in"],
    target: Float[Tensor, "B d_out"] | None = None,
    moment: Moment = SETTLED,
    dtype: torch.dtype = torch.float32,
    loss_scale: Float[Tensor, " M"] | None = None,
) -> StepResult:
    """The step as the dictionary's own `loss` defines it, matrix products in `dtype`, all else in the parameters' own.

    Gradients are `loss_scale` times too large where that is given.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        losses = dictionary.loss(x, target, moment)
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    total = losses.total if loss_scale is None else losses.total * loss_scale
    gradients = torch.autograd.grad(total.sum(), parameters)
    f = losses.f.detach()
    terms = {name: value.detach() for name, value in losses.terms.items() if name not in METRICS}
    return StepResult(
        dict(zip(names, gradients, strict=True)),
        losses.total.detach(),
        losses.terms["squared_error"].detach(),
        f.abs().sum(-1).mean(-1),
        (f != 0).sum(-2, dtype=torch.float32),
        terms,
        {name: value.detach() for name, value in losses.state.items()},
    )


class Stack:
    """Members of one architecture and shape on one site; `rows` of a batch are shared by all of them."""

    def __init__(
        self,
        members: Sequence[Member],
        settings: OptimizerSettings,
        device: str,
        dtype: torch.dtype,
        dead: DeadSettings | None = None,
        sample: Sample | None = None,
    ):
        keep_freed_memory()
        self.members, self.site, self.target, self.dtype = list(members), members[0].site, members[0].target, dtype
        kind = architecture(members[0].architecture)
        generators = [member.generator() for member in members]
        self.dictionary: Any = kind.init([member.settings for member in members], generators, device, sample)
        on_triton = triton.serves(self.dictionary.atoms)
        if on_triton and hasattr(self.dictionary, "W_enc"):
            self.dictionary.W_enc.data = triton.latents_together(self.dictionary.W_enc.data)
        matrices = {name for name in ("W_enc", "W_dec", "W_skip") if hasattr(self.dictionary, name)}
        lrs = [member.lr for member in members]
        self.optimizer = make_optimizer(self.dictionary.tensors(), lrs, settings, matrices)
        self.clocks = Clocks((len(members), members[0].settings.d_sae), dead or DeadSettings(), device)
        self.revives = getattr(members[0].settings, "dead_latents", "none") != "none"
        self.loss_scale = LossScale(len(members), device) if dtype == torch.float16 else None
        self.learning = None if self.loss_scale else self.optimizer.row_learning()
        self.density = torch.ones(len(members)) if on_triton else None
        """Share of the entries that was active up to the last line of the log; on a GPU, see `_choose`."""
        self._choose()
        self.micro = MicroBatches(members[0].name)
        self.sums = {name: torch.zeros(len(members), dtype=torch.float64, device=device) for name in METRICS}
        self.steps_summed = 0
        self.resting = False
        """Takes no updates any more; `averages` goes on to repeat its last ones."""

    def rows(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(x, target) of a batch of the stream; no target where it is x itself."""
        return batch[self.site], batch[self.target] if self.target else None

    def step(self, batch: Mapping[str, Tensor], scale: float | Tensor, moment: Moment = SETTLED) -> Tensor:
        """One update on one batch, the learning rates multiplied by `scale`; the losses `[M]` before it.

        Nothing here waits for the device.
        """
        x, target = self.rows(batch)
        if self.learning is not None:
            self.learning.scale = scale
        if self.revives and self.clocks.possible(moment.step, len(x)):
            moment = moment._replace(dead=self.clocks.dead())
        result = self.micro.gradients(self._gradients, x, target, moment)
        self.dictionary.constrain_gradients_(result.gradients)
        if self.loss_scale is None:
            self._update(result, scale)
        else:
            finite = self.loss_scale.unscale_(result.gradients)
            before = {name: value.clone() for name, value in self._changing().items()}
            self._update(result, scale)
            for name, value in self._changing().items():
                value.copy_(torch.where(finite.view(-1, *[1] * (value.ndim - 1)), value, before[name]))
            self.loss_scale.update(finite)
        self._count(result, len(x), moment.step)
        return result.loss

    def branch(self, moment: Moment, rows: int) -> Hashable | None:
        """What `step` decides on the host: after the warm-up of sparsity, steps of equal branches launch the same
        kernels with the same numbers. None: no two steps do."""
        own = self.dictionary.branch(moment)
        if own is None or self.micro.pieces > 1:
            return None
        sparse = False
        if self.density is not None:
            from sparse_coding.kernels.triton.step import DENSEST_ABOVE  # imports Triton, which is there then

            sparse = self.dictionary.density <= DENSEST_ABOVE
        revives = self.revives and self.clocks.possible(moment.step, rows)
        return sparse, revives, self.clocks.ends_window(moment.step, rows), own

    def allow_micro_batches(self, pieces: int = 1) -> None:
        """Take batches in pieces where memory does not hold them whole, from the first on in `pieces`."""
        d_out = self.members[0].settings.target_width if self.target else None
        whole = looks_at_whole_batch(self.dictionary, gradients_by_autograd, d_out, self.revives)
        self.micro = MicroBatches(self.members[0].name, allowed=True, whole=whole)
        self.micro.pieces = pieces

    def _gradients(self, x: Tensor, target: Tensor | None, moment: Moment) -> StepResult:
        if self.loss_scale is not None:
            return gradients_by_autograd(self.dictionary, x, target, moment, self.dtype, self.loss_scale.scale)
        self.dictionary.learning = self.learning if self.micro.pieces == 1 else None
        found = self.dictionary.fused_gradients(x, target, moment, self.dtype)
        for members in runs(range(len(self.members)) if found is None else found.left, self.at_once(len(x), moment)):
            if members == slice(0, len(self.members)):
                return gradients_by_autograd(self.dictionary, x, target, moment, self.dtype)
            own = gradients_by_autograd(self.dictionary.part(members), x, target, moment.of(members), self.dtype)
            found = own.room(len(self.members)) if found is None else found
            found.put(members, own)
        assert found is not None
        return found._replace(left=())

    def at_once(self, rows: int, moment: Moment) -> int:
        """How many members the definition takes at once: as a CPU's cache holds, or all where the error wants them."""
        if self.dictionary.atoms.device.type != "cpu" or moment.error:
            return len(self.members)
        return members_within(TILE_BYTES, self.members[0].settings, rows)

    @torch.no_grad()
    def _update(self, result: StepResult, scale: float | Tensor) -> None:
        values = self.dictionary.tensors()
        if self.learning is not None and "W_dec" not in result.gradients:  # the step has updated it and W_enc itself
            self.learning.rest_(result.gradients)
            values = {name: values[name] for name in result.gradients}
        else:
            self.optimizer.step(result.gradients, scale)
        self.dictionary.constrain_(values)
        for name, value in result.state.items():
            getattr(self.dictionary, name).copy_(value)

    def _changing(self) -> dict[str, Tensor]:
        """What an update changes, `[M ...]` by a flat name."""
        parts = {"weights": self.dictionary.tensors(), "state": self.dictionary.state(), **self.optimizer.state()}
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def _count(self, result: StepResult, n_rows: int, step: int) -> None:
        self.clocks.count(result.active, n_rows, step)
        l0 = result.active.sum(-1) / n_rows
        measured = dict(zip(METRICS, (result.loss, result.squared_error, result.l1, l0), strict=True))
        measured |= dict(result.terms)
        for name in measured:
            if name not in self.sums:  # a term that enters later, such as AuxK
                self.sums[name] = torch.zeros_like(self.sums["loss"])
        sums = [self.sums[name] for name in measured]
        rows = torch.stack(list(measured.values())).double()
        torch._foreach_add_(sums, list(rows))  # pyright: ignore[reportPrivateImportUsage]
        self.steps_summed += 1

    @torch.no_grad()
    def restart_(self, index: int, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """Give latents of member `index` new directions, and forget what optimiser and clocks knew of them."""
        one = self.dictionary.member(index, self.members[index].settings)
        one.restart_(latents, x, target)
        masks = {}
        for name, value in self.dictionary.tensors().items():
            value[index] = one.tensors()[name]
            if name in self.dictionary.latent_axes:
                mask = torch.zeros_like(value, dtype=torch.bool)
                mask[index].movedim(self.dictionary.latent_axes[name], 0)[latents] = True
                masks[name] = mask
        self.optimizer.forget_(masks)
        self.clocks.restart_(index, latents)

    def trained(self, index: int) -> TrainableDictionary:
        """Member `index` with the weights to use it with, a copy: averaged ones where the optimiser averages."""
        one = self.dictionary.member(index, self.members[index].settings)
        averaged = self.optimizer.averaged()
        if averaged is not None:
            for name, value in one.tensors().items():
                value.copy_(averaged[name][index])
            one.constrain_(one.tensors())
        return one

    def averages(self) -> dict[str, list[float]]:
        """Means over the steps since the last call (NaN without any), and how many latents are dead, per member."""
        steps = self.steps_summed or math.nan
        means = {name: (value / steps).tolist() for name, value in self.sums.items()}
        means["dead"] = self.clocks.dead().sum(1).tolist()
        if self.density is not None and self.steps_summed:
            self.density.copy_(torch.tensor(means["l0"]) / self.dictionary.d_sae)
            self._choose()
        if not self.resting:
            for value in self.sums.values():
                value.zero_()
            self.steps_summed = 0
        return means

    def _choose(self) -> None:
        """Tell the dictionary how sparse it is, where the log has waited for the device anyway."""
        if self.density is not None:
            self.dictionary.density = float(self.density.max())

    def repeat_averages(self, members: Sequence[int]) -> None:
        """Turn the sums of members, by place, into what `averages` gives for them now, of one step."""
        for value in self.sums.values():
            value[members] /= self.steps_summed

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on or a log line will show, by a flat name; shares memory."""
        found = self._changing()
        found |= {f"sums/{name}": value for name, value in self.sums.items()}
        found |= {f"clocks/{name}": value for name, value in self.clocks.state().items()}
        if self.density is not None:
            found["density"] = self.density
        if self.loss_scale is not None:
            found |= {f"loss_scale/{name}": value for name, value in self.loss_scale.state().items()}
        return {
            f"{member.name}/{name}": value[index]
            for index, member in enumerate(self.members)
            for name, value in found.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps_summed: int) -> None:
        start = f"{self.members[0].name}/sums/"
        for name in (key.removeprefix(start) for key in state if key.startswith(start)):
            self.sums.setdefault(name, torch.zeros_like(self.sums["loss"]))
        for name, value in self.state().items():
            value.copy_(state[name])
        self._choose()
        self.steps_summed = steps_summed
