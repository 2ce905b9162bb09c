"""The API with an imported model other than the shipped one, in this process."""

from collections.abc import Iterator

import httpx
import pytest
import torch

from models import image
from models.codec import interchange
from service.settings import ServiceSettings
from tests.support import weights, zoo
from tests.support.api import run_app

pytestmark = [pytest.mark.redis, pytest.mark.weights]

MODEL = "bmshj2018-hyperprior"


@pytest.fixture(scope="module")
def api(
    redis_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(zoo.random(MODEL, 128, 192), folder / "a.pth")
    interchange.install(folder / "a.pth", 2, "mse", folder)
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache, weights_dir=folder)
    with weights.loaded_once(), run_app(settings) as client:
        yield client


def test_a_photograph_is_encoded_and_decoded_with_another_model(
    api: httpx.Client, small: image.Pixels
) -> None:
    png = image.write(small, "png")
    answer = api.post(f"/v1/encodes?format=compressai&model={MODEL}", content=png)
    assert answer.status_code == 200, answer.text
    found = api.post("/v1/inspect", content=answer.content).json()
    assert (found["model"], found["quality"], found["decodable"]) == (MODEL, 2, True)
    decoded = api.post("/v1/decodes", content=answer.content)
    assert decoded.status_code == 200
    assert image.read(decoded.content, 10**6).shape == small.shape
    queued = api.post("/v1/decodes?tier=perceptual", content=answer.content)
    assert queued.status_code == 200
    (entry,) = (e for e in api.get("/v1/models").json() if e["model"] == MODEL)
    document = api.get(queued.headers["Location"]).json()
    assert document["codec_weights"] == entry["weights_id"]


def test_msh_files_are_of_the_shipped_model_only(api: httpx.Client, small: image.Pixels) -> None:
    answer = api.post(f"/v1/encodes?model={MODEL}", content=image.write(small, "png"))
    assert answer.status_code == 422
    assert "choose the format compressai" in answer.json()["detail"]
