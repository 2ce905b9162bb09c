"""SOAP (Vyas et al. 2024, algorithm 3): Adam in the eigenbasis of Shampoo's statistics.

For convolutions, whose gradients are a matrix of channels by channels at every tap; all other
parameters get Adam. It costs a few products of small matrices a step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

EVERY = {"cpu": 10, "cuda": 50}
"""Steps between two looks at where the eigenvectors have moved: many small QR decompositions, which
a GPU is slow at."""
EPS = 1e-8


class Soap(Optimizer):
    """Its state is tensors alone, as a checkpoint wants them; none of them is read by the host."""

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
        self._steps = max((int(kept["step"]) for kept in self.state.values()), default=0)

    def _update(self, p: Tensor, g: Tensor, lr: float, beta1: float, beta2: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": p.new_zeros(())}
            state |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            state |= _start(g) if p.dim() == 4 else {}
        step = state["step"].add_(1)
        bases = (state["left"], state["right"]) if p.dim() == 4 else None
        turned = _turned(g, bases)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        mean = _turned(state["exp_avg"].lerp_(g, 1 - beta1), bases)
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt_() + EPS)
        p.sub_(_turned_back(update, bases), alpha=lr)
        if bases is not None:
            _follow(state, g, beta2, self._steps % EVERY[p.device.type] == 0)


Bases = tuple[Tensor, Tensor] | None


def _matrix(g: Tensor) -> Tensor:
    """(o, i, h, w) -> (o, h w, i), which is how a channels-last weight lies in memory."""
    return g.permute(0, 2, 3, 1).reshape(len(g), -1, g.shape[1])


def _like(m: Tensor, p: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    o, i, h, w = p.shape
    return m.view(o, h, w, i).permute(0, 3, 1, 2)


def _between(left: Tensor, g: Tensor, right: Tensor) -> Tensor:
    """left g right at every tap."""
    m = _matrix(g) @ right
    return _like(left @ m.flatten(1), g)


def _turned(g: Tensor, bases: Bases) -> Tensor:
    return g if bases is None else _between(bases[0].T, g, bases[1])


def _turned_back(g: Tensor, bases: Bases) -> Tensor:
    return g if bases is None else _between(bases[0], g, bases[1].T)


def _squares(g: Tensor) -> tuple[Tensor, Tensor]:
    """Shampoo's statistics of one gradient, (o, o) and (i, i)."""
    m = _matrix(g)
    rows, columns = m.flatten(1), m.flatten(0, 1)
    return rows @ rows.T, columns.T @ columns


def _start(g: Tensor) -> dict[str, Tensor]:
    """Eigenvectors of the first gradient's statistics, the largest first."""
    of_left, of_right = _squares(g)
    left, right = (torch.linalg.eigh(s)[1].flip(1).contiguous() for s in (of_left, of_right))
    return {"of_left": of_left, "of_right": of_right, "left": left, "right": right}


def _follow(state: dict[str, Tensor], g: Tensor, beta: float, turn: bool) -> None:
    """Move the statistics, and now and then the bases, by one step of orthogonal iteration."""
    for side, squares in zip(("left", "right"), _squares(g), strict=True):
        kept = state[f"of_{side}"].lerp_(squares, 1 - beta)
        if turn:
            state[side] = torch.linalg.qr(kept @ state[side])[0].contiguous()
