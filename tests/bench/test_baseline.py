"""The ratios to the machine's own limits: measured, compared with those that were kept."""

import pytest

from p2pmoe.bench import baseline
from p2pmoe.errors import ConfigurationError


def test_what_became_slower_by_more_than_a_tenth_is_named():
    kept = {"mixture": 0.5, "block": 0.9, "start": 0.6}
    *lines, verdict = baseline.differences(kept, {"mixture": 0.44, "block": 0.82, "new": 1.0})
    assert [line.split()[-1] for line in lines] == ["-12%", "-9%", "new"]
    assert verdict == "slower by more than 10%: mixture"


def test_that_nothing_became_slower_is_said_too():
    assert baseline.differences({"a": 1.0}, {"a": 2.0})[-1].startswith("nothing is slower")


def test_ratios_are_kept_in_a_file(tmp_path):
    file = tmp_path / "kept.json"
    assert baseline.read(file) == {}
    baseline.write(file, {"a": 0.25})
    assert baseline.read(file) == {"a": 0.25}


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', '{"a": null}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "kept.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match="cannot read ratios"):
        baseline.read(file)


def test_several_runs_count_by_their_medians():
    assert baseline.medians([{"a": 1.0}, {"a": 9.0}, {"a": 2.0}]) == {"a": 2.0}


def test_every_ratio_is_of_two_rates_of_one_run(monkeypatch):
    def steps(rate):
        return {"metrics": {f"train_batch{n}": {"steps_per_s": rate} for n in (64, 512)}}

    rows = {"samples_per_s": 90.0, "calls_per_s": 3.0}
    parts = ("forward_batch2048_c4", "train_batch2048_c4", "forward_batch1_c1")
    weight = {"total": {"pss_mib": 100.0}}
    weighed = {"first_forward_s": 4.0, "idle_server": weight, "idle_dht_peer": weight}
    block = {f"{n}_batch2048": {"samples_per_s": 100.0} for n in ("forward", "train_recompute")}
    monkeypatch.setattr(baseline.moe, "run", lambda params: steps(2.0))
    monkeypatch.setattr(baseline.local, "run_mixture", lambda params: steps(4.0))
    monkeypatch.setattr(baseline.local, "run_block", lambda params: {"metrics": block})
    monkeypatch.setattr(baseline.rpc, "run", lambda params: {"metrics": dict.fromkeys(parts, rows)})
    monkeypatch.setattr(baseline.footprint, "run", lambda params: {"metrics": weighed})
    monkeypatch.setattr(baseline, "IMPORT", "print(flush=True); input()")
    found = baseline.measure(0.01)
    assert found["mixture, 64 rows"] == found["mixture, 512 rows"] == 0.5
    assert found["block, forward"] == found["block, train"] == 0.9
    assert found["call of one row"] > 0
    assert found["start"] > 0
    assert found["memory of a server"] == found["memory of a peer"] > 0
