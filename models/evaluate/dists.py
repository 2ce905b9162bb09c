"""DISTS (Ding 2020) by the package `piq`, but with local weights instead of downloaded ones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.evaluate.metrics import read_state

CHANNELS = [3, 64, 128, 256, 512, 512]
"""Channels of the picture and of the last layer of each stage of VGG-16."""
LAYERS = ["3", "8", "15", "22", "29"]
"""relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 as torchvision numbers them."""


class Dists:
    """DISTS distance; pictures with sides above 256 are downscaled first, as published."""

    def __init__(self, vgg: Path) -> None:
        """`vgg`: file of torchvision's VGG-16, with or without the classifier.

        The published α and β are read from `torchmetrics`, or from `vgg` if it has tensors `alpha`
        and `beta`. Raises `WeightsError` if the file holds something else.
        """
        state = read_state(vgg)
        mixing = state if {"alpha", "beta"} <= state.keys() else read_state(_alpha_beta())
        weights = [w for k in ("alpha", "beta") for w in torch.split(mixing[k], CHANNELS, dim=1)]
        self.net = _local_dists(_features(vgg, state), weights).eval()

    def __call__(self, a: Tensor, b: Tensor) -> float:
        """Distance of `a` and `b`, (1, 3, H, W) in [0, 1]."""
        with torch.inference_mode():
            return float(self.net(a, b))


def _local_dists(features: nn.Sequential, weights: list[Tensor]) -> nn.Module:
    """Make a `piq.DISTS` without its constructor, which downloads two files."""
    import piq

    net: nn.Module = piq.DISTS.__new__(piq.DISTS)
    super(piq.DISTS, net).__init__(
        features,
        LAYERS,
        weights,
        replace_pooling=True,
        normalize_features=False,
        allow_layers_weights_mismatch=True,
    )
    return net


def _alpha_beta() -> Path:
    """The published α and β."""
    import torchmetrics.functional.image

    return Path(torchmetrics.functional.image.__file__).parent / "dists_models/weights.pt"


def _features(file: Path, state: dict[str, Tensor]) -> nn.Sequential:
    from torchvision.models import vgg16

    with torch.device("meta"):  # do not allocate the classifier, 90 % of the network
        features: nn.Sequential = vgg16(weights=None).features
    prefix = "features."
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        features.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise WeightsError(f"{file}: not the weights of torchvision's VGG-16") from e
    return features
