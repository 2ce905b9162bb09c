"""Fixtures: the shipped codec, tiny networks, real Redis servers, a real service.

This is a separate plugin, so that the process of pytest-xdist that hands out the tests does not
import torch.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from models import image
from models.codec import bitstream, codec, zoo
from models.codec.codec import Codec
from models.diffusion.decoder import Decoder
from models.diffusion.presets import COMPACT
from models.diffusion.unet import UNet
from tests.chaos import attack_webhooks
from tests.support import weights
from tests.support.data import PHOTO
from tests.support.service import WEBHOOK_SECRET, Service, connected, fork_service, free_port
from worker.queue import private_redis
from worker.queue.store import Store

LIMITS = {
    "AFTERIMAGE_MAX_PIXELS": "1000000",
    "AFTERIMAGE_BODY_TIMEOUT_S": "3",
    "AFTERIMAGE_MAX_MEGAPIXEL_STEPS": "300",
    "AFTERIMAGE_MAX_BYTES": "4000000",
    "AFTERIMAGE_BODIES_BYTES": "1",
    "AFTERIMAGE_WAITS_AT_ONCE": "150",
}
"""Of the services that tests share."""


@pytest.fixture(scope="session")
def compressai() -> ModuleType:
    """CompressAI. Tests that use this, directly or not, have the marker `compressai`."""
    return import_module("compressai")


@pytest.fixture
def loaded_once() -> Iterator[None]:
    """The command line and the API in this process use weights that were loaded before."""
    with weights.loaded_once():
        yield


@pytest.fixture(scope="session")
def shipped() -> Codec:
    return zoo.load(2)


@pytest.fixture(scope="session")
def photo() -> image.Pixels:
    """Kodak 23, (512, 768, 3)."""
    return image.read(PHOTO.read_bytes(), 10**6)


@pytest.fixture(scope="session")
def small(photo: image.Pixels) -> image.Pixels:
    """A cut of the photograph whose sides are no multiples of 64: (100, 150, 3)."""
    return photo[100:200, 200:350].copy()


@pytest.fixture(scope="session")
def small_msh(shipped: Codec, small: image.Pixels) -> bytes:
    return bitstream.serialize(shipped.encode(codec.to_tensor(small), "msh", "exact"))


@pytest.fixture(scope="session")
def small_compressai(shipped: Codec, small: image.Pixels) -> bytes:
    return bitstream.serialize(shipped.encode(codec.to_tensor(small), "compressai", "float"))


@pytest.fixture(scope="session")
def tiny_decoder() -> Decoder:
    torch.manual_seed(0)
    net = UNet(replace(COMPACT, widths=(8, 8, 8), condition=(8, 8, 8), embedding=8))
    with torch.no_grad():
        for p in net.parameters():  # what starts as zero would draw nothing
            p.add_(0.05 * torch.randn_like(p))
        net.scales.fill_(0.03)
    return Decoder("0" * 16, net)


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS-Alex with random weights, and the names and shapes of the package `lpips`.

    They are written without the package, whose import takes seconds.
    """
    convolutions = {
        "slice1.0": (3, 64, 11), "slice2.3": (64, 192, 5), "slice3.6": (192, 384, 3),
        "slice4.8": (384, 256, 3), "slice5.10": (256, 256, 3),
    }  # fmt: skip
    torch.manual_seed(0)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
    state = {
        "scaling_layer.shift": shift.reshape(1, 3, 1, 1).clone(),
        "scaling_layer.scale": scale.reshape(1, 3, 1, 1).clone(),
    }
    for i, (name, (inputs, outputs, kernel)) in enumerate(convolutions.items()):
        for part, value in torch.nn.Conv2d(inputs, outputs, kernel).state_dict().items():
            state[f"net.{name}.{part}"] = value
        state[f"lin{i}.model.1.weight"] = torch.rand(1, outputs, 1, 1) / outputs**0.5
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="session")
def redis_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Queue and cache: two real servers."""
    with private_redis.servers(tmp_path_factory.mktemp("redis")) as urls:
        yield urls


@pytest.fixture
def store(redis_urls: tuple[str, str]) -> Iterator[Store]:
    """Connections to empty stores."""
    with connected(*redis_urls) as store:
        store.queue.flushall()
        store.cache.flushall()
        yield store


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread: on a busy machine, several threads of small networks wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def webhook_port() -> int:
    """Where `service` may send webhooks."""
    return free_port()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, webhook_port: int) -> Iterator[Service]:
    """One service with one worker and the shipped weights, for all end-to-end tests."""
    folder = tmp_path_factory.mktemp("service")
    with private_redis.servers(folder / "redis") as urls:
        environment = {
            "REDIS_URL": urls[0],
            "CACHE_REDIS_URL": urls[1],
            "AFTERIMAGE_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "AFTERIMAGE_WEBHOOK_ALLOW": f"127.0.0.1:{webhook_port} {attack_webhooks.RECEIVERS}",
            **LIMITS,
        }
        with fork_service(folder, **environment) as running:
            yield running
