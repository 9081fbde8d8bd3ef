"""Hypothesis strategies for what crosses the wire."""

from hypothesis import strategies as st

from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.tensor import DTYPES, TensorDescriptor

NETWORK = bytes(range(32))

# ------------------------------------------------------------------ plain values of the profile
texts = st.text(max_size=20)
leaves = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=40) | texts
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(texts, inner, max_size=8),
    max_leaves=30,
)

# ------------------------------------------------------------------ addresses
_labels = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
hosts = st.one_of(
    st.lists(_labels, min_size=1, max_size=3).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: str(ip.ipv4_mapped or ip)),
)
prefixes = st.just("") | st.text("0123456789abcdef", min_size=8, max_size=64)
addresses = st.builds(Address, hosts, st.integers(0, 65535), prefixes)

# ------------------------------------------------------------------ messages
u16, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**63 - 1)
_dialled = st.builds(Address, hosts, st.integers(1, 65535)).map(str)
records = st.builds(
    PeerRecord,
    v=st.just(1),
    epoch=u64,
    incarnation=u64,
    addresses=st.lists(_dialled, max_size=4).map(tuple),
    version_min=st.integers(0, 5),
    version_max=st.integers(5, 9),
    capabilities=st.lists(st.text("abcde.-", max_size=24), max_size=3).map(tuple),
    grids=st.lists(st.text("abcde.-", max_size=24), max_size=3).map(tuple),
    meta=st.binary(max_size=64),
)
descriptors = st.builds(
    TensorDescriptor,
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
)

# ------------------------------------------------------------------ frames and cut streams
frames = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(max_size=40)), max_size=6)


@st.composite
def pieces(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """The same bytes, cut anywhere."""
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
