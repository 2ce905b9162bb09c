"""The optimiser SOAP, compared with Adam and with its invariances."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from models.train.soap import Soap

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(optimiser: Optimizer, loss: Callable[[Tensor], Tensor], count: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        value = loss(torch.randn(4, 16, 12, 12, generator=generator))
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        yield float(value.detach())


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(16, 24, 3, padding=1).to(memory_format=torch.channels_last)


def uneven() -> Tensor:
    """A matrix that mixes 16 channels so that a few directions carry nearly all power."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 16, generator=generator) * torch.logspace(0, -2, 16)[:, None]


def test_soap_learns_faster_than_adam_if_channels_are_correlated() -> None:
    teacher, mix = nn.Conv2d(16, 24, 3, padding=1).requires_grad_(False), uneven()
    last = {}
    for name, kind in (("adam", Adam), ("soap", Soap)):
        net = convolution()

        def loss(x: Tensor, net: nn.Conv2d = net) -> Tensor:
            x = torch.einsum("bchw,cd->bdhw", x, mix)
            error: Tensor = net(x) - teacher(x)
            return error.square().mean()

        last[name] = list(steps(kind(net.parameters(), lr=3e-3), loss, 150))[-1]
    assert last["soap"] < 0.5 * last["adam"]


def test_updates_do_not_depend_on_the_basis_of_the_channels() -> None:
    """Unlike Adam: with rotated channels the weights follow the same path, rotated."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (24, 16))
    target, mix = torch.randn(24, 1, 1, generator=generator), uneven()
    losses = []
    for rotated in (False, True):
        net = convolution()
        if rotated:
            net.weight.data = torch.einsum("op,pihw,ij->ojhw", left, net.weight.data, right)
            net.bias.requires_grad_(False)  # type: ignore[union-attr]
            net.bias.data = left @ net.bias.data  # type: ignore[union-attr]
        net.bias.requires_grad_(False)  # type: ignore[union-attr]

        def loss(x: Tensor, net: nn.Conv2d = net, rotated: bool = rotated) -> Tensor:
            x = torch.einsum("bchw,cd->bdhw", x, mix)
            output = net(torch.einsum("bchw,cd->bdhw", x, right)) if rotated else net(x)
            output = torch.einsum("po,bphw->bohw", left, output) if rotated else output
            error: Tensor = output - target
            return error.square().mean()

        losses.append(list(steps(Soap([net.weight], lr=3e-3), loss, 30)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_adam_updates_parameters_that_are_not_convolutions() -> None:
    results = []
    for kind in (Adam, Soap):
        p = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimiser = kind([p], lr=1e-2, betas=(0.95, 0.95))

        def loss(x: Tensor, p: Tensor = p) -> Tensor:
            return (p * x[0, :12, 0, 0].reshape(3, 4) - 1).square().sum()

        for _ in steps(optimiser, loss, 40):
            pass
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_a_rarely_used_weight_changes_by_no_more_than_the_learning_rate() -> None:
    """Gradients in one step of twenty, in other directions than the eigenvectors know."""
    weight = nn.Parameter(torch.zeros(16, 24, 1, 1))
    optimiser = Soap([weight], lr=1.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(400):
        used = torch.rand((), generator=generator) < 0.05
        weight.grad = torch.randn(weight.shape, generator=generator) * used
        before = weight.detach().clone()
        optimiser.step()
        assert float((weight.detach() - before).square().mean().sqrt()) <= 1
