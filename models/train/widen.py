"""A wider codec that computes the same: what was trained small can be shipped, or go on, wider."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.train.hyperprior import Hyperprior

Convolution = nn.Conv2d | nn.ConvTranspose2d
LAST = ("g_a.6", "h_a.4", "h_s.4")
"""Layers whose new channels are latents, or parameters of latents: those stay silent."""


@torch.no_grad()
def widened(
    tensors: Mapping[str, Tensor], N: int, M: int, alive: bool = False
) -> dict[str, Tensor]:
    """The state dict of a codec with `N` hidden and `M` latent channels.

    Old channels come first and read nothing of the new ones. New latents are always zero: they cost
    less than 1e-4 of the rate. So are new hidden channels, unless `alive`: then they start at
    random, unread, for training to find. `WeightsError` where the codec is wider than that.
    """
    m, n = tensors["g_a.6.weight"].shape[:2]
    if N < n or M < m:
        raise WeightsError(f"a codec of {n} and {m} channels cannot be widened to {N} and {M}")
    net, old = Hyperprior(N, M), Hyperprior(n, m)
    old.load_state_dict({k: tensors[k].float() for k in old.state_dict()})
    for (name, layer), before in zip(net.named_modules(), old.modules(), strict=True):
        if isinstance(layer, Convolution):
            assert isinstance(before, Convolution)
            _layer(layer, before, name, alive and name not in LAST)
    own = net.state_dict()
    for name, value in old.state_dict().items():
        if name.endswith(("beta", "gamma")):  # new channels do not normalise old ones
            own[name][tuple(slice(side) for side in value.shape)] = value
    _densities(net, old)
    return own


def _layer(layer: Convolution, before: Convolution, name: str, alive: bool) -> None:
    flip = (0, 1) if isinstance(layer, nn.Conv2d) else (1, 0)
    weight, small = (w.weight.permute(*flip, 2, 3) for w in (layer, before))
    outs, ins = small.shape[:2]
    known = torch.arange(outs)
    if name == "h_s.4":  # scales, then means
        known = torch.cat([known[: outs // 2], known[: outs // 2] + len(weight) // 2])
    assert layer.bias is not None
    assert before.bias is not None
    if not alive:
        weight.zero_()
        layer.bias.zero_()
    layer.bias[known] = before.bias
    weight[known] = 0
    weight[known, :ins] = small


def _densities(net: Hyperprior, old: Hyperprior) -> None:
    """New channels of z stay where the cheapest of the old ones is, with its density."""
    n, before = old.N, old.entropy_bottleneck
    medians = before.medians.flatten()
    costs = -before.likelihood(medians[None, :, None, None]).flatten().log2()
    cheapest = int(costs.argmin())
    for name, value in net.entropy_bottleneck.state_dict().items():
        value[:n] = before.state_dict()[name]
        value[n:] = value[cheapest]
    net.get_parameter("h_a.4.bias")[n:] = medians[cheapest]
