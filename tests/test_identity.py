"""Keys, ids and distances; keys that nobody may have; key files."""

import hashlib
import itertools
import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import identity
from p2pmoe.errors import ConfigurationError, KeyFileError, MalformedMessage
from p2pmoe.identity import KeyPair, PeerId, check_public_key, distance, verify

P = identity.FIELD_PRIME
D = -121665 * pow(121666, -1, P) % P  # RFC 8032, section 5.1
L = 2**252 + 27742317777372353535851937790883648493  # the order of the base point, same section

# RFC 8032, section 7.1: secret key, public key, message, signature
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_keys_and_signatures_are_those_of_rfc_8032(seed, public, message, signature):
    keys = KeyPair.from_seed(bytes.fromhex(seed))
    assert keys.public_key.hex() == public
    assert keys.sign(bytes.fromhex(message)).hex() == signature
    assert check_public_key(keys.public_key) == keys.public_key
    assert verify(keys.public_key, bytes.fromhex(signature), bytes.fromhex(message))
    assert not verify(keys.public_key, bytes.fromhex(signature), b"another message")


def test_a_signature_has_one_form_only():
    keys = KeyPair.from_seed(bytes(32))
    signature = keys.sign(b"message")
    s = int.from_bytes(signature[32:], "little")
    assert not verify(keys.public_key, signature[:32] + (s + L).to_bytes(32, "little"), b"message")
    assert not verify(keys.public_key, signature[:-1], b"message")
    assert not verify(keys.public_key[:-1], signature, b"message")


