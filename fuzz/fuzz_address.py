"""Any text is an address that comes back from its one spelling, or a typed error."""

from p2pmoe.errors import ConfigurationError
from p2pmoe.wire.address import Address


def fuzz_one(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        address = Address.parse(text)
    except ConfigurationError as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) < 400
        return
    shown = str(address)
    assert shown.isascii()
    assert shown.isprintable()
    assert 0 <= address.port <= 65535
    assert Address.parse(shown) == address
    assert str(Address.parse(shown)) == shown
