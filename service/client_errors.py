"""Errors of the Python client."""

from typing import Any

from models.errors import AfterimageError, Canceled


class ApiError(AfterimageError):
    """The service answered with an error, a problem document (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any], retry_after_s: float = 0) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or status))
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s


class ClientError(AfterimageError):
    """The client cannot be set up: an invalid port, API key, proxy or file of certificates."""


class DecodeFailed(AfterimageError):
    """The decode was queued and then failed."""


def decode_error(status: str, error: str | None) -> AfterimageError:
    """The exception for a decode whose status is `failed` or `canceled`."""
    if status == "canceled":
        return Canceled("the decode was canceled")
    return DecodeFailed(error or "the decode failed")
