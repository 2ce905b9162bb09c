"""The objects that routes share: stores, models, limits and keys, built once at start-up."""

from collections.abc import Mapping
from dataclasses import dataclass

from redis.asyncio import Redis as AsyncRedis

from models import checkpoint, library
from models.library import Library
from service.auth import Keys
from service.encoder import Encoder
from service.feeds import Feeds
from service.instant import InstantDecoder
from service.pixel_budget import PixelBudget
from service.quotas import Quotas
from service.settings import ServiceSettings
from service.uploads import UploadBudget
from service.waits import Waits
from worker.queue import store
from worker.queue.jobs import Jobs
from worker.queue.object_stores import ObjectStores
from worker.queue.store import Store
from worker.webhooks.settings import WebhookSettings


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that routes need, as `app.state.services`."""

    settings: ServiceSettings
    keys: Keys | None  # None: no authentication
    link_secret: bytes | None  # signs links; None: no links
    library: Library
    decoder_ids: Mapping[int, str]  # weights ids for `tiers.decoder_for`; only workers load them
    store: Store
    jobs: Jobs
    quotas: Quotas
    webhooks: WebhookSettings
    objects: ObjectStores
    instant: InstantDecoder
    encoder: Encoder
    uploads: UploadBudget
    waits: Waits
    feeds: Feeds
    streams: AsyncRedis  # the connection of `feeds`

    def close(self) -> None:
        """Kill the picture readers, drop waiting work, and close the stores' connections."""
        self.encoder.close()
        self.instant.close()
        self.store.close()


def load(
    settings: ServiceSettings, connected: Store, objects: ObjectStores, keys: Keys | None
) -> Services:
    """Load and warm up the codecs, which takes seconds, and build the services.

    Raises `WeightsError` if weights are missing or altered.
    """
    secret = settings.link_secret
    codecs = library.load(settings.threads, with_decoders=False, folder=settings.weights_dir)
    codecs.warm_up()
    decoders = checkpoint.decoder_entries()
    budget = PixelBudget(max(settings.pixels_at_once, settings.max_pixels) / 1e6)
    encoder = Encoder(codecs, settings, budget)
    encoder.start()
    jobs = Jobs(connected, settings.job_timeout_s)
    streams = store.streams(settings)
    return Services(
        settings=settings,
        keys=keys,
        link_secret=secret.get_secret_value().encode() if secret else None,
        library=codecs,
        decoder_ids={steps: entry.weights_id for steps, entry in decoders.items()},
        store=connected,
        jobs=jobs,
        quotas=Quotas(jobs, settings.requests_per_minute, settings.jobs_at_once),
        webhooks=WebhookSettings(),
        objects=objects,
        instant=InstantDecoder(codecs, settings, budget),
        encoder=encoder,
        uploads=UploadBudget(max(settings.bodies_bytes, settings.max_bytes)),
        waits=Waits(settings.waits_at_once),
        feeds=Feeds(jobs, streams),
        streams=streams,
    )
