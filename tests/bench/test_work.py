"""What benchmarks share: statistics, threads that call in a loop, and the line they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.bench import work
from p2pmoe.errors import CallTimeout


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 100))
def test_a_percentile_is_a_value_with_so_many_at_or_below_it(values, q):
    found = work.percentile(values, q)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * q / 100


def test_without_values_there_is_no_percentile_and_no_mean():
    assert work.percentile([], 50) is None
    assert work.latency_summary([]) == {"n": 0, "p50_ms": None, "p99_ms": None, "mean_ms": None}


def test_latencies_are_told_in_milliseconds():
    summary = work.latency_summary([0.001, 0.003, 0.002])
    assert summary == {"n": 3, "p50_ms": 2.0, "p99_ms": 3.0, "mean_ms": 2.0}


def test_a_line_names_the_work_and_the_host_and_is_json():
    line = work.record("expert_rpc", {"batch": 1}, {"n": 2})
    assert json.loads(json.dumps(line)) == line
    assert line["system"] == "p2pmoe"
    assert line["host"]["cores"] == os.cpu_count()


def test_every_thread_calls_at_least_once():
    tally = work.hammer(lambda: None, threads=3, seconds=0.0)
    assert len(tally.latencies) >= 3
    assert tally.failures() == {}


def test_a_call_that_fails_is_counted_and_the_first_reason_kept():
    def call() -> None:
        raise CallTimeout("too late")

    tally = work.hammer(call, threads=2, seconds=0.0)
    assert tally.failures()["errors"] >= 2
    assert tally.failures()["first_error"] == "CallTimeout: too late"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells it")
def test_a_process_is_weighed_with_its_children():
    found = work.memory_of(os.getpid())
    assert found["processes"] >= 1
    assert 1 < found["pss_mib"] <= found["rss_mib"]
    assert work.cpu_seconds(os.getpid()) > 0


def test_what_another_systems_half_uses_loads_none_of_our_libraries():
    code = "import sys, p2pmoe.bench.work; print({'trio', 'torch', 'cbor2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
