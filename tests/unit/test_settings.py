"""Where settings come from."""

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


def test_secrets_may_be_files_and_the_environment_comes_first(tmp_path: Path) -> None:
    secret = "whsec_" + "A" * 32
    for name, value in [
        ("REDIS_URL", "redis://:of-the-file@queue:6379/0\n"),
        ("CACHE_REDIS_URL", "redis://:of-the-file@cache:6379/0"),
        ("AFTERIMAGE_LINK_SECRET", 32 * "l"),
        ("AFTERIMAGE_WEBHOOK_SECRET", secret),
    ]:
        (tmp_path / name).write_text(value)
    own = {"AFTERIMAGE_SECRETS_DIR": str(tmp_path), "CACHE_REDIS_URL": "redis://first"}
    environment = {k: v for k, v in os.environ.items() if "REDIS" not in k} | own
    command = [sys.executable, "-P", "-c", SHOW]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    queue = "redis://:of-the-file@queue:6379/0"
    assert out.stdout.split() == [queue, "redis://first", 32 * "l", f"['{secret}']"]


def test_what_is_loaded_is_not_searched_for_garbage() -> None:
    before = gc.get_freeze_count()
    with without_garbage_collection():
        assert not gc.isenabled()
        loaded = [{} for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)
    gc.unfreeze()
