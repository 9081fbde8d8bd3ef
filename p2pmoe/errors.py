"""The one error tree: who is to blame, what then, and the facts as attributes.

Each class is also the builtin that a user would catch, and carries the code that names it on
the wire. A message is one line and says which stage, which address or field, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class P2PMoEError(Exception):
    """Root of the tree. Every attribute is `None` where it is not known.

    `peer`, `expert` and `address` are text for people, `stage` is one of resolve, connect, tls,
    hello, call, and `elapsed` is in seconds. `retryable` says whether the same call may succeed
    later without a change on this side.
    """

    code: ClassVar[str] = "internal"
    retryable: bool = False

    def __init__(
        self,
        message: str = "",
        *,
        peer: str | None = None,
        expert: str | None = None,
        stage: str | None = None,
        address: str | None = None,
        elapsed: float | None = None,
    ) -> None:
        super().__init__(message)
        self.peer, self.expert, self.stage = peer, expert, stage
        self.address, self.elapsed = address, elapsed


# ------------------------------------------------------------------ the network or the other side
class CallTimeout(P2PMoEError, TimeoutError):
    """No answer by the deadline. Retry, or give it more time."""

    code = "timeout"
    retryable = True


class PeerUnreachable(P2PMoEError, ConnectionError):
    """A peer cannot be reached; `stage` says how far it went. Check its address, or wait."""

    code = "unreachable"
    retryable = True
    retry_after: float | None = None  # seconds until this side dials again, where known


class ConnectionLost(PeerUnreachable):
    """A connection ended while a call was on its way. Whether the call ran is unknown."""

    code = "lost"


class ExpertUnavailable(P2PMoEError, LookupError):
    """Nobody serves this expert, or too few serve this grid. Wait for servers, or start one."""

    code = "unavailable"
    retryable = True


class SchemaMismatch(P2PMoEError, TypeError):
    """A tensor does not have the width, dtype or count that the expert declares. Fix the call."""

    code = "schema"


class NonFiniteError(P2PMoEError, ArithmeticError):
    """NaN or infinity where a number is needed. Look at the inputs, or lower the learning rate."""

    code = "nonfinite"


class RemoteError(P2PMoEError, RuntimeError):
    """The other side failed for a reason of its own. Its log says more."""

    code = "internal"


class NotAllowed(P2PMoEError, PermissionError):
    """The other side does not let this peer in, or is not who was dialled."""

    code = "not_allowed"


class VersionMismatch(P2PMoEError):
    """No protocol version is common to both sides. Upgrade the older one."""

    code = "version"


class PeerBusy(P2PMoEError):
    """The other side has no room now. Try again after `retry_after` seconds, or elsewhere."""

    code = "busy"
    retryable = True
    retry_after: float | None = None


class ExpertPaused(PeerBusy):
    """One expert of the other side rests, because it ran too long. Its other experts do not."""

    code = "paused"


class LeaseLost(P2PMoEError):
    """The server no longer holds the lease that the call names. Look the expert up again."""

    code = "lease"
    retryable = True


class QuorumNotReached(P2PMoEError):
    """Too few peers answered in time. Nobody misbehaved: retry, or ask for fewer."""

    code = "quorum"
    retryable = True

    def __init__(self, message: str = "", *, answered: int = 0, needed: int = 0) -> None:
        super().__init__(message or f"{answered} of {needed} peers answered")
        self.answered, self.needed = answered, needed


# ------------------------------------------------------------------ somebody broke the rules
class RemoteProtocolError(P2PMoEError):
    """The other side broke the protocol. Its connection is closed."""

    code = "protocol"


class MalformedMessage(RemoteProtocolError):
    """Bytes that no honest peer sends. `why` is a stable dotted code, such as `cbor.trailing`."""

    code = "malformed"

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(f"{why}: {detail}" if detail else why)
        self.why, self.detail = why, detail


class LocalProtocolError(P2PMoEError, RuntimeError):
    """The caller asked for something that the protocol forbids. Fix the caller."""

    code = "local"


# ------------------------------------------------------------------ this process
class NodeClosed(P2PMoEError, RuntimeError):
    """The node or swarm was closed. Open a new one."""

    code = "closed"


class ForkedProcessError(P2PMoEError, RuntimeError):
    """A swarm was used in a forked child. Connect again there, or start workers by spawning."""

    code = "forked"


class ConfigurationError(P2PMoEError, ValueError):
    """An option, file or grid does not make sense; the message names it."""

    code = "configuration"


class DuplicateIdentity(P2PMoEError, RuntimeError):
    """Another process uses this node's key. Stop one of them."""

    code = "duplicate_identity"


class StateError(P2PMoEError, OSError):
    """The state folder cannot be made, or another process uses it."""

    code = "state"


class KeyFileError(StateError):
    """A key file cannot be read, or is not a key."""

    code = "key_file"


class SnapshotRefused(P2PMoEError, ValueError):
    """A saved expert is damaged, not the one that its owner signed, or of another expert.

    `why` is a stable code: size, hash, header, tensors, finite or statement. The next older
    snapshot is used instead.
    """

    code = "snapshot"

    def __init__(self, why: str, detail: str = "") -> None:
        super().__init__(f"{why}: {detail}" if detail else why)
        self.why, self.detail = why, detail


class AddressInUse(P2PMoEError, OSError):
    """Something else listens on this port. Choose another one, or stop it."""

    code = "address_in_use"


# What one side may make the other side raise. Anything else arrives as RemoteError.
_ON_THE_WIRE: tuple[type[P2PMoEError], ...] = (
    CallTimeout,
    ExpertUnavailable,
    SchemaMismatch,
    NonFiniteError,
    NotAllowed,
    VersionMismatch,
    PeerBusy,
    ExpertPaused,
    LeaseLost,
    QuorumNotReached,
    RemoteProtocolError,
    NodeClosed,
)
_BY_CODE = {error.code: error for error in _ON_THE_WIRE}
_DETAIL_LENGTH = 200  # characters of another side's text that are kept; a guess


def printable(text: str, length: int = _DETAIL_LENGTH) -> str:
    """Text from another side, with control characters escaped and its length bounded."""
    text = text[:length]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:length]


def from_code(
    code: str,
    detail: str,
    *,
    peer: str | None = None,
    stage: str | None = "call",
    retry_after: float | None = None,
) -> P2PMoEError:
    """The typed error for a failure that another side reports; `retry_after` is in seconds."""
    error = _BY_CODE.get(code, RemoteError)(printable(detail))
    error.peer, error.stage = peer, stage
    if isinstance(error, PeerBusy):
        error.retry_after = retry_after
    return error
