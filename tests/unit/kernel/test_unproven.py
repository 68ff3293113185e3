"""What strangers hold: by address, the oldest gives way."""

import pytest

from services.kernel.unproven import Unproven, network_of


def test_above_the_limit_of_an_address_its_oldest_gives_way():
    held = Unproven(limit=10, limit_per_address=2)
    assert [held.add(name, "127.0.0.2") for name in "ab"] == [[], []]
    assert held.add("x", "127.0.0.3") == []
    assert held.add("c", "127.0.0.2") == ["a"]
    assert "a" not in held
    assert len(held) == 3


def test_above_the_limit_of_all_the_oldest_of_all_gives_way():
    held = Unproven(limit=2, limit_per_address=2)
    for number in range(2):
        held.add(number, f"127.0.0.{number + 2}")
    assert held.add(2, "127.0.0.9") == [0]


def test_what_was_proved_gives_way_to_nobody():
    held = Unproven(limit=10, limit_per_address=1)
    held.add("proved", "127.0.0.1")
    held.remove("proved")
    held.remove("proved")
    assert held.add("other", "127.0.0.1") == []
    assert len(held) == 1


def test_the_oldest_come_first():
    held = Unproven(limit=10, limit_per_address=10)
    for name in "abc":
        held.add(name, "127.0.0.2")
    assert held.oldest(2) == ["a", "b"]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1", True),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_an_ipv6_network_counts_as_one_address(one, other, is_same):
    assert (network_of(one) == network_of(other)) == is_same
