"""With a digest, only the digest judges: a download goes on whatever servers and proxies say beside the bytes."""

import gzip
import hashlib
import random
from datetime import UTC, datetime

import pytest

from fanlight.errors import FanlightError
from services.weights.errors import SourceFailed, TokenRefused
from tests.fakes.scripted_site import ScriptedSite
from tests.fakes.weight_stores import open_store

BODY = random.Random(5).randbytes(4_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
PAGE = b"<html><body>accept our terms</body></html>"


@pytest.fixture
def site():
    with ScriptedSite(lambda request, site: request.send_file(BODY, ETag='"1"')) as site:
        yield site


@pytest.fixture
def fetch(site, store):
    async def start(**values):
        return await store.fetch(f"{site.url}/m.safetensors.bin", store.selection(), sha256=SHA256, **values)

    store._tools.sleep = _no_sleep
    return start


def etag_each_time(request, site):
    request.send_file(BODY, ETag=f'"{len(site.asked)}"', Last_Modified=f"day {len(site.asked)}")


def no_total(request, site):
    request.send_file(BODY, total="*")


def fewer_bytes_than_requested(request, site):
    request.send_file(BODY, at_most=300_000)


def chunked(request, site):
    request.send_chunked(BODY)


def until_the_connection_closes(request, site):
    request.send(200, BODY, Content_Length="")


def gzip_anyway(request, site):
    request.send(200, gzip.compress(BODY, 1), Content_Encoding="gzip")


def gzip_of_ranges(request, site):
    request.send_file(gzip.compress(BODY, 0), Content_Encoding="gzip")


def no_requests_for_ranges(request, site):
    request.send(400) if request.span else request.send_file(BODY)


def gone_at_416(request, site):
    request.send(416) if request.span else request.send_file(BODY)


def whole_file_now_and_then(request, site):
    request.send(200, BODY) if len(site.asked) == 5 else request.send_file(BODY)


def whole_file_from_the_middle_on(request, site):
    request.send(200, BODY) if len(site.asked) > 4 else request.send_file(BODY)


def compressed_from_the_middle_on(request, site):
    gzip_anyway(request, site) if len(site.asked) > 4 else request.send_file(BODY)


ODD = [
    etag_each_time,
    no_total,
    fewer_bytes_than_requested,
    chunked,
    until_the_connection_closes,
    gzip_anyway,
    gzip_of_ranges,
    no_requests_for_ranges,
    gone_at_416,
    whole_file_now_and_then,
    whole_file_from_the_middle_on,
    compressed_from_the_middle_on,
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
async def test_the_file_comes_from_a_server_that_is_odd(site, fetch, odd):
    site.answer = odd
    assert (await fetch()).path.read_bytes() == BODY


async def test_a_compression_that_nobody_knows_is_named(site, fetch):
    site.answer = lambda request, _: request.send(200, BODY, Content_Encoding="br")
    with pytest.raises(SourceFailed, match=r"127\.0\.0\.1 compresses its answer with br"):
        await fetch()


async def test_a_server_that_bears_one_connection_only_is_read_by_one(site, fetch):
    busy = 0

    def one_at_a_time(request, site):
        nonlocal busy
        with site.lock:
            busy += 1
            is_alone = busy == 1
        request.send_file(BODY, ETag='"1"') if is_alone else request.send(403, b"too many connections")
        with site.lock:
            busy -= 1

    site.answer = one_at_a_time
    assert (await fetch()).path.read_bytes() == BODY


async def test_a_page_in_the_middle_is_waited_for_and_costs_nothing(site, settings):
    pages = 12

    def answer(request, site):
        nonlocal pages
        if site.sent_bytes < 1_500_000 or not pages:
            request.send_file(BODY, ETag='"1"')
            return
        pages -= 1
        request.send(200, PAGE)

    site.answer = answer
    async with open_store(settings(retries=20)) as store:
        store._tools.sleep = _no_sleep
        fetched = await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    assert fetched.path.read_bytes() == BODY
    assert fetched.downloaded_bytes == len(BODY)


async def test_a_portal_that_redirects_to_a_host_of_its_own_is_waited_for_too(site, settings):
    portals = 3

    def answer(request, site):
        nonlocal portals
        if site.sent_bytes < 1_500_000 or not portals:
            request.send_file(BODY, ETag='"1"')
        else:
            portals -= 1
            request.send(302, Location="http://portal.invalid/login")

    site.answer = answer
    async with open_store(settings(retries=20, url_hosts="127.0.0.1")) as store:
        store._tools.sleep = _no_sleep
        fetched = await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    assert fetched.path.read_bytes() == BODY
    assert fetched.downloaded_bytes == len(BODY)


async def test_a_digest_that_the_hub_says_pins_the_bytes_too(site, store):
    def answer(request, site):
        if request.path.startswith("/cdn"):
            request.send_file(BODY, ETag=f'"{len(site.asked)}"')
        else:
            request.send(302, Location="/cdn", X_Linked_Etag=f'"{SHA256}"')

    site.answer = answer
    fetched = await store.fetch(f"{site.url}/m.dat", store.selection())
    assert fetched.path.read_bytes() == BODY
    assert fetched.downloaded_bytes == len(BODY)


async def test_a_small_file_of_the_right_digest_is_kept_whatever_length_was_said(site, store):
    body = b"small"
    site.answer = lambda request, _: request.send(200, gzip.compress(body), Content_Encoding="x-gzip")
    fetched = await store.fetch(f"{site.url}/m.dat", store.selection(), sha256=hashlib.sha256(body).hexdigest())
    assert fetched.path.read_bytes() == body


@pytest.mark.parametrize("page", [PAGE, b"", b'{"error": "down"}', b"<Error><Code>Slow</Code></Error>"])
@pytest.mark.parametrize("has_ranges", [True, False])
async def test_what_was_fetched_before_a_page_is_kept_for_later(site, settings, page, has_ranges):
    def by_ranges(request, site):
        request.send(200, page) if site.sent_bytes >= 1_500_000 else request.send_file(BODY, ETag='"1"')

    def in_one_go(request, site):
        if site.sent_bytes >= 1_500_000:
            request.send(200, page)
            return
        request.send(200, BODY[: 10_000 if request.span else 2_000_000], Content_Length=str(len(BODY)))
        request.cut()

    site.answer = by_ranges if has_ranges else in_one_go
    async with open_store(settings(retries=2)) as store:
        store._tools.sleep = _no_sleep
        for _ in range(2):
            with pytest.raises(FanlightError):
                await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    before = site.sent_bytes
    site.answer = lambda request, _: request.send_file(BODY, ETag='"1"')
    async with open_store(settings()) as store:
        fetched = await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    assert fetched.path.read_bytes() == BODY
    assert site.sent_bytes - before < 3_000_000


@pytest.mark.parametrize("status", [400, 401, 403, 404])
@pytest.mark.parametrize("has_ranges", [True, False])
async def test_an_address_behind_a_redirect_that_runs_out_is_asked_for_again(site, fetch, status, has_ranges):
    def answer(request, site):
        if request.path.startswith("/signed"):
            is_over = int(request.path.split("=")[1]) + 6 < len(site.asked)
            if is_over:
                request.send(status, b"<Error><Code>ExpiredToken</Code></Error>")
            elif has_ranges:
                request.send_file(BODY)
            else:
                request.send(200, BODY)
        else:
            request.send(302, Location=f"{site.url}/signed?n={len(site.asked)}")

    site.answer = answer
    assert (await fetch()).path.read_bytes() == BODY
    assert site.sent_bytes < len(BODY) + 20_000 or not has_ranges


async def test_an_address_that_is_refused_for_good_is_not_asked_for_again_and_again(site, fetch):
    def answer(request, site):
        is_signed = request.path.startswith("/signed")
        if is_signed and request.span != (0, 1):
            request.send(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>")
            return
        request.send_file(BODY) if is_signed else request.send(302, Location=f"{site.url}/signed")

    site.answer = answer
    with pytest.raises(SourceFailed, match="AccessDenied: No"):
        await fetch()
    assert len(site.asked) < 60


async def test_a_direct_address_that_is_refused_in_the_middle_keeps_what_is_there(site, settings):
    def answer(request, site):
        request.send_file(BODY) if len(site.asked) < 5 else request.send(403, b"expired")

    site.answer = answer
    async with open_store(settings()) as store:
        store._tools.sleep = _no_sleep
        with pytest.raises(TokenRefused):
            await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    before, site.answer = site.sent_bytes, lambda request, _: request.send_file(BODY)
    async with open_store(settings()) as store:
        await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256)
    assert site.sent_bytes - before < len(BODY) - 500_000


async def test_a_wait_that_the_server_asks_for_is_reported_with_its_end(site, settings):
    waits: list[float] = []
    reports = []

    async def sleep(wait_s: float) -> None:
        waits.append(wait_s)

    def answer(request, site):
        if len(site.asked) == 3:
            request.send(429, RateLimit='"api";r=0;t=55')
            return
        request.send_file(BODY)

    site.answer = answer
    async with open_store(settings(), wall_s=lambda: datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()) as store:
        store._tools.sleep = sleep
        await store.fetch(f"{site.url}/m.bin", store.selection(), sha256=SHA256, report=reports.append)
    assert waits == [55.0]
    assert [r.source for r in reports if "until" in r.source] == [
        f"{site.url[7:]}, which asks to wait until 12:00:55 UTC"
    ]
    assert reports[-1].done_bytes == len(BODY)


async def test_a_server_that_asks_for_too_long_a_wait_is_left_and_the_wait_is_said(site, fetch):
    site.answer = lambda request, _: request.send(429, Retry_After="7200")
    with pytest.raises(SourceFailed, match="asks to wait 7200 s") as caught:
        await fetch()
    assert caught.value.retry_after_s == 7200


async def _no_sleep(wait_s: float) -> None:
    pass
