"""`afterimage keys` makes keys that the service knows."""

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
from service.cli import keys as keys_cli
from service.keys import KeysError


def run(*args: object) -> int:
    parser = argparse.ArgumentParser()
    keys_cli.add(parser)
    parsed = parser.parse_args(list(map(str, args)))
    code: int = parsed.run(parsed)
    return code


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The key, and what is on stdout."""
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    said, _, token = line.rpartition(" ")
    assert said == "The key, which is not shown again:"
    return token, out


def test_a_key_is_shown_once_and_its_table_is_to_append(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("new", "gallery") == 0
    token, table = shown(capsys)
    assert token.startswith("ai_") and len(token) == 46
    assert token not in table
    (tmp_path / "keys.toml").write_text(f"# ours\n\n{table}")
    found = Keys.read(tmp_path / "keys.toml").find(token)
    assert found == Caller("gallery", frozenset({"decode"}))


def test_a_key_has_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "new press@home --scopes decode,encode --requests-per-minute 60 --jobs-at-once 4"
    assert run(*shlex.split(asked), "--expires", "2099-12-31") == 0
    token, table = shown(capsys)
    (entry,) = tomllib.loads(table)["keys"]
    assert entry == {
        "name": "press@home",
        "sha256": keys.digest(token),
        "scopes": ["decode", "encode"],
        "requests_per_minute": 60,
        "jobs_at_once": 4,
        "expires": date(2099, 12, 31),
    }


def test_keys_are_appended_to_a_file_that_only_its_owner_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    made = {}
    for name in ("one", "two", "three"):
        assert run("new", name, "--file", path) == 0
        made[name], out = shown(capsys)
        assert out == ""
        assert path.stat().st_mode & 0o777 == 0o600
    known = Keys.read(path)
    for name, token in made.items():
        found = known.find(token)
        assert found is not None and found.name == name
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "keys.toml", tmp_path / "link.toml"
    path.write_text("# kept by hand")
    path.chmod(0o640)
    link.symlink_to(path)
    assert run("new", "gallery", "--file", link) == 0
    assert path.read_text().startswith("# kept by hand\n\n[[keys]]\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert Keys.read(link).find(shown(capsys)[0]) is not None


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: run("new", f"key{n}", "--file", path), range(16)))
    names = {key.name for key in keys.read(path)}
    assert names == {f"key{n}" for n in range(16)}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("'two words'", "name: String should match"),
        ("gallery --scopes decode,all", "scopes.1: Input should be 'decode'"),
        ("gallery --scopes ''", "scopes.0: Input should be"),
        ("gallery --jobs-at-once 0", "jobs_at_once: Input should be greater"),
        ("gallery --requests-per-minute -5", "requests_per_minute: Input should be greater"),
        ("gallery --expires 2020-01-01", "2020-01-01 is over"),
    ],
)
def test_wrong_use_is_named_and_shows_no_key(
    args: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(KeysError, match=said) as caught:
        run("new", *shlex.split(args), "--file", path)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert not path.exists()


@pytest.mark.parametrize("content", [b"[[keys]", b"\xff", b"[[keys]]\nname = 3\n"])
def test_a_wrong_file_is_left_alone(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(content)
    with pytest.raises(AfterimageError, match="keys.toml: "):
        run("new", "gallery", "--file", path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr() == ("", "")


def test_a_date_is_a_date(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("new", "gallery", "--expires", "soon")
    assert "--expires" in capsys.readouterr().err
