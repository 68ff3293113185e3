"""With a digest, only the digest judges: whatever a server does to an answer, the download goes on."""

import asyncio
import contextlib
import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Iterator

import pytest

from fanlight.errors import FanlightError
from services.weights.errors import SourceFailed, TokenRefused
from services.weights.transfer.download import DownloadProgress
from tests.fakes.scripted_site import Request, ScriptedSite
from tests.fakes.weight_sites import safetensors
from tests.fakes.weight_stores import open_store

MODEL = safetensors({"w": bytes(range(256)) * 8000})
SHA256 = hashlib.sha256(MODEL).hexdigest()
VERSION = '"1"'
EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"


@pytest.fixture
def site() -> Iterator[Callable[[Callable[[Request], None]], ScriptedSite]]:
    with contextlib.ExitStack() as stack:
        yield lambda answer: stack.enter_context(ScriptedSite(answer))


@pytest.fixture
async def store(settings):
    """A store that waits for nothing; `waits` are the seconds that it would have waited."""
    async with open_store(settings(retries=4)) as store:
        waits = []

        async def sleep(wait_s):
            waits.append(wait_s)
            await asyncio.sleep(0)

        store._tools.sleep, store.waits = sleep, waits
        yield store


@pytest.fixture
def waits(store):
    return store.waits


async def _fetch(store, url, sha256=SHA256, **more):
    return await store.fetch(url, store.selection(), sha256=sha256, **more)


def _other_etag_each_time(request):
    request.send_range(MODEL, ETag=f'"{len(request.site.asked)}"')


def _other_date_each_time(request):
    request.send_range(MODEL, Last_Modified=f"Mon, 01 Jan 2024 00:00:{len(request.site.asked):02} GMT")


def _total_unknown(request):
    request.send_range(MODEL, total="*", ETag=VERSION)


def _range_in_chunks(request):
    span = request.span(len(MODEL))
    if span is None:
        return request.send_chunked(200, MODEL)
    said = f"bytes {span[0]}-{span[1] - 1}/{len(MODEL)}"
    return request.send_chunked(206, MODEL[slice(*span)], Content_Range=said)


def _whole_in_chunks(request):
    request.send_chunked(200, MODEL)


def _whole_until_the_connection_ends(request):
    request.send(200, MODEL, Content_Length=None, Connection="close")
    request.close_connection = True


def _compressed(request):
    request.send(200, gzip.compress(MODEL, 1), Content_Encoding="gzip", ETag='W/"1"')


def _compressed_in_chunks(request):
    request.send_chunked(200, gzip.compress(MODEL, 1), Content_Encoding="x-gzip")


def _ranges_compressed(request):
    span = request.span(len(MODEL))
    if span is None:
        return request.send(200, MODEL)
    body = gzip.compress(MODEL[slice(*span)], 1)
    return request.send(206, body, Content_Range=f"bytes {span[0]}-{span[1] - 1}/{len(MODEL)}", Content_Encoding="gzip")


