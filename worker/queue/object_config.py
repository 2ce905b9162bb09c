"""The file of object stores, `AFTERIMAGE_STORES`: which stores exist, and who may use them.

    [stores.incoming]
    url = "s3://pictures/incoming"   # s3://, gs://, az:// or file:///; with a prefix, if any
    options = { region = "eu-central-1" }
    read = true                      # default: true
    write = false                    # default: false
    keys = ["gallery"]               # names of API keys; without it, every caller

Credentials come from the environment, as the platform's own tools read them.
"""

import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.errors import AfterimageError

SCHEMES = ("s3", "gs", "az", "file")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_SECRET = re.compile(r"secret|token|password|sas|account_key|access_key$|service_account_key")
"""What the name of an option that holds a secret contains."""


class StoresError(AfterimageError):
    """The file of object stores is missing or invalid, or a store in it cannot be set up."""


class StoreConfig(BaseModel):
    """The entry of a store in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str
    options: dict[str, str | bool | int] = {}
    read: bool = True
    write: bool = False
    keys: list[str] | None = Field(None, min_length=1)

    @field_validator("url")
    @classmethod
    def _url_names_a_place(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ValueError(f"the scheme is {parts.scheme!r}; choose one of {schemes}")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("remove user, query and fragment; credentials belong elsewhere")
        if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
            raise ValueError("write three slashes before an absolute path: file:///srv/pictures")
        if parts.scheme != "file" and not parts.netloc:
            raise ValueError(f"name the bucket: {parts.scheme}://BUCKET/PREFIX")
        return url

    @field_validator("options")
    @classmethod
    def _lease_needs_the_timeout(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "timeout" in options:
            raise ValueError("timeout: it is set by Afterimage; remove it")
        return options

    @model_validator(mode="after")
    def _folders_have_no_options(self) -> Self:
        if self.is_local and self.options:
            raise ValueError("options: a folder has none; remove them")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder."""
        return self.url.startswith("file:")

    def allows(self, caller: str) -> bool:
        """Whether the caller may know of this store."""
        return self.keys is None or caller in self.keys


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    stores: dict[str, StoreConfig] = Field(min_length=1)

    @field_validator("stores")
    @classmethod
    def _names_fit_into_references(cls, stores: dict[str, StoreConfig]) -> dict[str, StoreConfig]:
        for name in stores:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"the name {name!r} may hold only letters, digits, '.', '_', '-'")
        return stores


def read(path: Path) -> dict[str, StoreConfig]:
    """Read the file of stores: name -> entry.

    Raises `StoresError` that names the field, and if the file holds a secret and other users may
    read it.
    """
    try:
        stores = _File.model_validate(tomllib.loads(path.read_text("utf-8"))).stores
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "the file is not UTF-8 text"
        raise StoresError(f"{path}: {reason}") from e
    except tomllib.TOMLDecodeError as e:
        raise StoresError(f"{path}: not valid TOML: {e}") from e
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, x['loc']))}: {_message(x)}" for x in e.errors())
        raise StoresError(f"{path}: {faults}") from None
    for name, store in stores.items():
        secret = next((option for option in store.options if _SECRET.search(option)), None)
        if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StoresError(
                f"{path}: stores.{name}.options.{secret} is a secret, but other users may use the "
                "file: run chmod 600 on it, or set the credentials in the environment"
            )
    return stores


def check_keys(path: Path, stores: Mapping[str, StoreConfig], names: set[str]) -> None:
    """Raise `StoresError` if a store names an API key that is not among `names`."""
    for store, config in stores.items():
        unknown = sorted(set(config.keys or ()) - names)
        if unknown:
            known = ", ".join(sorted(names)) or "none; set AFTERIMAGE_API_KEYS"
            raise StoresError(
                f"{path}: stores.{store}.keys: there is no API key {unknown[0]!r}; keys: {known}"
            )


def _message(fault: Any) -> str:
    return str(fault.get("ctx", {}).get("error", fault["msg"]))
