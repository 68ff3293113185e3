"""A failure to fetch names the host of its source, also in the error that combines several sources."""

import pytest

from fanlight.errors import NotFound
from services.weights.errors import (
    DailyCapReached,
    SourceFailed,
    TokenRefused,
    Unreachable,
    WrongBytes,
    blame_source,
    combine_failures,
)


@pytest.mark.parametrize("kind", [SourceFailed, Unreachable, TokenRefused, NotFound, WrongBytes])
def test_a_source_that_fails_is_named_by_its_host(kind):
    error = kind("no")
    blame_source(error, "hub.test")
    assert error.part == "source:hub.test"


def test_what_is_on_this_machine_has_no_source_and_a_named_part_stays():
    error = SourceFailed("no")
    blame_source(error, "")
    assert error.part == ""
    blame_source(error.of_part("lora:style"), "hub.test")
    assert error.part == "lora:style"


def test_a_limit_of_this_node_is_not_the_sources_fault():
    error = DailyCapReached("no more today")
    blame_source(error, "hub.test")
    assert error.part == ""


def test_of_several_sources_the_one_whose_reason_is_told_is_named():
    failures = [SourceFailed("a").of_part("source:a.test"), NotFound("b").of_part("source:b.test")]
    assert combine_failures("hf:a/b", failures).part == "source:b.test"
