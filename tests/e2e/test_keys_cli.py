"""`afterimage keys new` creates keys that the service accepts."""

import argparse
import shlex
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest

from models.errors import AfterimageError
from service import keys
from service.auth import Caller, Keys
from service.cli import keys as cli
from service.keys import KeysError


def run(*args: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add(parser.add_subparsers())
    parsed = parser.parse_args(["keys", *map(str, args)])
    code: int = parsed.run(parsed)
    return code


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The key from stderr, and the text on stdout."""
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    label, _, token = line.rpartition(" ")
    assert label == "The key, which is not shown again:"
    return token, out


def test_a_key_is_printed_once_with_an_entry_for_the_key_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("new", "gallery") == 0
    token, table = printed(capsys)
    assert token.startswith("ai_") and len(token) == 46
    assert token not in table
    (tmp_path / "keys.toml").write_text(f"# a comment\n\n{table}")
    caller = Keys.read(tmp_path / "keys.toml").find(token)
    assert caller == Caller("gallery", frozenset({"decode"}))


def test_every_option_is_a_field_of_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    options = "new press@home --scopes decode,encode --requests-per-minute 60 --jobs-at-once 4"
    options += " --priority batch --weight 2.5"
    assert run(*shlex.split(options), "--expires", "2099-12-31") == 0
    token, table = printed(capsys)
    (entry,) = tomllib.loads(table)["keys"]
    assert entry == {
        "name": "press@home",
        "sha256": keys.digest(token),
        "scopes": ["decode", "encode"],
        "requests_per_minute": 60,
        "jobs_at_once": 4,
        "priority": "batch",
        "weight": 2.5,
        "expires": date(2099, 12, 31),
    }


def test_keys_are_appended_to_a_file_that_only_its_owner_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    tokens = {}
    for name in ("one", "two", "three"):
        assert run("new", name, "--file", path) == 0
        tokens[name], out = printed(capsys)
        assert out == ""
        assert path.stat().st_mode & 0o777 == 0o600
    stored = Keys.read(path)
    for name, token in tokens.items():
        caller = stored.find(token)
        assert caller is not None and caller.name == name
    assert list(tmp_path.iterdir()) == [path]


def test_appending_keeps_comments_layout_mode_and_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, link = tmp_path / "keys.toml", tmp_path / "link.toml"
    path.write_text("# by hand")
    path.chmod(0o640)
    link.symlink_to(path)
    assert run("new", "gallery", "--file", link) == 0
    assert path.read_text().startswith("# by hand\n\n[[keys]]\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert Keys.read(link).find(printed(capsys)[0]) is not None


def test_keys_created_at_the_same_time_are_all_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: run("new", f"key{n}", "--file", path), range(16)))
    names = {key.name for key in keys.read(path)}
    assert names == {f"key{n}" for n in range(16)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("'two words'", "name: String should match"),
        ("gallery --scopes decode,all", "scopes.1: Input should be 'decode'"),
        ("gallery --scopes ''", "scopes.0: Input should be"),
        ("gallery --jobs-at-once 0", "jobs_at_once: Input should be greater"),
        ("gallery --requests-per-minute -5", "requests_per_minute: Input should be greater"),
        ("gallery --expires 2020-01-01", "2020-01-01 is in the past"),
    ],
)
def test_wrong_options_are_an_error_and_print_no_key(
    args: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(KeysError, match=message) as caught:
        run("new", *shlex.split(args), "--file", path)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert not path.exists()


@pytest.mark.parametrize("content", [b"[[keys]", b"\xff", b"[[keys]]\nname = 3\n"])
def test_an_invalid_key_file_is_not_changed(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(content)
    with pytest.raises(AfterimageError, match="keys.toml: "):
        run("new", "gallery", "--file", path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr() == ("", "")


def test_expires_must_be_a_date(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("new", "gallery", "--expires", "soon")
    assert "--expires" in capsys.readouterr().err
