"""Layers lie on each other as an engine lays them: hard links, whiteouts and replaced folders keep totals right."""

from itertools import count

import pytest
from audit.report import describe
from audit.rootfs import merge
from audit.sources import load

from tests.fakes.images import Link

PLATFORM = "linux/amd64"


def hard(target):
    return Link(target, hard=True)


@pytest.fixture
def seen(layout):
    """What a container sees and what is hidden from it: path to bytes, and (kind, path, bytes)."""

    number = count()

    def of(*layers):
        image = load(layout.add(f"it{next(number)}", layers), PLATFORM)
        said = describe(image)
        root = merge(image)
        files = {entry.path: entry.size_bytes for entry in root.files()}
        assert said["rootfs_bytes"] == sum(files.values())
        hidden = [
            (each["kind"], each["path"], each["bytes"])
            for each in said["findings"]
            if each["kind"] in ("deleted", "overwritten")
        ]
        return files, hidden

    return of


def test_two_names_of_one_file_are_its_bytes_once(seen):
    assert seen({"a": b"x" * 9000, "b": hard("a")}) == ({"a": 9000}, [])


def test_a_file_lives_on_under_its_other_name(seen):
    below = {"a": b"x" * 9000, "b": hard("a"), "c": hard("b")}
    assert seen(below, {".wh.a": b""}) == ({"b": 9000}, [])
    assert seen(below, {".wh.a": b""}, {".wh.b": b""}) == ({"c": 9000}, [])
    assert seen(below, {"a": b"y" * 10}) == ({"a": 10, "b": 9000}, [])


def test_a_file_is_hidden_when_its_last_name_is(seen):
    below = {"a": b"x" * 9000, "b": hard("a")}
    assert seen(below, {".wh.a": b"", ".wh.b": b""}) == ({}, [("deleted", "a", 9000)])
    assert seen(below, {".wh.a": b""}, {".wh.b": b""}) == ({}, [("deleted", "b", 9000)])
    again = {"a": b"x" * 9000, "b": hard("a")}
    assert seen(below, again) == ({"a": 9000}, [("overwritten", "a", 9000)])


def test_a_link_to_a_file_of_a_layer_below_shares_its_bytes(seen):
    assert seen({"a": b"x" * 9000}, {"b": hard("a")}, {".wh.a": b""}) == ({"b": 9000}, [])


def test_a_folder_that_becomes_a_file_hides_what_was_in_it(seen):
    assert seen({"d/x/y": b"x" * 9000}, {"d": b"z"}) == ({"d": 1}, [("deleted", "d/x/y", 9000)])


def test_an_opaque_root_hides_everything_below(seen):
    assert seen({"a/b": b"x" * 9000}, {".wh..wh..opq": b"", "c": b"z"}) == ({"c": 1}, [("deleted", "a/b", 9000)])


def test_what_is_deleted_can_come_back(seen):
    files, hidden = seen({"a/b": b"x" * 9000}, {".wh.a": b""}, {"a/b": b"y" * 7000})
    assert files == {"a/b": 7000}
    assert hidden == [("deleted", "a/b", 9000)]


def test_many_whiteouts_are_counted_each(seen):
    names = [f"d{n % 100}/{n}" for n in range(20_000)]
    files, hidden = seen(
        dict.fromkeys(names, b"1234567"), {f"d{n % 100}/.wh.{n}": b"" for n in range(20_000)}, {"left": b"x"}
    )
    assert files == {"left": 1}
    assert len(hidden) == 20_000
