"""Range headers, as RFC 9110 section 14 says."""

import pytest

from services.gateway.http.blobs import Unsatisfiable, range_of
from services.kernel.blobs import ByteRange


@pytest.mark.parametrize(
    ("header", "offset_bytes", "size_bytes"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=2-4", 2, 3),
        ("bytes=2-", 2, 8),
        ("bytes=2-99", 2, 8),
        ("bytes=-3", 7, 3),
        ("bytes=-99", 0, 10),
        ("Bytes = 9-9", 9, 1),
    ],
)
def test_one_range_is_a_part(header: str, offset_bytes: int, size_bytes: int) -> None:
    assert range_of(header, 10) == ByteRange(offset_bytes=offset_bytes, size_bytes=size_bytes)


@pytest.mark.parametrize(
    "header", ["", "bytes=-", "bytes=4-2", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes", "0-1"]
)
def test_what_means_nothing_is_all_of_it(header: str) -> None:
    assert range_of(header, 10) is None


@pytest.mark.parametrize(
    ("header", "size_bytes"), [("bytes=10-", 10), ("bytes=10-12", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_a_range_past_the_end_cannot_be_had(header: str, size_bytes: int) -> None:
    with pytest.raises(Unsatisfiable):
        range_of(header, size_bytes)
