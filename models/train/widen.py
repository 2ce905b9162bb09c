"""Widen a codec to more channels without changing its output.

A codec that was trained with few channels can thus be shipped, or trained further, at larger sizes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.train.hyperprior import TrainableHyperprior

Convolution = nn.Conv2d | nn.ConvTranspose2d
LAST = ("g_a.6", "h_a.4", "h_s.4")
"""Layers whose output channels are latents or parameters of latents: new ones are always zero."""


@torch.no_grad()
def widen(tensors: Mapping[str, Tensor], N: int, M: int, alive: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the codec `tensors` with `N` hidden and `M` latent channels.

    The old channels come first, and no weight leads from new channels to old ones. New latents are
    zero for every picture and cost less than 1e-4 of the rate. New hidden channels are zero too;
    with `alive` they get random weights, so that training can begin to use them. Raises
    `WeightsError` if the codec already has more channels.
    """
    m, n = tensors["g_a.6.weight"].shape[:2]
    if N < n or M < m:
        raise WeightsError(f"a codec of {n} and {m} channels cannot be widened to {N} and {M}")
    wide, old = TrainableHyperprior(N, M), TrainableHyperprior(n, m)
    old.load_state_dict({k: tensors[k].float() for k in old.state_dict()})
    for (name, layer), old_layer in zip(wide.named_modules(), old.modules(), strict=True):
        if isinstance(layer, Convolution):
            assert isinstance(old_layer, Convolution)
            _widen_layer(layer, old_layer, name, alive and name not in LAST)
    state = wide.state_dict()
    for name, value in old.state_dict().items():
        if name.endswith(("beta", "gamma")):  # new channels do not normalise old ones
            state[name][tuple(slice(side) for side in value.shape)] = value
    _widen_densities(wide, old)
    return state


def _widen_layer(layer: Convolution, old: Convolution, name: str, alive: bool) -> None:
    """Copy the weights of `old` into `layer`; set new outputs to zero unless `alive`."""
    outputs_first = (0, 1) if isinstance(layer, nn.Conv2d) else (1, 0)
    weight, old_weight = (w.weight.permute(*outputs_first, 2, 3) for w in (layer, old))
    outs, ins = old_weight.shape[:2]
    copied = torch.arange(outs)
    if name == "h_s.4":  # half of the outputs are scales, half are means
        copied = torch.cat([copied[: outs // 2], copied[: outs // 2] + len(weight) // 2])
    assert layer.bias is not None
    assert old.bias is not None
    if not alive:
        weight.zero_()
        layer.bias.zero_()
    layer.bias[copied] = old.bias
    weight[copied] = 0
    weight[copied, :ins] = old_weight


def _widen_densities(wide: TrainableHyperprior, old: TrainableHyperprior) -> None:
    """Give every new channel of z the density and the median of the cheapest old channel."""
    n, old_bottleneck = old.N, old.entropy_bottleneck
    medians = old_bottleneck.medians.flatten()
    costs = -old_bottleneck.likelihood(medians[None, :, None, None]).flatten().log2()
    cheapest = int(costs.argmin())
    for name, value in wide.entropy_bottleneck.state_dict().items():
        value[:n] = old_bottleneck.state_dict()[name]
        value[n:] = value[cheapest]
    wide.get_parameter("h_a.4.bias")[n:] = medians[cheapest]
