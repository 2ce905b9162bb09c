"""Networks of CompressAI's zoo with random weights, whose latents have many values."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from models.codec import tables
from models.codec.architectures import ARCHITECTURES
from models.codec.context import TAPS
from models.codec.networks import Network
from models.train.entropy import EntropyBottleneck

CLASSES = {
    "bmshj2018-factorized": "FactorizedPrior",
    "bmshj2018-factorized-relu": "FactorizedPriorReLU",
    "bmshj2018-hyperprior": "ScaleHyperprior",
    "mbt2018-mean": "MeanScaleHyperprior",
    "mbt2018": "JointAutoregressiveHierarchicalPriors",
    "cheng2020-anchor": "Cheng2020Anchor",
    "cheng2020-attn": "Cheng2020Attention",
}
SMALL = {name: (16, 24) if "cheng" not in name else (16, 16) for name in ARCHITECTURES}
"""Channels N and M of the networks that tests use; those of the zoo take a second to compute."""


def random(name: str, N: int = 0, M: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters of an architecture, by default with the channels in `SMALL`."""
    N, M = (N, M) if N else SMALL[name]
    torch.manual_seed(seed)
    net: Any = Network(ARCHITECTURES[name], N, M)
    bottleneck = EntropyBottleneck(N if hasattr(net, "h_a") else M)
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        _spread(net.g_a, net.g_a(x), 6)
        if hasattr(net, "h_a"):
            y = net.g_a(x)
            _spread(net.h_a, net.h_a(y.abs()), 4)
            last = net.entropy_parameters if hasattr(net, "entropy_parameters") else net.h_s
            biases = [layer.bias for layer in last if getattr(layer, "bias", None) is not None]
            biases[-1][:M] = torch.linspace(0.2, 4, M)
        if hasattr(net, "context_prediction"):  # as after a training step of CompressAI
            net.context_prediction.weight.flatten(2)[:, :, TAPS:] = 0
        quantiles = bottleneck.quantiles
        quantiles.add_(torch.randn_like(quantiles) * torch.tensor([2.0, 0.3, 2.0]))
    tensors: dict[str, Tensor] = net.state_dict()
    return tensors | {f"{tables.Z}.{k}": v for k, v in bottleneck.state_dict().items()}


def reference(name: str, N: int = 0, M: int = 0, seed: int = 0) -> Any:
    """Return CompressAI's network of an architecture, with the parameters and tables of `random`.

    Tests that call this have the marker `compressai`.
    """
    made = getattr(import_module("compressai.models"), CLASSES[name])  # which takes seconds
    N, M = (N, M) if N else SMALL[name]
    net = made(N) if "cheng" in name else made(N, M)
    net.load_state_dict(net.state_dict() | random(name, N, M, seed))
    net.update()
    return net.eval()


def parameters(net: Any) -> dict[str, Tensor]:
    """Return the parameters of a network of CompressAI, without its tables."""
    return {name: p.detach() for name, p in net.named_parameters()}


def _spread(transform: Any, out: Tensor, std: float) -> None:
    """Scale the last convolution of a transform, so that its result has about this deviation."""
    convolutions = [layer for layer in transform if isinstance(layer, torch.nn.Conv2d)]
    convolutions[-1].weight.mul_(std / out.std())
