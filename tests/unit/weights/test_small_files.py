"""A file that comes in one answer: of the length that was planned and that the source said, or not at all."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.weights.errors import SourceFailed, WrongBytes
from services.weights.planning.plan import Holdings, make_plan
from services.weights.planning.selection import Selection
from services.weights.references.manifest import Manifest, WeightFile
from services.weights.store.fetching import FileFetcher
from services.weights.store.objects import Objects
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.download import DownloadProgress, ProgressTally
from services.weights.transfer.pacing import DownloadLimits, DownloadTools, Pacer

BODY = b'{"a": 1}'
FIRST, SECOND = "https://first/c.json", "https://second/c.json"


class Web:
    """Sites by address: a body, and the length that the site says it has."""

    def __init__(self, **sites: tuple[bytes, int | None]) -> None:
        self._sites = {f"https://{host}/c.json": site for host, site in sites.items()}
        self.asked: list[str] = []

    async def body(self, url: str, *, limit_bytes: int) -> tuple[bytes, RemoteFile]:
        self.asked.append(url)
        body, said_bytes = self._sites[url]
        return body, RemoteFile(url=url, size_bytes=said_bytes, etag="e")


class AsItIs:
    async def address(self, source: str) -> str:
        return source


@pytest.fixture
def fetch(tmp_path):
    """Fetch a file of eight bytes from the sites, planned as `values` say; the bytes that are kept."""
    objects = Objects(tmp_path, budget_bytes=0, now_s=lambda: 1.0)
    reported: list[DownloadProgress] = []

    async def count(size_bytes: int) -> None:
        pass

    async def start(web: Web, *sources: str, **values):
        file = WeightFile(path="c.json", sources=sources, **{"size_bytes": len(BODY), **values})
        manifest = Manifest(reference="it", view="me/it", files=(file,), is_chosen=True)
        plan, selection = make_plan(manifest, Selection(), Holdings()), Selection()
        with ThreadPoolExecutor(1) as io:
            tools = DownloadTools(
                web=web,
                io=io,
                pacer=Pacer(0, lambda: 0.0, tmp_path / "bandwidth"),
                limits=DownloadLimits(connections=1, piece_bytes=1, slow_bps=0, retries=0),
                parts=objects.parts,
                reserve=objects.reserve,
                count=count,
                chance=random.Random(0),
            )
            tally = ProgressTally(reference="it", fetch_bytes=plan.fetch_bytes, report=reported.append)
            fetching = FileFetcher(objects=objects, tools=tools, resolver=AsItIs(), report=tally.update)
            placed = await fetching.fetch(plan, plan.files[0], selection)
        return [objects.path_of(sha256).read_bytes() for _, sha256 in placed.links]

    start.objects, start.reported = objects, reported
    return start


async def test_a_file_of_the_planned_length_is_kept(fetch):
    assert await fetch(Web(first=(BODY, len(BODY))), FIRST) == [BODY]


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b" ", b""])
async def test_a_file_of_another_length_than_planned_is_refused_though_no_digest_is_known(fetch, body):
    with pytest.raises(WrongBytes, match=f"c.json has {len(body)} bytes instead of 8"):
        await fetch(Web(first=(body, len(body))), FIRST)
    assert fetch.objects.index.objects() == []


@pytest.mark.parametrize("said_bytes", [len(BODY) + 1, len(BODY) - 1])
async def test_a_file_that_is_not_as_long_as_its_source_says_is_refused_though_no_length_was_planned(fetch, said_bytes):
    with pytest.raises(SourceFailed, match=f"sent 8 of {said_bytes} bytes"):
        await fetch(Web(first=(BODY, said_bytes)), FIRST, is_exact=False)
    assert fetch.objects.index.objects() == []


async def test_where_nothing_is_said_of_the_length_what_comes_is_kept(fetch):
    assert await fetch(Web(first=(BODY + b" ", None)), FIRST, is_exact=False) == [BODY + b" "]


async def test_a_source_with_a_file_of_another_length_is_left_for_the_next(fetch):
    web = Web(first=(BODY[:-1], 7), second=(BODY, 8))
    assert await fetch(web, FIRST, SECOND) == [BODY]
    assert web.asked == [FIRST, SECOND]


async def test_bytes_of_the_right_length_and_another_digest_are_refused(fetch):
    with pytest.raises(WrongBytes, match=r"c\.json: sha256 is"):
        await fetch(Web(first=(BODY[::-1], 8)), FIRST, sha256=hashlib.sha256(BODY).hexdigest())


async def test_a_small_file_counts_in_the_progress_of_the_whole(fetch):
    await fetch(Web(first=(BODY, 8)), FIRST)
    (last,) = fetch.reported
    assert (last.path, last.done_bytes, last.total_bytes, last.source) == ("c.json", 8, 8, "first")
    assert (last.whole.done_bytes, last.whole.total_bytes) == (8, 8)


async def test_a_file_that_another_caller_fetched_since_the_plan_counts_too(fetch):
    web, sha256 = Web(first=(BODY, 8)), hashlib.sha256(BODY).hexdigest()
    for _ in range(2):
        await fetch(web, FIRST, sha256=sha256)
    assert web.asked == [FIRST]
    assert [(each.whole.done_bytes, each.whole.total_bytes) for each in fetch.reported] == [(8, 8), (8, 8)]
    assert fetch.reported[-1].source == "another download"