# ------------------------------------------------------------------ keys that nobody may have
def _x_of(y):
    """Both x coordinates of a point with this y, or none (RFC 8032, section 5.1.3)."""
    x2 = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(x2, (P + 3) // 8, P)
    if x * x % P != x2:
        x = x * pow(2, (P - 1) // 4, P) % P
    return sorted({x, P - x} if x else {0}) if x * x % P == x2 else []


def _add(a, b):
    """The sum of two points in affine coordinates (RFC 8032, section 5.1.4)."""
    (x1, y1), (x2, y2) = a, b
    c = D * x1 * x2 * y1 * y2
    x3 = (x1 * y2 + x2 * y1) * pow(1 + c, -1, P)
    y3 = (y1 * y2 + x1 * x2) * pow(1 - c, -1, P)
    return x3 % P, y3 % P


def _torsion():
    """The eight points whose order divides eight: L times any point, until they are all found."""
    found = {(0, 1)}
    for y in itertools.count(2):
        for x in _x_of(y):
            point, sum_ = (x, y), (0, 1)
            for bit in f"{L:b}":
                sum_ = _add(sum_, sum_)
                if bit == "1":
                    sum_ = _add(sum_, point)
            found |= {_add(sum_, other) for other in found}
        if len(found) == 8:
            break
    return found


def _encodings():
    """Every 32 bytes that a decoder might take for one of the eight, canonical or not."""
    ys = {y for _, y in _torsion()}
    for y, sign in itertools.product(sorted(ys), (0, 1)):
        for alias in (y, y + P):
            if alias < 2**255:
                yield (alias | sign << 255).to_bytes(32, "little")


def test_every_encoding_of_a_point_of_small_order_is_refused():
    encodings = list(_encodings())
    assert len(encodings) == 14  # ten canonical y with sign, and four with y + p
    for raw in encodings:
        with pytest.raises(MalformedMessage) as caught:
            check_public_key(raw)
        assert caught.value.why in {"key.small_order", "key.not_canonical"}


def test_the_library_would_take_a_signature_of_everything_from_such_a_key():
    identity_point = (1).to_bytes(32, "little")
    assert verify(identity_point, identity_point + bytes(32), b"whatever you like")


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", range(P, 2**255))
def test_a_y_coordinate_beyond_the_field_is_refused(y, sign):
    with pytest.raises(MalformedMessage, match=r"^key\.not_canonical$"):
        check_public_key((y | sign << 255).to_bytes(32, "little"))


@pytest.mark.parametrize("size", [0, 31, 33, 44, 64])
def test_a_key_of_another_length_is_refused(size):
    with pytest.raises(MalformedMessage, match=r"^key\.length"):
        check_public_key(bytes(size))


@given(st.binary(min_size=32, max_size=32))
def test_the_key_of_any_seed_is_allowed(seed):
    check_public_key(KeyPair.from_seed(seed).public_key)


# ------------------------------------------------------------------ ids
def test_a_peer_id_is_the_hash_of_the_key():
    keys = KeyPair.from_seed(bytes(32))
    assert keys.peer_id == PeerId.of(keys.public_key)
    assert keys.peer_id.raw == hashlib.sha256(keys.public_key).digest()
    assert keys.peer_id.hex == keys.peer_id.raw.hex()
    assert str(keys.peer_id) == keys.peer_id.short == keys.peer_id.hex[:8]
    assert f"KeyPair({keys.peer_id.short})" == repr(keys)
    assert KeyPair.generate().peer_id != KeyPair.generate().peer_id


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_ids_are_ordered_by_their_numbers(a, b):
    assert (PeerId(a) < PeerId(b)) == (PeerId(a).number < PeerId(b).number)
    assert (PeerId(a) == PeerId(b)) == (a == b)


def test_an_id_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        PeerId(bytes(31))


ids = st.binary(min_size=32, max_size=32)


@given(ids, ids, ids)
def test_distance_is_a_metric_and_each_distance_has_one_id(a, b, c):
    assert distance(a, a) == 0
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert (distance(a, b) ^ distance(a, c)) == distance(b, c)


# ------------------------------------------------------------------ networks
def test_names_that_look_the_same_are_the_same_network():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    seed = identity.open_network_seed(composed)
    assert seed == identity.open_network_seed(decomposed)
    assert seed != identity.open_network_seed("cafe")
    assert seed == hashlib.sha256(b"p2pmoe/v1/open-network\0caf\xc3\xa9").digest()


def test_a_network_id_is_a_hash_of_the_authority_and_of_no_peer():
    authority = KeyPair.from_seed(identity.open_network_seed("p2pmoe"))
    network = identity.network_id(authority.public_key)
    assert network == hashlib.sha256(b"p2pmoe/v1/network\0" + authority.public_key).digest()
    assert network != authority.peer_id.raw


def test_a_network_name_is_unicode_text():
    with pytest.raises(ConfigurationError, match="no Unicode text"):
        identity.open_network_seed("\udcff")


# ------------------------------------------------------------------ key files
def test_a_saved_key_is_the_same_when_loaded(tmp_path):
    keys, path = KeyPair.generate(), tmp_path / "a" / "b" / "key.pem"
    keys.save(path)
    assert KeyPair.load(path).public_key == keys.public_key


def test_only_the_owner_may_read_a_key_whatever_the_umask(tmp_path):
    path = tmp_path / "folder" / "key.pem"
    before = os.umask(0)
    try:
        KeyPair.generate().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "key.pem"
    path.write_text("precious")
    with pytest.raises(KeyFileError, match="cannot create the key"):
        KeyPair.generate().save(path)
    assert path.read_text() == "precious"


def test_a_dangling_link_is_not_followed(tmp_path):
    path = tmp_path / "key.pem"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError):
        KeyPair.generate().save(path)
    assert not (tmp_path / "elsewhere").exists()


def _pem(key, encryption=None):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


def _unknown_algorithm():
    """An Ed25519 key file whose algorithm is changed to a number that nobody knows."""
    pem = _pem(KeyPair.from_seed(bytes(32)).private_key)
    return pem.replace(b"MC4CAQAwBQYDK2Vw", b"MC4CAQAwBQYDK2V/")


def test_a_missing_key_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(KeyFileError, match=r"cannot read the key .*: No such file"):
        KeyPair.load(tmp_path / "key.pem")
    with pytest.raises(KeyFileError, match=r"cannot read the key .*: Is a directory"):
        KeyPair.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a key"),
        (b"not a key\n", "is not a key"),
        (b"\xff\xfe\0", "is not a key"),
        (_pem(KeyPair.from_seed(bytes(32)).private_key)[:60], "is not a key"),
        (
            _pem(
                KeyPair.from_seed(bytes(32)).private_key,
                serialization.BestAvailableEncryption(b"secret"),
            ),
            "is not a key",
        ),
        (_pem(X25519PrivateKey.from_private_bytes(bytes(32))), "key of another kind"),
        (_unknown_algorithm(), "key of another kind"),
    ],
    ids=["empty", "text", "binary", "cut", "encrypted", "x25519", "unknown"],
)
def test_a_file_that_is_no_key_of_ours_is_refused(tmp_path, content, complaint):
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=complaint):
        KeyPair.load(path)
