"""Every seed of the fuzz corpus goes through its harness, without atheris."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "fuzz"
HARNESSES = sorted(path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.py"))
SEEDS = sorted(path for path in FUZZ.glob("corpus/*/*") if path.is_file())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_seed_passes_its_harness(seed):
    harness = importlib.import_module(f"fuzz.fuzz_{seed.parent.name}")
    harness.fuzz_one(seed.read_bytes())


@pytest.mark.parametrize("name", HARNESSES)
def test_a_harness_takes_the_shortest_inputs_and_has_seeds(name):
    harness = importlib.import_module(f"fuzz.fuzz_{name}")
    harness.fuzz_one(b"")
    for byte in range(256):
        harness.fuzz_one(bytes([byte]))
    assert any(seed.parent.name == name for seed in SEEDS)


def test_every_folder_of_seeds_has_a_harness():
    assert {seed.parent.name for seed in SEEDS} == set(HARNESSES)


def test_the_runner_lists_the_harnesses_and_replays_a_file():
    run = [sys.executable, str(FUZZ / "run.py")]
    listed = subprocess.run([*run, "--list"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == HARNESSES
    subprocess.run([*run, "cbor", "--replay", str(SEEDS[0])], check=True)
    wrong = subprocess.run([*run, "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "cbor" in wrong.stderr
