"""The file of object stores, references, and local folders as stores."""

from pathlib import Path

import pytest

from models.errors import AfterimageError, ParameterError
from service import app
from service.settings import ServiceSettings
from tests.support.api_keys import guarded_settings
from worker.queue import object_config, object_stores, results
from worker.queue.object_config import StoresError
from worker.queue.object_stores import ObjectStores
from worker.queue.references import Reference, StoreForbidden, StoreNotFound
from worker.settings import WorkerSettings


def connect(file: Path, text: str, **settings: str) -> ObjectStores:
    file.write_text(text)
    file.chmod(0o644)
    return object_stores.connect(WorkerSettings(stores=file, **settings))  # type: ignore[arg-type]


@pytest.fixture
def folders(tmp_path: Path) -> ObjectStores:
    """Stores `in`, which may be read, `out`, which may be written, and `own` of the caller ann."""
    for name in ("in", "out", "own"):
        (tmp_path / name).mkdir()
    return connect(
        tmp_path / "stores.toml",
        f"""
        [stores.in]
        url = "file://{tmp_path}/in"
        [stores.out]
        url = "file://{tmp_path}/out"
        read = false
        write = true
        [stores.own]
        url = "file://{tmp_path}/own"
        write = true
        keys = ["ann"]
        """,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[stores.a", "not valid TOML"),
        ("", "stores: Field required"),
        ("[stores]", "stores: Dictionary should have at least 1 item"),
        ("[stores.a]", "stores.a.url: Field required"),
        ('[stores.a]\nurl = "s3://b"\nwritable = true', "stores.a.writable: Extra inputs"),
        ('[stores.a]\nurl = "s3://b"\nread = "yes"', "stores.a.read: Input should be a valid bool"),
        ('[stores.a]\nurl = "ftp://b"', "the scheme is 'ftp'; choose one of s3://, gs://"),
        ('[stores.a]\nurl = "memory:///"', "the scheme is 'memory'"),
        ('[stores.a]\nurl = "s3:///b"', "name the bucket: s3://BUCKET/PREFIX"),
        ('[stores.a]\nurl = "s3://key:secret@b"', "remove user, query and fragment"),
        ('[stores.a]\nurl = "file://srv"', "three slashes before an absolute path"),
        ('[stores."a b"]\nurl = "s3://b"', "the name 'a b' may hold only letters"),
        ('[stores.a]\nurl = "s3://b"\nkeys = []', "stores.a.keys: List should have at least 1"),
        ('[stores.a]\nurl = "s3://b"\noptions = { timeout = "9s" }', "set by Afterimage"),
        ('[stores.a]\nurl = "s3://b"\noptions = { colour = "red" }', "stores.a: "),
        ('[stores.a]\nurl = "file:///srv"\noptions = { region = "x" }', "stores.a: "),
        ('[stores.a]\nurl = "file:///no/such/folder"', "stores.a: "),
    ],
)
def test_a_wrong_file_of_stores_is_refused_with_the_field(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(StoresError) as caught:
        connect(tmp_path / "stores.toml", text)
    assert str(caught.value).startswith(str(tmp_path))
    assert said in str(caught.value)


def test_a_missing_file_of_stores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoresError, match="No such file"):
        object_config.read(tmp_path / "stores.toml")


def test_a_file_with_a_secret_must_not_be_readable_by_others(tmp_path: Path) -> None:
    text = '[stores.a]\nurl = "s3://b"\noptions = { secret_access_key = "hush", region = "x" }'
    with pytest.raises(StoresError, match="run chmod 600") as caught:
        connect(tmp_path / "stores.toml", text)
    assert "hush" not in str(caught.value)
    (tmp_path / "stores.toml").chmod(0o600)
    assert object_config.read(tmp_path / "stores.toml")["a"].url == "s3://b"


def test_all_options_of_the_http_client_and_of_s3_are_accepted(tmp_path: Path) -> None:
    options = 'region = "x", endpoint = "http://127.0.0.1:9", allow_http = true'
    text = f'[stores.a]\nurl = "s3://b/c"\noptions = {{ {options}, connect_timeout = "1s" }}'
    assert "a" in connect(tmp_path / "stores.toml", text).configs


