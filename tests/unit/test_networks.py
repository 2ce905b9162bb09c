"""The networks and the table of architectures, beside CompressAI's."""

import pytest
import torch

from models.codec import architectures, published
from models.codec.architectures import ARCHITECTURES
from models.codec.networks import Network
from models.errors import ParameterError
from tests.support import zoo


@pytest.mark.compressai
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_channels_of_each_quality_are_those_of_compressai(name: str) -> None:
    from compressai.zoo.image import cfgs

    theirs = [row if len(row) == 2 else row * 2 for row in cfgs[name].values()]
    assert list(ARCHITECTURES[name].channels) == theirs
    assert list(cfgs[name]) == list(range(1, ARCHITECTURES[name].qualities + 1))


def test_unknown_models_and_qualities_are_refused() -> None:
    with pytest.raises(ParameterError, match="'mbt2019'; choose one of bmshj2018-factorized"):
        architectures.find("mbt2019")
    with pytest.raises(ParameterError, match="quality is 7; cheng2020-attn has .* 1 to 6"):
        architectures.channels("cheng2020-attn", 7)


@pytest.mark.compressai
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_of_parameters_are_those_of_compressai(name: str) -> None:
    theirs = zoo.reference(name)
    ours = Network(ARCHITECTURES[name], *zoo.SMALL[name]).state_dict()
    named = theirs.named_parameters()
    shapes = {k: p.shape for k, p in named if not k.startswith("entropy_bottleneck.")}
    assert {k: v.shape for k, v in ours.items()} == shapes


@pytest.mark.compressai
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transforms_equal_those_of_compressai(name: str) -> None:
    theirs = zoo.reference(name)
    ours = Network(ARCHITECTURES[name], *zoo.SMALL[name])
    parameters = zoo.parameters(theirs)
    ours.load_state_dict({k: parameters[k] for k in ours.state_dict()})
    with torch.inference_mode():
        x = torch.rand(1, 3, 64, 128)
        y = theirs.g_a(x)
        pairs = [(ours.g_a(x), y), (ours.g_s(y), theirs.g_s(y))]
        if hasattr(theirs, "h_a"):
            z = theirs.h_a(y)
            pairs += [(ours.h_a(y), z), (ours.h_s(z), theirs.h_s(z))]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.compressai
@pytest.mark.parametrize("name", published.models())
def test_the_addresses_of_weights_are_those_of_compressai(name: str) -> None:
    from compressai.zoo.image import model_urls

    for metric, qualities in model_urls[name].items():
        theirs = [qualities[q] for q in range(1, ARCHITECTURES[name].qualities + 1)]
        ours = [published.url(name, metric, q) for q in range(1, len(theirs) + 1)]
        assert ours == theirs
