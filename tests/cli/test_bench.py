"""`p2pmoe bench`: its options reach the work, its lines are printed, two files are compared."""

import json
from types import SimpleNamespace

import pytest

from p2pmoe.bench import bare, baseline, dht, fault, footprint, local, moe, rpc
from p2pmoe.bench.table import BEGIN, END
from p2pmoe.cli.app import run
from p2pmoe.cli.bench import ITEMS

LINE = {"bench": "it", "system": "us", "metrics": {"x": {"a_ms": 2.0}, "start_s": 1.0}}


@pytest.fixture
def run_cli(capsys):
    """Run the command line; what it printed and the code it ended with."""

    def ran(*words):
        code = run([str(word) for word in words])
        said = capsys.readouterr()
        return SimpleNamespace(exit_code=code, stdout=said.out, stderr=said.err)

    return ran


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    asked = []

    def fake(params):
        asked.append(params)
        return LINE | {"params": {}, "host": {}}

    for module, name in [
        (rpc, "run"),
        (moe, "run"),
        (moe, "run_beam"),
        (dht, "run"),
        (footprint, "run"),
        (fault, "run"),
        (bare, "run"),
        (local, "run_block"),
        (local, "run_mixture"),
    ]:
        monkeypatch.setattr(module, name, fake)
    return asked


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_prints_a_line_or_a_table(run_cli, item):
    for line in run_cli("bench", item, "--json").stdout.splitlines():
        assert json.loads(line)["metrics"] == LINE["metrics"]
    table = run_cli("bench", item).stdout
    assert "a_ms" in table
    assert "start_s" in table


def test_options_are_those_of_the_work(run_cli, asked):
    run_cli("bench", "moe", "--grid", "4x8", "--batches", "16,32", "--runs", "2")
    assert [(one.grid, one.batches) for one in asked] == [((4, 8), (16, 32))] * 2
    run_cli("bench", "startup")
    assert asked[-1].skip_dht


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["rpc", "--peers", "4"], "this item has no --peers"),
        (["moe", "--batches", "many"], "not a list of whole numbers"),
        (["moe", "a-file"], "takes no files"),
        (["compare", "one"], "compare takes two files"),
        (["moe", "--plot", "a-file"], "only compare does"),
        (["moe", "--update"], "takes no files"),
        (["table"], "table takes a file"),
        (["baseline"], "baseline takes one file"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(run_cli, words, why):
    result = run_cli("bench", *words)
    assert result.exit_code == 2
    assert why in result.stderr


def test_two_files_are_compared_and_drawn(run_cli, tmp_path):
    theirs, ours, plot = tmp_path / "theirs", tmp_path / "ours", tmp_path / "plot.svg"
    for file, ms in ((theirs, 8.0), (ours, 2.0)):
        file.write_text(json.dumps(LINE | {"params": {}, "metrics": {"a_ms": ms}}))
    assert (
        "4 x  it  a_ms  8 -> 2" in run_cli("bench", "compare", theirs, ours, "--plot", plot).stdout
    )
    assert "<svg" in plot.read_text()
    (line,) = run_cli("bench", "compare", theirs, ours, "--json").stdout.splitlines()
    assert json.loads(line)["better"] == 4.0


def test_files_without_a_common_figure_are_a_bad_configuration(run_cli, tmp_path):
    (tmp_path / "a").write_text("")
    result = run_cli("bench", "compare", tmp_path / "a", tmp_path / "a")
    assert result.exit_code == 78


def test_a_table_is_printed_or_put_into_a_page(run_cli, tmp_path):
    lines, page = tmp_path / "lines", tmp_path / "page.md"
    lines.write_text("")
    head = run_cli("bench", "table", lines).stdout.splitlines()[0]
    assert head.startswith("| work |")
    page.write_text(f"{BEGIN}{END}")
    assert run_cli("bench", "table", lines, page).exit_code == 0
    assert head in page.read_text()


def test_ratios_are_compared_with_those_kept_and_kept_if_asked(run_cli, tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    found = iter([2.0, 1.0])
    monkeypatch.setattr(baseline, "measure", lambda seconds: {"a": next(found)})
    assert "nothing is slower" in run_cli("bench", "baseline", kept, "--update").stdout
    assert run_cli("bench", "baseline", kept).stdout.endswith("slower by more than 10%: a\n")
    assert baseline.read(kept) == {"a": 2.0}
