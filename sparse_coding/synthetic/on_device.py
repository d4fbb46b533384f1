"""Samples of a toy world that are drawn where they are used: on a GPU, without waiting for it.

The directions and the law are those of the world; the draws are the device's own, so these are other samples of it than
`WorldStream` gives, and others on every kind of device. Still each batch is a function of its position alone, and no
two positions share a seed. All cells of [B G] are drawn: a GPU does that sooner than it says how many are active, and
the kernels of a batch are recorded once as a CUDA graph, which reads its seed anew at each launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.synthetic.sampling import generator
from sparse_coding.synthetic.stream import SITE, WorldStream
from sparse_coding.synthetic.world import World, WorldBatch, probabilities_from


class DeviceWorldStream(WorldStream):
    """`WorldStream` with the samples drawn on the world's device."""

    def __init__(self, world: World, batch_size: int, split: str = "train", noisy: bool = True) -> None:
        super().__init__(world, batch_size, split, noisy)
        self._draws = torch.Generator(world.device)
        moved = (None if one is None else one.to(world.device) for one in (world._decay, world._factor, world._fixed))
        self._decay, self._factor, self._fixed = moved
        self._recorded: Callable[[], Tensor] | None = None

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Activations [B d_in] of batch number `step`; nothing waits for the device."""
        self._seed(step)
        if self.world.device.type != "cuda":
            return {SITE: self._rows(self._codes())}
        if self._recorded is None:
            self._recorded = recorded(lambda: self._rows(self._codes()), self._draws)
            self._seed(step)
        return {SITE: self._recorded()}

    def batch_with_truth(self, step: int) -> WorldBatch:
        """The same batch with its codes; waits for the device, to list the active ones."""
        codes = self.codes(step)
        samples, features = codes.nonzero(as_tuple=True)
        return WorldBatch(self._rows(codes), samples, features, codes[samples, features], self.world.directions)

    def codes(self, step: int) -> Float[Tensor, "B G"]:
        """The true coefficients of batch number `step`: the recipe of settings.py, cell by cell."""
        self._seed(step)
        return self._codes()

    def _seed(self, step: int) -> None:
        self._draws.manual_seed(generator(self.world.settings.seed, self.split, step).initial_seed())

    def _codes(self) -> Float[Tensor, "B G"]:
        settings = self.world.settings
        codes = torch.where(self._uniform() < self._probabilities(), self._uniform(), 0.0)
        if settings.filler:
            which = torch.randint(
                settings.n_features, (self.batch_size, 1), generator=self._draws, device=self.world.device
            )
            codes.scatter_add_(1, which, (codes == 0).all(1, keepdim=True).to(codes.dtype))
        return codes * self._uniform() if settings.magnitude == "double_uniform" else codes

    def _rows(self, codes: Float[Tensor, "B G"]) -> Float[Tensor, "B d_in"]:
        x = codes @ self.world.directions
        if self.noisy and self.world.settings.noise > 0:  # drawn on from where the codes ended
            x += self.world.settings.noise * self._normal(*x.shape)
        return x

    def _probabilities(self) -> Float[Tensor, "*B G"]:
        settings = self.world.settings
        if self._fixed is not None:
            return self._fixed
        assert self._decay is not None
        n_draws = 1 if settings.probability_draw == "per_batch" else self.batch_size
        return probabilities_from(settings, self._normal(n_draws, settings.n_features), self._factor, self._decay)

    def _uniform(self) -> Float[Tensor, "B G"]:
        shape = self.batch_size, self.world.settings.n_features
        return torch.rand(shape, generator=self._draws, device=self.world.device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draws, device=self.world.device)


def recorded(draw: Callable[[], Tensor], draws: torch.Generator) -> Callable[[], Tensor]:
    """The same as one launch, drawing from where `draws` then stands; each call gives a tensor of its own."""
    side, current = torch.cuda.Stream(draws.device), torch.cuda.current_stream(draws.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        draw()  # libraries choose their kernels
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(draws)
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = draw()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    return replay
