"""What every fuzz harness begins with goes through it, without atheris."""

import importlib
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fuzz import dictionary, run, seeds
from p2pmoe.net.messages import Header
from p2pmoe.wire import cbor

FUZZ = Path(__file__).parent.parent / "fuzz"
HARNESSES = run.names()


def harness(name):
    return importlib.import_module(f"fuzz.fuzz_{name}")


@pytest.mark.parametrize("name", HARNESSES)
def test_the_seeds_of_a_harness_pass_it(name):
    chosen = seeds.seeds(name)
    assert len(chosen) >= 8
    for seed in chosen:
        harness(name).fuzz_one(seed)


@pytest.mark.parametrize("name", HARNESSES)
def test_a_harness_takes_the_shortest_inputs(name):
    harness(name).fuzz_one(b"")
    for byte in range(256):
        harness(name).fuzz_one(bytes([byte]))


def test_every_folder_of_the_corpus_has_a_harness_and_short_inputs():
    folders = {folder.name: sorted(folder.iterdir()) for folder in FUZZ.glob("corpus/*")}
    assert set(folders) <= set(HARNESSES)
    assert sum(map(len, folders.values())) <= 300
    for name, paths in folders.items():
        assert all(path.stat().st_size <= seeds.longest(name) for path in paths)


def test_the_dictionary_speaks_of_every_field_and_tag():
    words = set(dictionary.entries())
    assert {cbor.dumps(text) for text in ("incarnation", "hello", "bfloat16", "lease")} <= words
    for message in dictionary.messages():
        assert {cbor.dumps(field) for field in message.__struct_encode_fields__} <= words
    lines = dictionary.words().splitlines()
    assert len(lines) == len(set(lines))
    for line in lines:
        assert bytes.fromhex(line.strip('"').replace("\\x", "")) in words


def test_the_runner_lists_the_harnesses_and_replays_a_file(tmp_path):
    program = [sys.executable, str(FUZZ / "run.py")]
    listed = subprocess.run([*program, "--list"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == HARNESSES
    (tmp_path / "one").write_bytes(b"\xa0")
    subprocess.run([*program, "cbor", "--replay", str(tmp_path / "one")], check=True)
    wrong = subprocess.run([*program, "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "cbor" in wrong.stderr


def spoken_of(kind):
    """The messages that a type may hold, at any depth."""
    found = {kind.cls} if isinstance(kind, msgspec.inspect.StructType) else set()
    inner = [field.type for field in getattr(kind, "fields", ())]
    inner += [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
    for name in ("item_type", "key_type", "value_type", "type"):
        inner += [getattr(kind, name)] if hasattr(kind, name) else []
    return found.union(*map(spoken_of, inner))


def test_every_message_is_read_by_a_harness():
    read = [Header, *(one for name in HARNESSES for one in getattr(harness(name), "MESSAGES", ()))]
    known = set().union(*(spoken_of(msgspec.inspect.type_info(one)) for one in read))
    assert set(dictionary.messages()) - known == set()


def test_the_harnesses_take_nearly_every_branch_of_what_reads_messages():
    done = subprocess.run(
        [sys.executable, str(FUZZ / "reach.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_finding_is_shrunk_to_what_makes_it_one(tmp_path):
    def fuzz_one(data):
        assert not (b"a" in data and b"z" in data)

    assert run.shrink(fuzz_one, b"--a----" * 40 + b"---z-") == b"az"
    assert run.failure(fuzz_one, b"az") == run.failure(fuzz_one, b"a.z")
    assert run.failure(fuzz_one, b"a") is None
    with pytest.raises(SystemExit, match="nothing to shrink"):
        run.shrink(fuzz_one, b"a")
