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


@pytest.mark.parametrize("kind", [SourceFailed, Unreachable, WrongBytes])
def test_a_source_that_fails_is_named_by_its_host(kind):
    error = kind("no")
    blame_source(error, "hub.test")
    assert error.part == "source:hub.test"


@pytest.mark.parametrize("kind", [DailyCapReached, TokenRefused, NotFound])
def test_a_limit_or_token_of_this_node_and_a_wrong_name_are_not_the_sources_fault(kind):
    error = kind("no")
    blame_source(error, "hub.test")
    assert error.part == ""


def test_of_several_sources_one_that_failed_is_named():
    failures = [SourceFailed("a").of_part("source:a.test"), NotFound("b")]
    assert combine_failures("hf:a/b", failures).part == "source:a.test"
