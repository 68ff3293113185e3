"""Answers that are right in part: of one connection only, in several parts, cut, with another digest."""

import contextlib
import hashlib
import threading

import pytest

from services.weights.errors import SourceFailed
from tests.fakes.scripted_site import ScriptedSite
from tests.fakes.weight_sites import safetensors

MODEL = safetensors({"w": bytes(range(256)) * 8000})
OTHER = safetensors({"w": bytes(reversed(range(256))) * 8000})
SHA256 = hashlib.sha256(MODEL).hexdigest()
VERSION = '"1"'
FIRST_BYTE = (0, 1)


@pytest.fixture
def site():
    with ScriptedSite(lambda request, site: request.send_file(MODEL, ETag=VERSION)) as site:
        yield site


@pytest.fixture
def fetch(site, store):
    async def sleep(wait_s):
        pass

    async def start(*, sha256=SHA256):
        return (await store.fetch(f"{site.url}/m.safetensors", store.selection(), sha256=sha256)).path.read_bytes()

    store._tools.sleep = sleep
    return start


@pytest.mark.parametrize("refusal", [403, 429, 503, 0])
@pytest.mark.parametrize("sha256", [SHA256, ""])
async def test_a_server_that_refuses_all_connections_but_the_first_serves_the_file(site, fetch, refusal, sha256):
    is_free = threading.Semaphore(1)

    def answer(request, site):
        if request.span == FIRST_BYTE:
            request.send_file(MODEL, ETag=VERSION)
        elif not is_free.acquire(blocking=False):
            request.send(refusal) if refusal else request.cut()
        else:
            threading.Event().wait(0.02)
            with contextlib.suppress(OSError):
                request.send_file(MODEL, ETag=VERSION)
            is_free.release()

    site.answer = answer
    assert await fetch(sha256=sha256) == MODEL


def several_parts(request, site):
    if request.span in (None, FIRST_BYTE):
        request.send_file(MODEL, ETag=VERSION)
        return
    body = b"--x\r\nContent-Type: text/plain\r\n\r\n" + MODEL[:10] + b"\r\n--x--"
    request.send(206, body, Content_Type="multipart/byteranges; boundary=x")


def from_the_begin_as_a_range(request, site):
    if request.span in (None, FIRST_BYTE):
        request.send_file(MODEL, ETag=VERSION)
    else:
        request.send(206, MODEL, Content_Range=f"bytes 0-{len(MODEL) - 1}/{len(MODEL)}", ETag=VERSION)


@pytest.mark.parametrize("answer", [several_parts, from_the_begin_as_a_range])
async def test_a_file_whose_ranges_are_of_no_use_is_read_in_one_go(site, fetch, answer):
    site.answer = answer
    assert await fetch() == MODEL


async def test_another_digest_that_a_server_reports_does_not_judge(site, fetch):
    other = '"' + "0" * 64 + '"'
    site.answer = lambda request, _: request.send_file(MODEL, ETag=VERSION, X_Linked_Etag=other)
    assert await fetch() == MODEL


async def test_a_cut_answer_without_length_is_gone_on_with(site, fetch):
    cuts = 3

    def answer(request, site):
        nonlocal cuts
        if request.span == FIRST_BYTE:
            request.send_file(MODEL, total="*")
            return
        begin = request.span[0] if request.span else 0
        body = MODEL[begin:][: 500_000 if cuts else None]
        said = {"Content_Range": f"bytes {begin}-{len(MODEL) - 1}/*"} if request.span else {}
        request.send(206 if said else 200, b"", Content_Length="", Transfer_Encoding="chunked", **said)
        request.write(b"%x\r\n" % (len(MODEL) - begin) + body)
        if cuts:
            cuts -= 1
            request.cut()
        else:
            request.write(b"\r\n0\r\n\r\n")

    site.answer = answer
    assert await fetch() == MODEL
    assert site.sent_bytes < 1.2 * len(MODEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"ETag": VERSION}, {}),
        ({"ETag": VERSION}, {"ETag": 'W/"1"', "Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({"x_goog_generation": "1"}, {"x_goog_generation": "2"}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("after", [2, 3, 4])
async def test_versions_are_not_mixed_whatever_tells_them_apart(site, store, old, new, after):
    def answer(request, site):
        is_new = len(site.asked) > after
        request.send_file(OTHER if is_new else MODEL, **(new if is_new else old))

    site.answer = answer
    with contextlib.suppress(SourceFailed):
        await store.fetch(f"{site.url}/m.safetensors", store.selection())
    kept = [store.objects.path_of(row.sha256).read_bytes() for row in store.objects.index.objects()]
    assert kept in ([MODEL], [OTHER])


def by_redirect(request, site):
    if request.path == "/portal":
        request.send(200, b"<html>accept our terms</html>")
    else:
        request.send(302, Location="/portal")


def by_511(request, site):
    request.send(511, b"<html>accept our terms</html>")


def without_length(request, site):
    request.send_chunked(b"<html>accept our terms</html>")


@pytest.mark.parametrize("portal", [by_redirect, by_511, without_length])
@pytest.mark.parametrize("sha256", [SHA256, ""])
async def test_a_portal_of_any_kind_costs_nothing_that_was_there(site, fetch, portal, sha256):
    def answer(request, site):
        if site.sent_bytes > 1_200_000:
            portal(request, site)
        else:
            request.send_file(MODEL, ETag=VERSION)

    site.answer = answer
    with pytest.raises(SourceFailed):
        await fetch(sha256=sha256)
    before, site.answer = site.sent_bytes, lambda request, _: request.send_file(MODEL, ETag=VERSION)
    assert await fetch(sha256=sha256) == MODEL
    assert site.sent_bytes - before <= len(MODEL) - 1_200_000 + 10_000
