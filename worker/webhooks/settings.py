"""Settings of webhooks, and the check of URLs that clients register."""

from base64 import b64decode
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from models.errors import ParameterError
from worker.settings import EnvironmentSettings, listed
from worker.webhooks import url_guard


class WebhookSettings(EnvironmentSettings):
    """Signing secrets, allowed private hosts, retries and timeouts."""

    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="secret: `whsec_` and base64 of 24 to 64 bytes; to rotate it: `NEW OLD`",
    )
    webhook_allow: str = Field(
        "", description="hosts or host:port, with commas, that may be private or use plain http"
    )
    webhook_retries_s: Annotated[
        tuple[Annotated[float, Field(ge=0, le=86400)], ...],
        NoDecode,
        listed("numbers of seconds from 0 to 86400"),
    ] = Field(
        (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600),
        description="longest waits after the 1st, 2nd, … failure, in seconds; `[]`: no retries",
    )
    webhook_timeout_s: float = Field(
        10, gt=0, le=60, description="timeout of one attempt, in seconds"
    )
    webhook_threads: int = Field(
        32,
        ge=1,
        le=256,
        description="deliveries at once per sender process; one caller gets an eighth of them",
    )

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, value: SecretStr) -> SecretStr:
        for secret in value.get_secret_value().split():
            try:
                size = len(b64decode(secret.removeprefix("whsec_"), validate=True))
            except ValueError:
                size = 0
            if not secret.startswith("whsec_") or not 24 <= size <= 64:
                raise ValueError("write each secret as whsec_ and base64 of 24 to 64 bytes")
        return value

    @property
    def secrets(self) -> list[str]:
        """The secrets; each message is signed with every one of them."""
        return self.webhook_secret.get_secret_value().split()

    @property
    def allow(self) -> frozenset[str]:
        """The entries of `webhook_allow`, in lower case."""
        return frozenset(self.webhook_allow.lower().replace(",", " ").split())

    @property
    def per_caller(self) -> int:
        """Deliveries of one caller at once, so that seven others are not delayed by slow hosts."""
        return max(self.webhook_threads // 8, 1)

    @property
    def per_host(self) -> int:
        """Deliveries of one caller to one host at once."""
        return max(self.per_caller // 2, 1)

    @property
    def lease_s(self) -> float:
        """How long a process may keep a claimed message; longer than an attempt can take."""
        return 2 * self.webhook_timeout_s + url_guard.RESOLVE_TIMEOUT_S


def check_url(
    url: str, settings: WebhookSettings, resolver: url_guard.Resolver = url_guard.resolve
) -> None:
    """Raise `ParameterError` unless webhooks are configured and may be sent to this URL.

    Resolves the host, which may take `url_guard.RESOLVE_TIMEOUT_S`. Every attempt checks again.
    """
    if not settings.secrets:
        raise ParameterError("webhook: not available, because AFTERIMAGE_WEBHOOK_SECRET is not set")
    url_guard.check(url, settings.allow, resolver)
