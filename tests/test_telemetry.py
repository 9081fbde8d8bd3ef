"""Events and counters: what is printed, where, and that nothing a peer says is printed raw."""

import io
import json
import logging
import subprocess
import sys

import pytest
import structlog

from p2pmoe import telemetry


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch):
    monkeypatch.setattr(telemetry, "_counters", type(telemetry._counters)())
    monkeypatch.setattr(telemetry, "_own_log", None)


def printed_by(fmt, level="debug"):
    stream = io.StringIO()
    telemetry.configure(level, fmt, stream)
    return stream


def test_an_event_is_one_json_object_a_line():
    stream = printed_by("json")
    telemetry.emit("dht.lookup.finished", level="info", hops=3, peer=b"\x7f" * 32, ok=True, x=None)
    telemetry.emit("node.closed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first.pop("ts").endswith("Z")
    assert first == {
        "event": "dht.lookup.finished",
        "level": "info",
        "hops": 3,
        "peer": "7f" * 16,
        "ok": True,
        "x": None,
    }
    assert second["event"] == "node.closed"


def test_an_event_on_the_console_is_a_line_without_colour_off_a_terminal():
    stream = printed_by("console")
    telemetry.emit("dht.lookup.finished", level="warning", hops=3)
    assert stream.getvalue().endswith("dht.lookup.finished            hops=3\n")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("fmt", ["console", "json"])
def test_events_below_the_level_are_not_printed(fmt):
    stream = printed_by(fmt, "warning")
    telemetry.emit("quiet", level="info")
    telemetry.emit("quiet")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("fmt", ["console", "json"])
def test_text_of_peers_is_escaped_and_cut(fmt):
    stream = printed_by(fmt)
    telemetry.emit("hello", name="\n\x1b[2J" + "x" * 5000)
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue()) < 400


def test_an_error_without_words_is_shown_by_its_name():
    stream = printed_by("json")
    telemetry.emit("failed", error=ValueError(), other=ValueError("the width"))
    event = json.loads(stream.getvalue())
    assert (event["error"], event["other"]) == ("ValueError", "the width")


def test_the_stream_is_standard_error_unless_another_is_given(capsys):
    telemetry.configure("debug", "json")
    telemetry.emit("here")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["event"] == "here"
    assert captured.out == ""


def test_counters_add_up_by_name_and_labels():
    telemetry.count("p2pmoe_calls_total", side="client", op="forward")
    telemetry.count("p2pmoe_calls_total", op="forward", side="client")
    telemetry.count("p2pmoe_call_seconds", 0.5)
    assert telemetry.counters() == {
        'p2pmoe_calls_total{op="forward",side="client"}': 2,
        "p2pmoe_call_seconds": 0.5,
    }


PROGRAM = """
import structlog
{before}
from p2pmoe import telemetry
telemetry.emit("quiet", level="info")
telemetry.emit("loud", level="warning")
"""


def run_program(before):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )


def test_a_library_is_silent_below_warning_and_leaves_standard_output_alone():
    done = run_program("")
    assert done.stdout == ""
    assert "loud" in done.stderr
    assert "quiet" not in done.stderr


def test_what_the_program_configured_before_is_left_as_it_is():
    done = run_program("structlog.configure(processors=[structlog.processors.JSONRenderer()])")
    assert '{"event": "quiet"}' in done.stdout


def test_no_setting_of_the_process_is_touched():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, structlog.get_config())
    printed_by("json")
    telemetry.emit("anything", level="error")
    assert (list(root.handlers), root.level, structlog.get_config()) == before


# ------------------------------------------------------------------ what others can make us say
@pytest.fixture
def second(monkeypatch):
    """The clock that complaints are counted by; it stands still."""
    now = [1000.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telemetry, "_lines", type(telemetry._lines)())
    return now


def test_each_peer_can_cause_ten_lines_a_second_and_the_rest_is_counted(second):
    stream = printed_by("json")
    for _ in range(1000):
        telemetry.complain("8.8.8.8", "net.handshake.refused", why="bad")
    telemetry.complain("8.8.8.9", "net.handshake.refused", why="bad")
    assert len(stream.getvalue().splitlines()) == telemetry.LINES_EACH + 1
    dropped = 'p2pmoe_log_lines_dropped_total{event="net.handshake.refused"}'
    assert telemetry.counters()[dropped] == 990
    second[0] += 1.0
    telemetry.complain("8.8.8.8", "net.handshake.refused", why="bad")
    assert len(stream.getvalue().splitlines()) == telemetry.LINES_EACH + 2


def test_all_of_them_together_can_cause_a_hundred_lines_a_second(second):
    stream = printed_by("json")
    for number in range(1000):
        telemetry.complain(str(number), "net.handshake.refused")
    assert len(stream.getvalue().splitlines()) == telemetry.LINES_IN_ALL
    assert len(telemetry._lines) <= telemetry.LINES_IN_ALL
