"""Muon: steps of equal size in every direction of a matrix (Jordan et al. 2024)."""

from __future__ import annotations

import torch


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with singular values near 1, by 5 Newton-Schulz steps in bfloat16.

    The quintic's coefficients are the published ones: they lift small singular values fast and let
    them end anywhere in 0.7 .. 1.2.
    """
    y = x.bfloat16()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.mT if tall else y).to(x.dtype)


class Muon:
    """Momentum, orthogonalised, for matrices; those of one shape are stepped together."""

    def __init__(
        self,
        matrices: list[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.01,
    ) -> None:
        """``lr`` moves every singular value; ``decay`` is relative to it."""
        self.lr, self.momentum, self.decay = lr, momentum, decay
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self.groups = [
            (g, torch.stack([torch.zeros_like(w) for w in g])) for g in by_shape.values()
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients."""
        for matrices, buffer in self.groups:
            grad = torch.stack([w.grad for w in matrices]).float()
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(buffer, self.momentum))
            rows, columns = matrices[0].shape
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(matrices, 1 - self.lr * self.decay)
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-self.lr * scale)

    def state(self) -> list[torch.Tensor]:
        """The momenta, in bfloat16: half the bytes, and orthogonalising rounds them anyway."""
        return [buffer.bfloat16() for _, buffer in self.groups]

    def load(self, state: list[torch.Tensor]) -> None:
        """Takes what :meth:`state` gave."""
        for (_, buffer), saved in zip(self.groups, state, strict=True):
            buffer.copy_(saved)
