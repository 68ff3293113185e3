"""The chunk map: which bytes of a download are here, and which piece is next. Pure; knows no file and no socket."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MIN_PIECE_BYTES = 256 * 1024
PIECE_S = 4.0


@dataclass(frozen=True, slots=True)
class Span:
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(slots=True)
class ChunkMap:
    """Bytes 0 to `size` as done, in flight, or missing. `done` are disjoint, sorted spans that never touch."""

    size: int
    done: list[Span] = field(default_factory=list)
    flights: list[Span] = field(default_factory=list)

    @property
    def done_bytes(self) -> int:
        return sum(map(len, self.done))

    @property
    def unasked_bytes(self) -> int:
        """What is neither done nor in flight."""
        return sum(map(len, self.missing()))

    @property
    def is_complete(self) -> bool:
        return self.done_bytes == self.size

    @property
    def frontier(self) -> int:
        """The first byte that is not here."""
        return self.done[0].end if self.done and self.done[0].begin == 0 else 0

    def add(self, begin: int, end: int) -> None:
        """Count these bytes as done; once more does no harm."""
        if not 0 <= begin <= end <= self.size:
            raise ValueError(f"{begin}..{end} is not within {self.size}")
        if begin == end:
            return
        first = bisect_right(self.done, begin, key=lambda s: s.end)
        if first and self.done[first - 1].end == begin:
            first -= 1
        last = first
        while last < len(self.done) and self.done[last].begin <= end:
            begin, end = min(begin, self.done[last].begin), max(end, self.done[last].end)
            last += 1
        self.done[first:last] = [Span(begin, end)]

    def drop(self, begin: int, end: int) -> None:
        """Count these bytes as missing: they were wrong."""
        if begin >= end:
            return
        kept: list[Span] = []
        for span in self.done:
            kept.append(Span(span.begin, min(span.end, begin)))
            kept.append(Span(max(span.begin, end), span.end))
        self.done = [span for span in kept if span.begin < span.end]

    def missing(self) -> Iterator[Span]:
        """What is neither done nor in flight, from the front."""
        yield from gaps(merge([*self.done, *self.flights]), self.size)

    def take(self, wanted_bytes: int, borders: Iterable[int] = ()) -> Span | None:
        """The next piece to fetch, now in flight; None when there is none. It crosses none of the borders."""
        span = next(self.missing(), None)
        if span is None:
            return None
        end = min([span.end, span.begin + max(1, wanted_bytes), *(b for b in borders if b > span.begin)])
        piece = Span(span.begin, end)
        self.flights.append(piece)
        return piece

    def land(self, piece: Span) -> None:
        """The piece is no longer in flight; what of it was done has been added, the rest is missing again."""
        self.flights.remove(piece)


def merge(spans: Iterable[Span]) -> list[Span]:
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: s.begin):
        if out and span.begin <= out[-1].end:
            out[-1] = Span(out[-1].begin, max(out[-1].end, span.end))
        elif len(span):
            out.append(span)
    return out


def gaps(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """What of 0 to `size` the sorted spans leave out."""
    at = 0
    for span in spans:
        if span.begin > at:
            yield Span(at, span.begin)
        at = max(at, span.end)
    if at < size:
        yield Span(at, size)


def piece_bytes(*, left: int, connections: int, bytes_per_s: float, largest: int) -> int:
    """How much one request asks for, of `left` bytes that nobody has asked for.

    What a connection gets in PIECE_S; the less is left the smaller, so that all connections end together.
    """
    by_rate = int(PIECE_S * bytes_per_s / connections)
    return max(MIN_PIECE_BYTES, min(largest, by_rate, left // (2 * connections)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes `begin` to `end` of the source, which lie at `at` in the download."""

    at: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the bytes of a download lie in its source: one segment for a whole file, several for single tensors."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(s.end - s.begin for s in self.segments)

    @property
    def borders(self) -> tuple[int, ...]:
        return tuple(s.at for s in self.segments[1:])

    def to_source(self, offset: int) -> int:
        """Where in the source the byte at `offset` of the download lies."""
        index = bisect_right(self.segments, offset, key=lambda s: s.at) - 1
        segment = self.segments[index]
        return segment.begin + offset - segment.at

    def to_download(self, begin: int) -> int:
        """Where in the download the source's byte `begin` lies."""
        segment = next(s for s in self.segments if s.begin <= begin < s.end or s.begin == begin)
        return segment.at + begin - segment.begin


def whole(size: int) -> Layout:
    return Layout(segments=(Segment(at=0, begin=0, end=size),))


def of_spans(spans: Iterable[Span]) -> Layout:
    """The layout for these parts of a source, neighbours joined."""
    segments, at = [], 0
    for span in merge(spans):
        segments.append(Segment(at=at, begin=span.begin, end=span.end))
        at += len(span)
    return Layout(segments=tuple(segments))
