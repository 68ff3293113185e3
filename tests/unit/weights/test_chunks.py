from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.weights.references.manifest import ByteSpan
from services.weights.transfer.partial import ChunkMap, layout_of_spans, whole_file_layout

SIZE = 200
_SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: ByteSpan(min(pair), max(pair)))


class ChunkMapAgainstASet(RuleBasedStateMachine):
    """The map against the plainest model of it: a set of byte numbers."""

    def __init__(self):
        super().__init__()
        self.map = ChunkMap(SIZE)
        self.done: set[int] = set()

    @rule(span=_SPANS)
    def add(self, span):
        self.map.add(span.begin, span.end)
        self.done |= set(range(span.begin, span.end))

    @rule(span=_SPANS)
    def drop(self, span):
        self.map.drop(span.begin, span.end)
        self.done -= set(range(span.begin, span.end))

    @rule(wanted=st.integers(1, 50), borders=st.lists(st.integers(0, SIZE), max_size=3))
    def take(self, wanted, borders):
        flying = {b for piece in self.map.flights for b in range(piece.begin, piece.end)}
        piece = self.map.take(wanted, borders)
        if piece is None:
            assert self.done | flying == set(range(SIZE))
            return
        taken = set(range(piece.begin, piece.end))
        assert taken
        assert not taken & (self.done | flying)
        assert len(taken) <= wanted
        assert not any(piece.begin < border < piece.end for border in borders)

    @precondition(lambda self: self.map.flights)
    @rule(data=st.data())
    def land(self, data):
        piece = data.draw(st.sampled_from(self.map.flights))
        got = data.draw(st.integers(0, len(piece)))
        self.map.add(piece.begin, piece.begin + got)
        self.done |= set(range(piece.begin, piece.begin + got))
        self.map.release(piece)

    @invariant()
    def the_map_says_what_the_set_says(self):
        assert {b for s in self.map.done for b in range(s.begin, s.end)} == self.done
        assert self.map.done_bytes == len(self.done)
        assert all(left.end < right.begin for left, right in zip(self.map.done, self.map.done[1:], strict=False))
        assert self.map.frontier == next(b for b in range(SIZE + 1) if b not in self.done)


TestChunkMap = ChunkMapAgainstASet.TestCase


@given(st.lists(_SPANS, max_size=8))
def test_a_layout_maps_every_byte_of_the_download_to_its_place_in_the_source(spans):
    layout = layout_of_spans(spans)
    wanted = sorted({b for s in spans for b in range(s.begin, s.end)})
    assert layout.size == len(wanted)
    assert [layout.to_source(i) for i in range(layout.size)] == wanted
    assert [layout.to_download(b) for b in wanted] == list(range(layout.size))


def test_a_whole_file_is_one_segment():
    assert whole_file_layout(10).to_source(7) == 7
    assert whole_file_layout(10).borders == ()