def _fewer_bytes_than_asked(request):
    span = request.span(len(MODEL))
    if span is None:
        return request.send(200, MODEL)
    begin, end = span[0], min(span[1], span[0] + 200_000)
    return request.send(206, MODEL[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(MODEL)}", ETag=VERSION)


def _whole_now_and_then(request):
    if len(request.site.asked) % 3 == 2:
        request.send(200, MODEL, ETag=VERSION)
    else:
        request.send_range(MODEL, ETag=VERSION)


def _ranges_refused(request):
    if request.headers.get("range"):
        request.send(400, b"no ranges here")
    else:
        request.send(200, MODEL)


def _ranges_not_implemented(request):
    if request.headers.get("range"):
        request.send(501)
    else:
        request.send(200, MODEL)


def _no_first_byte_alone(request):
    """A range of one byte is 416 at some; the others are fine."""
    if request.headers.get("range") == "bytes=0-0":
        request.send(416, Content_Range=f"bytes */{len(MODEL)}")
    else:
        request.send_range(MODEL, ETag=VERSION)


def _several_parts(request):
    if request.headers.get("range", "bytes=0-0") == "bytes=0-0":
        return request.send_range(MODEL, ETag=VERSION)
    body = b"--x\r\nContent-Type: text/plain\r\n\r\n" + MODEL[:10] + b"\r\n--x--"
    return request.send(206, body, Content_Type="multipart/byteranges; boundary=x")


def _from_the_start_as_a_range(request):
    if request.headers.get("range", "bytes=0-0") == "bytes=0-0":
        return request.send_range(MODEL, ETag=VERSION)
    return request.send(206, MODEL, Content_Range=f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}")


@pytest.mark.parametrize(
    "answer",
    [
        _several_parts,
        _from_the_start_as_a_range,
        _other_etag_each_time,
        _other_date_each_time,
        _total_unknown,
        _range_in_chunks,
        _whole_in_chunks,
        _whole_until_the_connection_ends,
        _compressed,
        _compressed_in_chunks,
        _ranges_compressed,
        _fewer_bytes_than_asked,
        _whole_now_and_then,
        _ranges_refused,
        _ranges_not_implemented,
        _no_first_byte_alone,
    ],
    ids=lambda answer: answer.__name__.strip("_"),
)
@pytest.mark.parametrize("is_listed", [True, False])
async def test_the_file_comes_however_it_is_sent(site, settings, answer, is_listed):
    """By its address, where nobody knows the size, and from a hub, which tells it."""
    rows = [{"rfilename": "m.safetensors", "size": len(MODEL), "lfs": {"sha256": SHA256, "size": len(MODEL)}}]

    def hub(request):
        if request.path.startswith("/api/"):
            request.send(200, json.dumps({"sha": "a" * 40, "siblings": rows}).encode())
        else:
            answer(request)

    there = site(hub)
    async with open_store(settings(hf_endpoint=there.url)) as store:
        if is_listed:
            fetched = await _fetch(store, "hf:org/m/m.safetensors", sha256="")
        else:
            fetched = await _fetch(store, f"{there.url}/m.safetensors")
        assert fetched.path.read_bytes() == MODEL


@pytest.mark.parametrize("refusal", [403, 429, 503, 0])
@pytest.mark.parametrize("is_pinned", [True, False])
async def test_a_server_that_serves_one_connection_only_serves_the_file(site, store, refusal, is_pinned):
    one = threading.Semaphore(1)

    def answer(request):
        if not one.acquire(blocking=False):
            if refusal:
                return request.send(refusal)
            request.close_connection = True
            return None
        try:
            threading.Event().wait(0.02)
            return request.send_range(MODEL, ETag=VERSION)
        finally:
            one.release()

    fetched = await _fetch(store, f"{site(answer).url}/m.safetensors", sha256=SHA256 if is_pinned else "")
    assert fetched.path.read_bytes() == MODEL


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
@pytest.mark.parametrize("has_ranges", [True, False])
async def test_a_signed_address_that_runs_out_is_asked_for_anew(site, store, status, has_ranges):
    """Each signature answers three times; without ranges the first answers are cut."""
    uses: dict[str, int] = {}

    def answer(request):
        if request.path == "/m.safetensors":
            return request.send(302, Location=f"/signed?n={len(request.site.asked)}")
        uses[request.path] = uses.get(request.path, 0) + 1
        if uses[request.path] > 3:
            return request.send(status, EXPIRED)
        if has_ranges:
            return request.send_range(MODEL, ETag=f'"{request.path}"')
        if len(request.site.asked) < 9:
            return request.send_cut(MODEL, 700_000)
        return request.send(200, MODEL)

    there = site(answer)
    assert (await _fetch(store, f"{there.url}/m.safetensors")).path.read_bytes() == MODEL
    if has_ranges:
        assert there.sent_bytes < 1.2 * len(MODEL)


async def test_an_address_that_stays_refused_is_an_error_that_keeps_what_came(site, store):
    is_open, after = False, 1_000_000

    def answer(request):
        if request.path == "/m.safetensors":
            request.send(302, Location="/signed")
        elif not is_open and request.site.sent_bytes > after:
            request.send(403, EXPIRED)
        else:
            request.send_range(MODEL, ETag=VERSION)

    there = site(answer)
    with pytest.raises(TokenRefused, match="ExpiredToken"):
        await _fetch(store, f"{there.url}/m.safetensors")
    is_open, before = True, there.sent_bytes
    await _fetch(store, f"{there.url}/m.safetensors")
    assert there.sent_bytes - before <= len(MODEL) - after + 10_000


async def test_another_digest_that_a_server_reports_does_not_judge(site, store):
    answer = site(lambda request: request.send_range(MODEL, ETag=VERSION, X_Linked_Etag='"' + "0" * 64 + '"'))
    assert (await _fetch(store, f"{answer.url}/m.safetensors")).path.read_bytes() == MODEL


async def test_a_cut_answer_without_length_is_gone_on_with(site, store):
    cuts = 3

    def answer(request):
        nonlocal cuts
        begin, end = request.span(len(MODEL)) or (0, len(MODEL))
        is_cut = bool(cuts) and end - begin > 1
        cuts -= is_cut
        body = MODEL[begin : begin + 500_000] if is_cut else MODEL[begin:end]
        framed = b"%x\r\n%s" % (end - begin if is_cut else len(body), body) + (b"" if is_cut else b"\r\n0\r\n\r\n")
        is_range = request.headers.get("range")
        said = {"Content_Range": f"bytes {begin}-{end - 1}/*", "ETag": f'"{cuts}"'} if is_range else {}
        request.send(206 if is_range else 200, framed, Transfer_Encoding="chunked", **said)
        request.close_connection = is_cut

    there = site(answer)
    assert (await _fetch(store, f"{there.url}/m.safetensors")).path.read_bytes() == MODEL
    assert there.sent_bytes < 1.2 * len(MODEL)


LIMITED = [
    {"Retry_After": "55"},
    {"Retry_After": "Thu, 01 Jan 1970 00:17:35 GMT"},
    {"RateLimit": '"api";r=0;t=55'},
    {"RateLimit": '"pages";r=10;t=3, "api";r=0;t=55', "RateLimit_Policy": '"api";q=500;w=300'},
    {"RateLimit": "limit=500, remaining=0, reset=55"},
    {"RateLimit_Reset": "55", "RateLimit_Remaining": "0"},
    {"X_RateLimit_Reset": "1000055"},
    {"X_RateLimit_Reset": "55"},
    {"X_RateLimit_Reset_After": "55.0"},
]


@pytest.mark.parametrize("headers", LIMITED, ids=lambda headers: "+".join(headers))
@pytest.mark.parametrize("after", [0, 3])
async def test_the_time_that_a_busy_server_names_is_waited_for_and_shown(site, settings, headers, after):
    left, waits, seen = 1, [], []
    epoch = 1_000_000.0 if "1970" not in str(headers) else 1000.0
    if headers.get("X_RateLimit_Reset") == "1000055":
        # Told from seconds by its size alone.
        headers, epoch = {"X_RateLimit_Reset": "1700000055"}, 1_700_000_000.0

    def answer(request):
        nonlocal left
        if len(request.site.asked) > after and left:
            left -= 1
            request.send(429, b"slow down", **headers)
        else:
            request.send_range(MODEL, ETag=VERSION)

    async def sleep(wait_s):
        waits.append(wait_s)

    async with open_store(settings(connections=1), wall_s=lambda: epoch) as store:
        store._tools.sleep = sleep
        fetched = await _fetch(store, f"{site(answer).url}/m.safetensors", report=seen.append)
    assert fetched.path.read_bytes() == MODEL
    assert waits == [55.0]
    if after:
        assert any("wait until" in progress.source for progress in seen if isinstance(progress, DownloadProgress))


async def test_a_wait_that_is_too_long_is_an_error_that_says_how_long(site, store):
    there = site(lambda request: request.send(429, RateLimit='"api";r=0;t=7200'))
    with pytest.raises(FanlightError, match="7200 s") as caught:
        await _fetch(store, f"{there.url}/m.safetensors")
    assert caught.value.retry_after_s == 7200
    assert caught.value.part == "source:127.0.0.1"


async def test_what_came_is_kept_when_a_digest_source_breaks(site, store):
    is_open, after = False, 1_000_000

    def answer(request):
        if not is_open and request.site.sent_bytes > after:
            request.send(500)
        else:
            _other_etag_each_time(request)

    there = site(answer)
    with pytest.raises(SourceFailed):
        await _fetch(store, f"{there.url}/m.safetensors")
    is_open, before = True, there.sent_bytes
    await _fetch(store, f"{there.url}/m.safetensors")
    assert there.sent_bytes - before <= len(MODEL) - after + 10_000
