"""`key` and `version`: what they print, for people and as JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from p2pmoe.cli.app import run
from p2pmoe.version import __version__


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("P2PMOE_HOME", str(tmp_path))


def test_a_key_is_made_once_and_is_its_owners_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["key", "--json"]) == 0
    first = capsys.readouterr()
    facts = json.loads(first.out)
    assert "made a new key" in first.err
    assert Path(facts["file"]).stat().st_mode & 0o777 == 0o600
    assert hashlib.sha256(bytes.fromhex(facts["public_key"])).hexdigest() == facts["peer"]

    assert run(["key"]) == 0
    second = capsys.readouterr()
    assert second.err == ""
    assert facts["public_key"] in second.out
    assert facts["peer"] in second.out


def test_a_key_of_another_folder_is_another_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = []
    for folder in ("a", "b"):
        assert run(["key", "--state_dir", str(tmp_path / folder), "--json"]) == 0
        peers.append(json.loads(capsys.readouterr().out)["peer"])
    assert len(set(peers)) == 2


def test_a_key_file_that_is_no_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "key.pem").write_text("nonsense")
    assert run(["key"]) == 73
    assert "key.pem is not a key" in capsys.readouterr().err


def test_versions_are_printed_for_people_and_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"p2pmoe    {__version__}\n")
    assert run(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"p2pmoe", "protocol", "python", "torch", "trio", "platform"}
    assert facts["protocol"] == 1
