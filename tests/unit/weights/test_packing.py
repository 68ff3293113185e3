import contextlib
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.weights.errors import WrongBytes
from services.weights.mirror.packing import FRAME_BYTES, blocks_of, pack, unpack
from services.weights.references.manifest import ByteSpan, TensorEntry, TensorTable, covering


@given(st.binary(max_size=3000), st.sampled_from([1, 2, 4, 8]))
def test_what_is_packed_comes_out_bit_by_bit(data, width):
    assert unpack(pack(data, width), len(data)) == data if data else True


def test_numbers_that_are_no_numbers_come_out_as_they_went_in():
    data = struct.pack("<8H", 0x7E01, 0xFE55, 0x7C00, 0xFC00, 0x0001, 0x8001, 0x8000, 0x0000) * 4096
    assert unpack(pack(data, 2), len(data)) == data


def test_trained_numbers_take_at_most_87_hundredths():
    data = np.random.default_rng(1).normal(0, 0.02, 2_000_000).astype(np.float16).tobytes()
    assert len(pack(data, 2)) <= 0.87 * len(data)


def test_noise_grows_by_no_more_than_its_head():
    data = random.Random(1).randbytes(100_000)
    assert len(pack(data, 2)) <= len(data) + 11


@given(st.binary(min_size=1, max_size=200), st.integers(1, 400))
def test_no_bytes_make_anything_but_an_error_or_the_right_length(frame, size):
    with contextlib.suppress(WrongBytes):
        assert len(unpack(frame, size)) == size


def test_a_frame_that_would_unpack_to_more_is_refused():
    bomb = pack(bytes(10_000_000), 1)
    with pytest.raises(WrongBytes):
        unpack(bomb, 1000)


@st.composite
def tables(draw):
    at, rows = draw(st.integers(10, 5000)), []
    start = at
    for number in range(draw(st.integers(0, 12))):
        prefix = draw(
            st.sampled_from(["model.diffusion_model.", "first_stage_model.decoder.", "cond_stage_model.", ""])
        )
        dtype, count = draw(st.sampled_from([("F16", 2), ("F32", 4), ("U8", 1)])), draw(st.integers(0, 900_000))
        size = dtype[1] * count
        rows.append(TensorEntry(name=f"{prefix}{number}", dtype=dtype[0], shape=(count,), begin=at, end=at + size))
        at += size
    return TensorTable(header_bytes=start, tensors=tuple(rows)), at


@given(tables())
def test_frames_lie_one_behind_the_other_and_hold_numbers_of_one_width(table_and_size):
    table, size = table_and_size
    blocks = list(blocks_of(size, table))
    at = 0
    for block in blocks:
        assert block.span.begin == at
        assert 0 < len(block.span) <= FRAME_BYTES
        at = block.span.end
        widths = {t.dtype for t in table.tensors if t.begin < block.span.end and t.end > block.span.begin}
        assert len(widths) <= 1 or block.span.begin == 0
    assert at == size


@given(st.lists(st.integers(1, 9), max_size=12), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=6))
def test_frames_that_cover_are_those_that_share_a_byte(sizes, wanted):
    frames, at = [], 0
    for size in sizes:
        frames.append(ByteSpan(at, at + size))
        at += size
    spans, begin = [], 0
    for gap, size in wanted:
        spans.append(ByteSpan(begin + gap, begin + gap + size))
        begin += gap + size
    share = [n for n, f in enumerate(frames) if any(max(f.begin, s.begin) < min(f.end, s.end) for s in spans)]
    assert covering(frames, spans) == share
