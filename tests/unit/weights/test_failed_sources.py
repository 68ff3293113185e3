"""A failure to fetch names the host of its source, also in the error that combines several sources."""

import pytest

from fanlight.errors import NotFound
from services.weights.errors import (
    DailyCapReached,
    SourceFailed,
    TokenRefused,
    Unreachable,
    WrongBytes,
    combine_failures,
    names_source,
)


@pytest.mark.parametrize("kind", [SourceFailed, Unreachable, TokenRefused, NotFound, WrongBytes])
def test_a_source_that_fails_is_named_by_its_host(kind):
    with pytest.raises(kind) as caught, names_source("https://user:secret@hub.test:8443/x?token=1"):
        raise kind("no")
    assert caught.value.part == "source:hub.test:8443"


def test_a_bucket_is_the_host_and_what_is_on_this_machine_has_none():
    for url, part in {"s3://bucket/key": "source:bucket", "": "", "/srv/models": ""}.items():
        with pytest.raises(SourceFailed) as caught, names_source(url):
            raise SourceFailed("no")
        assert caught.value.part == part


def test_a_limit_of_this_node_is_not_the_sources_fault():
    with pytest.raises(DailyCapReached) as caught, names_source("https://hub.test/x"):
        raise DailyCapReached("no more today")
    assert caught.value.part == ""


def test_of_several_sources_the_one_whose_reason_is_told_is_named():
    failures = [SourceFailed("a").of_part("source:a.test"), NotFound("b").of_part("source:b.test")]
    assert combine_failures("hf:a/b", failures).part == "source:b.test"
