import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.weights.references.manifest import TensorEntry
from services.weights.references.tensors import (
    MAX_HEADER_BYTES,
    BadHeader,
    canonical_header,
    component_key,
    header_length,
    parse_header,
)


def _file(rows, data_bytes: int, pad: int = 0):
    header = json.dumps(rows).encode() + b" " * pad
    first = len(header).to_bytes(8, "little")
    return first, header, 8 + len(header) + data_bytes


def _row(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def _parse(rows, data_bytes):
    first, header, size = _file(rows, data_bytes)
    return parse_header(first, header, size_bytes=size)


def test_a_sound_header_gives_the_tensors_in_the_order_of_their_bytes():
    table = _parse({"b": _row(4, 8, "F16", [2]), "a": _row(0, 4, "F32", [1]), "__metadata__": {"format": "pt"}}, 8)
    assert [t.name for t in table.tensors] == ["a", "b"]
    assert table.tensors[0].begin == table.header_bytes


@pytest.mark.parametrize(
    ("rows", "data_bytes", "says"),
    [
        ({"a": _row(0, 4), "b": _row(2, 6)}, 6, "overlaps"),
        ({"a": _row(0, 4), "b": _row(5, 6)}, 6, "gap"),
        ({"a": _row(0, 4)}, 3, "end at byte"),
        ({"a": _row(0, 4)}, 5, "end at byte"),
        ({"a": _row(0, 4, "F13")}, 4, "unknown dtype"),
        ({"a": _row(0, 4, "F32", [2])}, 4, "are not F32"),
        ({"a": _row(0, 4, "U8", [-4])}, 4, "bad shape"),
        ({"a": _row(0, 4, "U8", [True, 4])}, 4, "bad shape"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "must have"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "bad"),
        ({"__metadata__": {"x": 1}}, 0, "strings"),
        ([], 0, "not a JSON object"),
    ],
)
def test_an_invalid_header_is_refused_with_the_reason(rows, data_bytes, says):
    with pytest.raises(BadHeader, match=says):
        _parse(rows, data_bytes)


def test_a_name_that_stands_twice_is_refused():
    body = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(BadHeader, match="twice"):
        parse_header(len(body).to_bytes(8, "little"), body, size_bytes=8 + len(body) + 1)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**63])
def test_a_header_too_long_or_too_short_is_refused_before_it_is_read(length):
    with pytest.raises(BadHeader, match="the header has"):
        header_length(length.to_bytes(8, "little"))


def test_deeply_nested_json_is_refused():
    body = b"[" * 100_000 + b"]" * 100_000
    with pytest.raises(BadHeader):
        parse_header(len(body).to_bytes(8, "little"), body, size_bytes=8 + len(body))


@given(st.binary(max_size=200))
def test_any_header_bytes_are_either_a_table_or_a_bad_header(body):
    try:
        parse_header(len(body).to_bytes(8, "little"), body, size_bytes=8 + len(body))
    except BadHeader:
        return


_ENTRIES = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.sampled_from(["F16", "F32", "I64", "U8"]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=8,
)
_BYTES = {"F16": 2, "F32": 4, "I64": 8, "U8": 1}


def _entries(named):
    out, at = [], 100
    for name, (dtype, shape) in named.items():
        size = _BYTES[dtype]
        for side in shape:
            size *= side
        entry = TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=at, end=at + size, sha256="0" * 64)
        out.append(entry)
        at += size
    return out


@given(_ENTRIES)
def test_a_canonical_header_is_sound_and_the_same_for_any_order(named):
    named.pop("__metadata__", None)
    entries = _entries(named)
    header, table = canonical_header(entries)
    size = table.tensors[-1].end if table.tensors else len(header)
    parsed = parse_header(header[:8], header[8:], size_bytes=size)
    assert {(t.name, t.begin, t.end) for t in parsed.tensors} == {(t.name, t.begin, t.end) for t in table.tensors}
    assert canonical_header(reversed(entries))[0] == header
    assert component_key(entries) == component_key(list(reversed(entries)))
    assert all(t.begin % _BYTES[t.dtype] == 0 for t in table.tensors)
