"""Any text is an address that comes back from its one spelling, or a typed error."""

from p2pmoe.errors import ConfigurationError
from p2pmoe.wire.address import Address

MAX_INPUT = 320  # bytes; an address has at most 300 characters
SEEDS = [b"a" * 301, b"host", b"[::1]", b"host:", b"[::1]:/7f3c91ab"]


def check_without_port(text: str) -> None:
    """What is no address may be one without its port."""
    try:
        address = Address.parse(text, default_port=1)
    except ConfigurationError:
        return
    assert address.port == 1
    assert Address.parse(str(address)) == address


def fuzz_one(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        address = Address.parse(text)
    except ConfigurationError as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) < 400
        check_without_port(text)
        return
    assert Address.parse(text, default_port=1) == address
    shown = str(address)
    assert shown.isascii()
    assert shown.isprintable()
    assert 0 <= address.port <= 65535
    assert Address.parse(shown) == address
    assert str(Address.parse(shown)) == shown
