"""API keys for tests, and the settings of a service that accepts them."""

from pathlib import Path

from service import keys

TABLE = """
[[keys]]
name = "{name}"
sha256 = "{digest}"
scopes = [{scopes}]
{more}
"""
TOKENS = {name: f"ai_{name * 10}" for name in ("both", "decoder", "hasty", "single", "operator")}
"""By name of the key; `both` may decode and encode, without limits, and `operator` everything."""
SCOPES = {"both": '"decode", "encode"', "operator": '"decode", "encode", "operate"'}
LIMITS = {"hasty": "requests_per_minute = 3", "single": "jobs_at_once = 1"}


def guarded_settings(folder: Path) -> dict[str, str]:
    """Write the table of keys into `folder`, and return the environment variables of a service
    that uses it, and whose queue never refuses a job."""
    tables = [
        TABLE.format(
            name=name,
            digest=keys.digest(token),
            scopes=SCOPES.get(name, '"decode"'),
            more=LIMITS.get(name, ""),
        )
        for name, token in TOKENS.items()
    ]
    (folder / "keys.toml").write_text("".join(tables))
    return {
        "AFTERIMAGE_API_KEYS": str(folder / "keys.toml"),
        "AFTERIMAGE_LINK_SECRET": "s" * 40,
        "AFTERIMAGE_CORS_ORIGINS": '["https://gallery.example"]',
        "AFTERIMAGE_MAX_PIXELS": "1000000",
        "AFTERIMAGE_MAX_BACKLOG_S": "1000000",
    }
