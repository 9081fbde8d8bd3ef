"""The error tree: what each class is, what it keeps, and how it crosses the wire."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import errors
from p2pmoe.errors import MalformedMessage, P2PMoEError, PeerBusy, QuorumNotReached

TREE = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, P2PMoEError)
]
BUILTINS = {
    "CallTimeout": TimeoutError,
    "PeerUnreachable": ConnectionError,
    "ConnectionLost": ConnectionError,
    "ExpertUnavailable": LookupError,
    "SchemaMismatch": TypeError,
    "NonFiniteError": ArithmeticError,
    "RemoteError": RuntimeError,
    "NotAllowed": PermissionError,
    "LocalProtocolError": RuntimeError,
    "NodeClosed": RuntimeError,
    "ForkedProcessError": RuntimeError,
    "ConfigurationError": ValueError,
    "StateError": OSError,
    "KeyFileError": OSError,
    "AddressInUse": OSError,
    "SnapshotRefused": ValueError,
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_an_error_says_its_message_and_is_the_builtin_a_user_would_catch(error):
    raised = error("why it happened")
    assert str(raised) == "why it happened"
    assert isinstance(raised, BUILTINS.get(error.__name__, Exception))
    assert (raised.peer, raised.expert, raised.stage) == (None, None, None)
    assert (raised.address, raised.elapsed) == (None, None)


def test_every_class_but_the_root_has_a_code_of_its_own():
    codes = [error.code for error in TREE if error is not P2PMoEError]
    assert len(set(codes)) == len(codes)


def test_an_error_keeps_the_facts():
    raised = errors.PeerUnreachable(
        "no answer", peer="7f3c", expert="ffn.1", stage="tls", address="a:1", elapsed=0.5
    )
    assert (raised.peer, raised.expert, raised.stage) == ("7f3c", "ffn.1", "tls")
    assert (raised.address, raised.elapsed, raised.retryable) == ("a:1", 0.5, True)


def test_a_quorum_says_how_many_answered():
    raised = QuorumNotReached(answered=1, needed=3)
    assert str(raised) == "1 of 3 peers answered"
    assert (raised.answered, raised.needed) == (1, 3)


def test_a_malformed_message_keeps_its_code_apart_from_the_detail():
    assert str(MalformedMessage("cbor.tag")) == "cbor.tag"
    raised = MalformedMessage("cbor.tag", "tag 35")
    assert (str(raised), raised.why, raised.detail) == ("cbor.tag: tag 35", "cbor.tag", "tag 35")


@pytest.mark.parametrize("code", sorted(errors._BY_CODE))
def test_a_code_on_the_wire_becomes_its_error(code):
    error = errors.from_code(code, "the reason", peer="7f3c")
    assert error.code == code
    assert (str(error), error.peer, error.stage) == ("the reason", "7f3c", "call")


@pytest.mark.parametrize("code", ["internal", "", "exit", "local", "configuration", "key_file"])
def test_what_is_no_code_of_the_wire_is_a_failure_of_the_other_side(code):
    assert type(errors.from_code(code, "")) is errors.RemoteError


def test_a_busy_peer_says_when_to_come_back():
    error = errors.from_code("busy", "", stage="hello", retry_after=1.5)
    assert isinstance(error, PeerBusy)
    assert (error.retry_after, error.stage, error.retryable) == (1.5, "hello", True)
    assert not hasattr(errors.from_code("lease", "", retry_after=1.5), "retry_after")


@given(st.text(max_size=300))
def test_text_from_another_side_is_printable_and_short(text):
    shown = errors.printable(text)
    assert shown.isprintable()
    assert len(shown) <= 200
    assert str(errors.from_code("internal", text)) == shown


def test_control_characters_are_shown_as_escapes():
    assert errors.printable("a\n\x1b[2J\u202e") == r"a\n\x1b[2J\u202e"
    assert errors.printable("\n" * 100, 5) == r"\n\n" + "\\"
