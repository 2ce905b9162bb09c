"""Settings from environment variables and secret files."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.codec import openvino_synthesis
from service.settings import ServiceSettings
from worker import settings as worker_settings
from worker.settings import WorkerSettings, faults, without_garbage_collection
from worker.webhooks.settings import WebhookSettings

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


def variables(settings: type[worker_settings.EnvironmentSettings]) -> set[str]:
    names = set()
    for name, field in settings.model_fields.items():
        names.add(str(field.validation_alias or f"AFTERIMAGE_{name}").upper())
    return names


ALL = variables(ServiceSettings) | variables(WebhookSettings)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("variable", sorted(ALL - {"AFTERIMAGE_API_KEYS"}))
def test_an_empty_variable_is_unset(
    variable: str, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    unset = ServiceSettings(), WebhookSettings()
    monkeypatch.setenv(variable, empty)
    assert (ServiceSettings(), WebhookSettings()) == unset


def test_white_space_around_a_value_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets that orchestrators read from files often end with a line break."""
    monkeypatch.setenv("AFTERIMAGE_LINK_SECRET", "l" * 32 + "\n")
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS_DIR", " /weights ")
    settings = ServiceSettings()
    assert settings.link_secret is not None
    assert settings.link_secret.get_secret_value() == "l" * 32
    assert settings.weights_dir == Path("/weights")


def test_an_empty_variable_does_not_hide_a_secret_file_and_an_empty_file_is_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "AFTERIMAGE_LINK_SECRET").write_text(32 * "l")
    (tmp_path / "AFTERIMAGE_MAX_BYTES").write_text("\n")
    monkeypatch.setenv("AFTERIMAGE_LINK_SECRET", "")
    settings = ServiceSettings(_secrets_dir=tmp_path)
    assert settings.link_secret is not None
    assert settings.max_bytes == ServiceSettings.model_fields["max_bytes"].default


def test_empty_api_keys_are_refused_and_do_not_open_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = "AFTERIMAGE_API_KEYS is empty; .* unset the variable"
    for name, empty in (("AFTERIMAGE_API_KEYS", " "), ("afterimage_api_keys", "")):
        with monkeypatch.context() as patch:
            patch.setenv(name, empty)
            with pytest.raises(ValidationError, match=wanted) as e:
                ServiceSettings()
            assert "\n" not in faults(e.value)
            assert ServiceSettings(api_keys=Path("keys.toml")).api_keys == Path("keys.toml")
    (tmp_path / "AFTERIMAGE_API_KEYS").write_text("")
    with pytest.raises(ValidationError, match=wanted):
        ServiceSettings(_secrets_dir=tmp_path)


@pytest.mark.parametrize("variable", ["AFTERIMAGE_SECRETS_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"])
def test_an_empty_folder_is_not_the_current_one(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "AFTERIMAGE_PREFIX").write_text("from the current folder")
    code = "from worker.settings import *; s = WorkerSettings(); print(s.prefix, s.cache_dir)"
    command = [sys.executable, "-P", "-c", code]
    environment = os.environ | {variable: "", "AFTERIMAGE_CACHE_DIR": ""}
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    prefix, folder = out.stdout.split()
    assert prefix == "afterimage"
    assert Path(folder).is_absolute()


def test_libraries_and_child_processes_see_no_empty_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("AFTERIMAGE_CACHE_DIR", "AFTERIMAGE_THREADS", "CACHE_REDIS_URL", "NUMBA_CACHE_DIR")
    for name in (*names, "AFTERIMAGE_GS_PRECISION", "CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
    worker_settings.prepare_process(WorkerSettings(cache_dir=tmp_path))
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "numba")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "CACHE_REDIS_URL" not in os.environ
    assert "AFTERIMAGE_THREADS" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # means: no device


def test_an_empty_cache_folder_does_not_put_compiled_networks_in_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CACHE_DIR", "")
    assert openvino_synthesis._cache_folder() is None


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://a.example", ("https://a.example",)),
        ("https://a.example, http://b:8080,", ("https://a.example", "http://b:8080")),
        ('["https://a.example", "http://b:8080"]', ("https://a.example", "http://b:8080")),
        ("*", ("*",)),
        ("[]", ()),
    ],
)
def test_a_list_may_be_written_with_commas_or_as_json(
    text: str, origins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CORS_ORIGINS", text)
    assert ServiceSettings().cors_origins == origins
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_RETRIES_S", "1, 2.5")
    assert WebhookSettings().webhook_retries_s == (1, 2.5)


@pytest.mark.parametrize("text", ["a.example", "https://a/", '["https://a"', "[1]", '{"a": 1}'])
def test_a_wrong_list_of_origins_is_named_and_says_what_is_wanted(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_CORS_ORIGINS", text)
    with pytest.raises(ValidationError) as e:
        ServiceSettings()
    message = faults(e.value)
    assert message.startswith(f"AFTERIMAGE_CORS_ORIGINS is {text!r}: give origins such as https:")
    assert message.endswith("separated by commas or as a JSON list")


@pytest.mark.parametrize("text", ["5;30", "5,soon", "-1", "[5,", "1e9"])
def test_a_wrong_list_of_retries_says_what_is_wanted(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_RETRIES_S", text)
    with pytest.raises(ValidationError) as e:
        WebhookSettings()
    assert "give numbers of seconds from 0 to 86400, separated by commas" in faults(e.value)


def test_the_error_of_a_secret_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_LINK_SECRET", "too-short")
    with pytest.raises(ValidationError) as e:
        ServiceSettings()
    assert faults(e.value).startswith("AFTERIMAGE_LINK_SECRET: ")
    assert "too-short" not in f"{e.value}{faults(e.value)}"


def test_objects_created_while_loading_are_exempt_from_garbage_collection() -> None:
    before = gc.get_freeze_count()
    with without_garbage_collection():
        assert not gc.isenabled()
        loaded = [{} for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded)
    gc.unfreeze()
