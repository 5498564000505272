"""A block small enough to train in a moment: x + W_down relu(W_up x), noisy inputs, and a layer never called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strop.methods import Statistics

UP, DOWN, DEAD = "block.up", "block.down", "block.dead"


class ToyBlock:
    """A `strop.methods.Block`; remembers every set of weights that it was run with while nothing was recorded."""

    def __init__(
        self,
        *,
        batches: int = 6,
        tokens: int = 32,
        width: int = 32,
        seed: int = 0,
        correlated: bool = True,
        long_tokens: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights: Mapping[str, Tensor] = {
            UP: torch.randn(2 * width, width, generator=generator) / width**0.5,
            DOWN: torch.randn(width, 2 * width, generator=generator) / width**0.5,
            DEAD: torch.randn(width, width, generator=generator),
        }
        self.name = "block"
        self.shared: Sequence[tuple[str, ...]] = ((UP,), (DOWN,), (DEAD,))
        self.others: Mapping[str, Tensor] = {}
        self.batches = batches
        mixing = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator)
        if not correlated:
            mixing = torch.eye(width)
        self.x = [torch.randn(tokens, width, generator=generator) @ mixing for _ in range(batches)]
        for x in self.x if long_tokens else ():
            x[::long_tokens] = 30 * x[::long_tokens].abs()  # they alone decide the second moments
        self.noise = [0.02 * torch.randn(tokens, width, generator=generator) for _ in range(batches)]
        self.measured: list[dict[str, Tensor]] = []
        self.trained: list[int] = []
        self.lets_go = False

    def forward(self, x: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        up, down = (changed.get(layer, self.weights[layer]) for layer in (UP, DOWN))
        return x + torch.relu(x @ up.t()) @ down.t()

    def target(self, batch: int) -> Tensor:
        return self.forward(self.x[batch], {})

    def run(self, batch: int, changed: Mapping[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            self.trained.append(batch)
        else:
            self.measured.append(dict(changed))
        return self.forward(self.x[batch] + self.noise[batch], changed)

    def statistics(
        self, layers: Sequence[str], changed: Mapping[str, Tensor], *, hessian: bool = False, drift: bool = False
    ) -> dict[str, Statistics]:
        seen = {layer: x for layer, x in self._inputs(changed).items() if layer in layers}
        exact = self._inputs({}) if drift else {}
        return {
            layer: Statistics(
                x.square().mean(0),
                len(x),
                hessian=x.t() @ x / len(x) if hessian else None,
                drift=(exact[layer] - x).t() @ x / len(x) if drift else None,
            )
            for layer, x in seen.items()
        }

    def stages(self, *, hessian: bool) -> Sequence[tuple[str, ...]]:
        return self.shared

    def is_expert(self, layer: str) -> bool:
        return False

    def let_go(self) -> None:
        self.lets_go = True

    def inputs(self, layer: str, changed: Mapping[str, Tensor], *, most: int) -> Tensor:
        return self._inputs(changed)[layer][:most]

    def _inputs(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat(self.x) + torch.cat(self.noise)
        return {UP: x, DOWN: torch.relu(x @ changed.get(UP, self.weights[UP]).t())}

    def error(self, batches: Sequence[int], weights: Mapping[str, Tensor], *, relative: bool = False) -> float:
        """Mean squared error of the output over batches, or mean over tokens of |error|^2 / |target|^2, in float64."""
        target = torch.cat([self.target(n) for n in batches]).double()
        found = torch.cat([self.forward(self.x[n] + self.noise[n], weights) for n in batches]).double()
        squares = (found - target).square()
        return (squares.sum(1) / target.square().sum(1) if relative else squares).mean().item()