def test_a_store_names_only_keys_that_exist(tmp_path: Path) -> None:
    file = tmp_path / "stores.toml"
    file.write_text(f'[stores.a]\nurl = "file://{tmp_path}"\nkeys = ["both", "nobody"]')
    keys = Path(guarded_settings(tmp_path)["AFTERIMAGE_API_KEYS"])
    with pytest.raises(StoresError, match="stores.a.keys: there is no API key 'nobody'; keys: bot"):
        app.create_app(ServiceSettings(stores=file, api_keys=keys))
    with pytest.raises(StoresError, match="'both'; keys: none; set AFTERIMAGE_API_KEYS"):
        app.create_app(ServiceSettings(stores=file))


def test_without_the_package_obstore_stores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(StoresError, match=r"pip install 'afterimage\[stores\]'"):
        connect(tmp_path / "stores.toml", f'[stores.a]\nurl = "file://{tmp_path}"')


@pytest.mark.parametrize(
    ("results_", "said"),
    [
        ("out", "AFTERIMAGE_RESULTS is 'out'; write store:NAME/KEY"),
        ("store:none/a", "must name the store 'none'"),
        ("store:in/a", "must name the store 'in', with read = true and write = true"),
    ],
)
def test_results_need_a_store_that_may_be_read_and_written(
    folders: ObjectStores, results_: str, said: str
) -> None:
    with pytest.raises(StoresError, match=said):
        results.connect(WorkerSettings(results=results_), folders)


def test_references_are_parsed() -> None:
    assert Reference.parse("store:a.b-c/d e/ü.webp", "source") == Reference("a.b-c", "d e/ü.webp")
    assert str(Reference("a", "b/c")) == "store:a/b/c"


@pytest.mark.parametrize(
    "text",
    [
        "", "a/b", "store:a", "store:/b", "store:a/", "s3://bucket/key", "file:///etc/passwd",
        "store:a/../b", "store:a/b/..", "store:a/./b", "store:a//b", "store:a//", "store:a/b/",
        "store:a/b\n", "store:a/b\0c", "store:a/b\x7f", "store:a/..\\b", "store:a/\ufffd",
        "store:../b", "store:a b/c", "store:a/" + 1025 * "b", "store:a/" + 513 * "ü",
    ],
)  # fmt: skip
def test_a_reference_that_is_no_plain_key_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="source"):
        Reference.parse(text, "source")


def test_a_store_of_others_looks_like_one_that_does_not_exist(folders: ObjectStores) -> None:
    own = Reference("own", "a")
    folders.check(own, "ann", "write")
    with pytest.raises(StoreNotFound) as caught:
        folders.check(own, "bob", "write")
    with pytest.raises(StoreNotFound) as missing:
        folders.check(Reference("none", "a"), "bob", "write")
    assert str(caught.value).replace("own", "none") == str(missing.value)


def test_reading_and_writing_are_allowed_one_by_one(folders: ObjectStores) -> None:
    folders.check(Reference("in", "a"), "bob", "read")
    folders.check(Reference("out", "a"), "bob", "write")
    with pytest.raises(StoreForbidden, match="'in' may not be written"):
        folders.check(Reference("in", "a"), "bob", "write")
    with pytest.raises(StoreForbidden, match="'out' may not be read"):
        folders.check(Reference("out", "a"), "bob", "read")


def test_a_folder_is_a_store_that_nothing_outside_is_read_from(
    folders: ObjectStores, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    for key in ("../secret", "%2e%2e/secret", "..%2fsecret", "/etc/passwd", "a/../../secret"):
        with pytest.raises(AfterimageError):
            folders.read(Reference("in", key), 100)
    ref = Reference("own", "a/b c.png")
    etag = folders.write(ref, b"data", "image/png", {"decode": "1"})
    assert (tmp_path / "own/a/b c.png").read_bytes() == b"data"
    head = folders.head(ref)
    assert head is not None and head.etag == etag
    assert folders.head(Reference("own", "a/c")) is None
