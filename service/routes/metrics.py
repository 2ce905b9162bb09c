"""`GET /metrics`: Prometheus metrics of this process, the queue and its workers."""

import anyio.to_thread
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from service import metrics
from service.deps import ServicesDep

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": "afterimage_redis_up 1.0\n"}}}},
)
async def page(services: ServicesDep) -> Response:
    """Metrics in the Prometheus text format: requests and decoding stages of this process; queue,
    jobs and workers of the whole deployment. While Redis is down, only those of this process are
    listed and `afterimage_redis_up` is 0."""
    text = await anyio.to_thread.run_sync(generate_latest, metrics.registry(services.jobs))
    headers = {"Cache-Control": "no-store"}
    return Response(text, headers=headers, media_type=CONTENT_TYPE_PLAIN_0_0_4)
