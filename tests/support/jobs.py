"""Factories for jobs."""

from models import checkpoint
from models.codec import bitstream
from models.tiers import Settings, decoder_for
from worker.queue.jobs import LEASE_S, Jobs
from worker.queue.records import DecodeRequest

FAST = Settings("ddim", 2, beta=1.0)
"""Two steps: the quickest drawing that a job can ask for and that reports progress."""


def decode_of(
    data: bytes, settings: Settings = FAST, seed: int = 0, tier: str = "perceptual"
) -> DecodeRequest:
    """A decode of the bitstream `data` with the shipped weights."""
    b = bitstream.parse(data)
    (codec,) = (e.weights_id for e in checkpoint.manifest() if e.quality == b.quality)
    decoder = decoder_for(checkpoint.decoder_entries(), settings).weights_id
    return DecodeRequest(
        bitstream.digest(data), tier, settings, seed, codec, decoder, b.quality, b.width, b.height
    )


def take(jobs: Jobs, job_id: str) -> None:
    """Take a job from its queue, as a worker does before it begins an attempt."""
    state = jobs.record(job_id)
    assert state is not None and jobs.line.claim(state)


def expire_lease(jobs: Jobs, job_id: str) -> None:
    """Let the lease of a killed worker expire at once, by backdating its last heartbeat."""
    last = jobs.now() - LEASE_S - 1
    assert jobs.store.queue.zadd(jobs.leases, {job_id: last}, xx=True, ch=True)
