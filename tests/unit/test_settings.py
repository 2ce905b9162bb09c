"""Settings from environment variables and secret files."""

import gc
import os
import subprocess
import sys
from pathlib import Path

from worker.settings import without_garbage_collection

SHOW = """
from service.settings import ServiceSettings
from worker.webhooks.settings import WebhookSettings
s = ServiceSettings()
print(s.redis_url, s.cache_redis_url, s.link_secret.get_secret_value(), WebhookSettings().secrets)
"""


def test_secrets_are_read_from_files_unless_the_environment_sets_them(tmp_path: Path) -> None:
    secret = "whsec_" + "A" * 32
    for name, value in [
        ("REDIS_URL", "redis://:from-file@queue:6379/0\n"),
        ("CACHE_REDIS_URL", "redis://:from-file@cache:6379/0"),
        ("AFTERIMAGE_LINK_SECRET", 32 * "l"),
        ("AFTERIMAGE_WEBHOOK_SECRET", secret),
    ]:
        (tmp_path / name).write_text(value)
    variables = {"AFTERIMAGE_SECRETS_DIR": str(tmp_path), "CACHE_REDIS_URL": "redis://first"}
    environment = {k: v for k, v in os.environ.items() if "REDIS" not in k} | variables
    command = [sys.executable, "-P", "-c", SHOW]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    queue = "redis://:from-file@queue:6379/0"
    assert out.stdout.split() == [queue, "redis://first", 32 * "l", f"['{secret}']"]


def test_objects_created_while_loading_are_exempt_from_garbage_collection() -> None:
    before = gc.get_freeze_count()
    with without_garbage_collection():
        assert not gc.isenabled()
        loaded = [{} for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)
    gc.unfreeze()
