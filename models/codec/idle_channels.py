"""Removal of channels that do not affect the result.

A codec that was widened (`models.train.widen`) has such channels.
"""

import copy

import torch
from torch import Tensor, nn

from models.codec.msh import GDN

Convolution = nn.Conv2d | nn.ConvTranspose2d


def used_channels(layers: nn.Sequential, wanted: Tensor) -> list[Tensor]:
    """Return masks of the channels that affect the channels `wanted` (a mask) of the result.

    There is one mask for the input of each layer, and `wanted` at the end. No other mask is empty:
    if no channel of a layer affects the result, all are marked.
    """
    masks = [wanted]
    for layer in reversed(layers):
        used = masks[0]
        if isinstance(layer, GDN):
            gamma = layer.coefficients()[1][used]  # (out, in, 1, 1)
            masks[0] = used = used | (gamma != 0).any(0)[:, 0, 0]
        elif isinstance(layer, Convolution):
            used = (_by_output(layer)[used] != 0).any(0).any(1).any(1)
        masks.insert(0, used if used.any() else torch.ones_like(used))
    return masks


def nonzero_channels(layer: Convolution) -> Tensor:
    """Return the mask of the output channels that are not 0 for every input; of all if none is."""
    assert layer.bias is not None
    nonzero = (_by_output(layer) != 0).flatten(1).any(1) | (layer.bias != 0)
    return nonzero if nonzero.any() else torch.ones_like(nonzero)


def narrow(layer: Convolution, i: Tensor, o: Tensor) -> Convolution:
    """Return a copy with the input channels in mask `i` and the output channels in mask `o`."""
    assert layer.bias is not None
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight = layer.weight[i][:, o] if transposed else layer.weight[o][:, i]
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(weight.detach(), layer.weight.requires_grad)
    made.bias = nn.Parameter(layer.bias[o].detach(), layer.bias.requires_grad)
    made.in_channels, made.out_channels = int(i.sum()), int(o.sum())
    return made


def _by_output(layer: Convolution) -> Tensor:
    """Return the weights as (out, in, k, k)."""
    return layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
