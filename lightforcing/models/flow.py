"""Noise levels of the few-step samplers: flow matching on a shifted grid of 1000 timesteps."""

from __future__ import annotations

import torch

GRID = 1000


class FlowSchedule:
    """Timesteps and noise levels: ``x_t = (1 - sigma) x0 + sigma noise``, ``t = 1000 sigma``.

    Grid point i of 1000 has ``s = 1 - i / 1000`` and ``sigma = shift s / (1 + (shift - 1) s)``. All
    of it is computed in float32, since models were trained on exactly these values: at t = 833 one
    float32 step of t already moves the fastest sinusoid of the timestep embedding by 6e-5.

    Args:
        shift: how far the grid leans towards noise; 5 for Self Forcing and LongLive, 8 for CausVid.
    """

    def __init__(self, shift: float = 5.0) -> None:
        """Builds the grid, on the CPU."""
        if not shift > 0:
            raise ValueError(f"shift: expected a positive number, got {shift}")
        plain = torch.linspace(1.0, 0.0, GRID + 1, dtype=torch.float32)[:-1]
        self.shift = shift
        self.sigmas = shift * plain / (1 + (shift - 1) * plain)
        self.timesteps = self.sigmas * GRID

    def warp(self, step: float) -> float:
        """The timestep at position ``step`` of the unshifted grid: 750 is 937.5 at shift 5.

        Raises:
            ValueError: not an integer in 1 .. 1000.
        """
        if step != int(step) or not 1 <= step <= GRID:
            raise ValueError(f"steps: expected integers in 1 .. {GRID} to warp, got {step}")
        return float(self.timesteps[GRID - int(step)])

    def sigma(self, timestep: float) -> float:
        """The noise level of the grid point nearest to ``timestep``."""
        nearest = (self.timesteps.double() - timestep).abs().argmin()
        return float(self.sigmas[nearest])


def predict_clean(noisy: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """``x0 = x_t - sigma v``, in float64, returned in the type of ``velocity``."""
    return (noisy.double() - sigma * velocity.double()).to(velocity.dtype)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """``x_t = (1 - sigma) x0 + sigma noise``, in float32 at least, in the type of ``noise``."""
    work = torch.promote_types(clean.dtype, torch.float32)
    return ((1 - sigma) * clean.to(work) + sigma * noise.to(work)).to(noise.dtype)
