"""Addresses: every spelling that people use, one spelling in print, and a reason for the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import ConfigurationError
from p2pmoe.identity import PeerId
from p2pmoe.wire.address import MAX_TEXT, Address
from tests.strategies import addresses

ID = "7f3c91ab" * 8


@given(addresses)
def test_an_address_comes_back_from_its_text(address):
    assert Address.parse(str(address)) == address


@given(st.text(max_size=60) | st.text("0123456789abcdef:./[]%p-tc", max_size=60))
def test_any_text_is_an_address_with_one_spelling_or_a_typed_error(text):
    try:
        address = Address.parse(text)
    except ConfigurationError as error:
        assert str(error).isprintable()
    else:
        assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("192.168.1.20:4747", "192.168.1.20:4747"),
        ("192.168.1.20:4747/7F3C91AB", "192.168.1.20:4747/7f3c91ab"),
        (f"home.example:80/{ID}", f"home.example:80/{ID}"),
        ("localhost:0", "localhost:0"),
        ("under_score.example.:65535", "under_score.example.:65535"),
        ("[::1]:4747", "[::1]:4747"),
        ("[2001:DB8:0:0::1]:1/7f3c91ab", "[2001:db8::1]:1/7f3c91ab"),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1:1"),
        ("[fe80::1%eth0]:1", "[fe80::1%eth0]:1"),
        ("a:00080", "a:80"),
        ("/ip4/10.0.0.1/tcp/4747", "10.0.0.1:4747"),
        (f"/ip4/10.0.0.1/tcp/4747/p2p/{ID}", f"10.0.0.1:4747/{ID}"),
        ("/ip6/2001:db8::1/tcp/4747", "[2001:db8::1]:4747"),
        ("/dns/home.example/tcp/4747", "home.example:4747"),
        ("/dns4/home.example/tcp/4747", "home.example:4747"),
        ("/dns6/home.example/tcp/4747", "home.example:4747"),
    ],
)
def test_an_address_is_shown_in_one_spelling(text, shown):
    assert str(Address.parse(text)) == shown


PORT = "the port is a number"
HOST = "the host is no name and no IP address"
PEER = "a peer id is given by its first 8 to 64 hex digits"
MULTIADDR = "only /ip4|ip6|dns/HOST/tcp/PORT[/p2p/ID] is known"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", PORT),
        ("host", PORT),
        ("host:", PORT),
        ("host:-1", PORT),
        ("host:65536", PORT),
        ("host:1e3", PORT),
        ("host:\u0661", PORT),
        ("host:" + "0" * 200 + "1", PORT),
        (":1", HOST),
        ("a b:1", HOST),
        ("a..b:1", HOST),
        ("-a.example:1", HOST),
        ("a.example/:1", PORT),
        ("\u00e4.example:1", HOST),
        ("host\n:1", HOST),
        ("a" * 64 + ":1", HOST),
        (".".join(["a" * 50] * 5) + ":1", HOST),
        ("1.2.3:1", HOST),
        ("1.2.3.4.5:1", HOST),
        ("256.1.1.1:1", HOST),
        ("1.2.3.4.:1", HOST),
        ("127.1:1", HOST),
        ("0x7f000001:1", HOST),
        ("example.0x7f:1", HOST),
        ("[]:1", HOST),
        ("::1:4747", "an IPv6 address stands in brackets"),
        ("[::1:4747", "the bracket of the IPv6 address does not close"),
        ("[::1]4747", "the bracket of the IPv6 address does not close"),
        ("[fe80::1%\x1b[2J]:1", "the zone of the IPv6 address is no interface"),
        ("[fe80::1%]:1", HOST),
        ("host:1/7f3c91a", PEER),
        (f"host:1/{ID}0", PEER),
        ("host:1/7f3c91ag", PEER),
        ("host:1/7f3c91ab/", PEER),
        ("/ip4/10.0.0.1/udp/4747", MULTIADDR),
        ("/ip4/10.0.0.1/tcp/4747/quic/x", MULTIADDR),
        ("/ip4/10.0.0.1/tcp/4747/p2p", MULTIADDR),
        ("/unix/10.0.0.1/tcp/4747", MULTIADDR),
        ("/", MULTIADDR),
        ("/ip4/10.0.0.1/tcp/x", PORT),
        ("/ip4/10.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", PEER),
    ],
)
def test_what_is_no_address_is_refused_with_its_reason(text, complaint):
    with pytest.raises(ConfigurationError) as caught:
        Address.parse(text)
    assert complaint in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_long_text_is_refused_before_it_is_looked_at():
    with pytest.raises(ConfigurationError, match="at most 300 characters"):
        Address.parse("a" * (MAX_TEXT + 1))


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.1:", "[::1]", "[::1]:"])
def test_a_port_may_be_left_out_where_there_is_a_usual_one(text):
    assert Address.parse(text, default_port=4747).port == 4747
    with pytest.raises(ConfigurationError, match=PORT):
        Address.parse(text)
    assert Address.parse("a:1", default_port=4747).port == 1


def test_an_address_matches_the_peers_whose_id_begins_so():
    peer = PeerId(bytes.fromhex(ID))
    for prefix in ("", "7f3c91ab", ID):
        assert Address("a", 1, prefix).matches(peer)
    assert not Address("a", 1, "7f3c91ac").matches(peer)


@pytest.mark.parametrize(
    ("host", "is_global"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.1.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("home.example", False),
    ],
)
def test_an_address_knows_whether_it_is_of_the_public_internet(host, is_global):
    address = Address.parse(f"[{host}]:1")
    assert address.is_global == is_global
