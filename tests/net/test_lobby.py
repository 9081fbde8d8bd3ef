"""The waiting room: places are few, nobody holds one for ever, and the table holds who is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.net.lobby import Lobby, Place

HOSTS = ["127.0.0.1", "8.8.8.8", "8.8.8.9", "2a00::1", "2a00::2"]


def test_a_place_that_was_given_to_somebody_else_is_left_without_effect() -> None:
    lobby, gone = Lobby(1), []
    first = lobby.enter("127.0.0.1", 0.0, lambda: gone.append(1))
    second = lobby.enter("127.0.0.1", 0.0, lambda: gone.append(2))
    assert first is not None
    assert second is not None
    lobby.leave(first)
    assert (len(lobby), gone) == (1, [1])
    lobby.leave(second)
    assert len(lobby) == 0


def test_who_comes_into_an_empty_lobby_need_not_wait() -> None:
    assert Lobby(1).wait(1.0, now=0.0) == 0


@given(st.lists(st.tuples(st.sampled_from(HOSTS), st.booleans()), max_size=60))
def test_places_are_never_more_than_there_are_and_no_table_outlives_them(steps) -> None:
    lobby = Lobby(5, 2)
    there: list[Place] = []

    def oldest_goes() -> None:
        there.pop(0)

    for now, (host, leaves) in enumerate(steps):
        if leaves and there:
            lobby.leave(there.pop(0))
        elif place := lobby.enter(host, now, oldest_goes):
            there.append(place)
        assert len(lobby) == len(there) <= 5
        groups = [each.group for each in there if each.group]
        assert all(groups.count(group) <= 2 for group in groups)
    for place in there:
        lobby.leave(place)
    assert len(lobby) == len(lobby._groups) == 0
