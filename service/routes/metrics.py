"""`GET /metrics`: what this process measured, and what the queue and its workers left in Redis."""

import anyio.to_thread
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from service import metrics
from service.deps import Own

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": "afterimage_redis_up 1.0\n"}}}},
)
async def page(own: Own) -> Response:
    """Prometheus text exposition: requests and stages of this process; queue, jobs and workers of
    all. Where Redis is away, the process's own remain and `afterimage_redis_up` is 0."""
    text = await anyio.to_thread.run_sync(generate_latest, metrics.registry(own.jobs))
    headers = {"Cache-Control": "no-store"}
    return Response(text, headers=headers, media_type=CONTENT_TYPE_PLAIN_0_0_4)
