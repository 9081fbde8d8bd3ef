"""The benchmarks with real processes, each as short as it can be: that they work, not how fast."""

import json
import subprocess
import sys

import pytest

ITEMS = {
    "rpc": ["--hidden", "64", "--batch", "16", "--concurrency", "1,4", "--seconds", "0.2"],
    "moe": ["--grid", "2x4", "--hidden", "16", "--batches", "8", "--seconds", "1"],
    "beam": ["--grid", "2x4", "--hidden", "16", "--batches", "8"],
    "dht": ["--peers", "4", "--keys", "4", "--width", "4"],
    "startup": ["--hidden", "64"],
    "local": ["--seconds", "0.1", "--batches", "8"],
}


def bench(*words):
    command = [sys.executable, "-m", "p2pmoe", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.soak
@pytest.mark.parametrize("item", ITEMS)
def test_an_item_prints_its_line(item):
    printed = [json.loads(line) for line in bench(item, *ITEMS[item], "--json").splitlines()]
    assert printed
    assert all(set(line) == {"bench", "system", "params", "metrics", "host"} for line in printed)
    assert "errors" not in json.dumps([line["metrics"] for line in printed])


@pytest.mark.soak
def test_every_value_is_read_after_a_third_of_the_peers_was_killed():
    (line,) = bench("dht", *ITEMS["dht"], "--kill-third", "both", "--json").splitlines()
    metrics = json.loads(line)["metrics"]
    later = [name for name in metrics if "after_kill" in name or "later" in name]
    assert len(later) == 3
    assert all(metrics[name]["success"] == 1 for name in later)
