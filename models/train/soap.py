"""SOAP (Vyas et al. 2024, algorithm 3): Adam in the eigenbasis of Shampoo's statistics.

It updates convolutions, whose gradients are matrices (output × input channels) at every tap. Adam
updates all other parameters. The overhead is a few products of small matrices per step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

EVERY = {"cpu": 10, "cuda": 50}
"""Steps between two updates of the eigenvectors. Each needs many small QR decompositions, which are
slow on a GPU."""
EPS = 1e-8


class Soap(Optimizer):
    """The optimiser SOAP. Its state holds only tensors, and a step never copies them to the CPU.

    For a convolution, `left` and `right` in the state are the eigenvectors, and `of_left` and
    `of_right` the statistics to which these belong.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.95, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], *group["betas"])

    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) for state in self.state.values()), default=0)

    def _update(self, p: Tensor, g: Tensor, lr: float, beta1: float, beta2: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": p.new_zeros(())}
            state |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            state |= _initial_bases(g) if p.dim() == 4 else {}
        step = state["step"].add_(1)
        bases = (state["left"], state["right"]) if p.dim() == 4 else None
        rotated = _rotate(g, bases)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        mean = _rotate(state["exp_avg"].lerp_(g, 1 - beta1), bases)
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt_() + EPS)
        # With equal betas it is within 1, unless new eigenvectors have just replaced those of
        # `square`: where that is almost 0, a rarely used weight would change without bound.
        update.clamp_(-1, 1)
        p.sub_(_rotate_back(update, bases), alpha=lr)
        if bases is not None:
            _update_bases(state, g, beta2, self._steps % EVERY[p.device.type] == 0)


Bases = tuple[Tensor, Tensor] | None


def _matrix(g: Tensor) -> Tensor:
    """(o, i, h, w) -> (o, h w, i), the memory layout of a channels-last weight."""
    return g.permute(0, 2, 3, 1).reshape(len(g), -1, g.shape[1])


def _from_matrix(m: Tensor, p: Tensor) -> Tensor:
    """The inverse of `_matrix`, in the shape of `p`."""
    o, i, h, w = p.shape
    return m.view(o, h, w, i).permute(0, 3, 1, 2)


def _multiply(left: Tensor, g: Tensor, right: Tensor) -> Tensor:
    """The product left g right at every tap."""
    m = _matrix(g) @ right
    return _from_matrix(left @ m.flatten(1), g)


def _rotate(g: Tensor, bases: Bases) -> Tensor:
    """Express a gradient in the eigenbasis."""
    return g if bases is None else _multiply(bases[0].T, g, bases[1])


def _rotate_back(g: Tensor, bases: Bases) -> Tensor:
    return g if bases is None else _multiply(bases[0], g, bases[1].T)


def _statistics(g: Tensor) -> tuple[Tensor, Tensor]:
    """Shampoo's statistics of one gradient, (o, o) and (i, i)."""
    m = _matrix(g)
    rows, columns = m.flatten(1), m.flatten(0, 1)
    return rows @ rows.T, columns.T @ columns


def _initial_bases(g: Tensor) -> dict[str, Tensor]:
    """Statistics of the first gradient, and their eigenvectors in order of falling eigenvalues."""
    of_left, of_right = _statistics(g)
    left, right = (torch.linalg.eigh(s)[1].flip(1).contiguous() for s in (of_left, of_right))
    return {"of_left": of_left, "of_right": of_right, "left": left, "right": right}


def _update_bases(state: dict[str, Tensor], g: Tensor, beta: float, eigenvectors: bool) -> None:
    """Update the statistics; with `eigenvectors`, also the bases, by one orthogonal iteration."""
    for side, statistics in zip(("left", "right"), _statistics(g), strict=True):
        average = state[f"of_{side}"].lerp_(statistics, 1 - beta)
        if eigenvectors:
            state[side] = torch.linalg.qr(average @ state[side])[0].contiguous()
