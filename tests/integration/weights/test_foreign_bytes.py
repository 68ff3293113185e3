"""What no digest pins: foreign bytes are never kept under a model's name, and two versions are never mixed."""

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator

import pytest

from fanlight.errors import FanlightError
from services.weights.errors import SourceFailed
from services.weights.references.tensors import BadHeader
from tests.fakes.scripted_site import Request, ScriptedSite
from tests.fakes.weight_sites import safetensors
from tests.fakes.weight_stores import open_store

VERSION = '"1"'
MODEL = safetensors({"w": bytes(range(256)) * 8000})
OTHER = safetensors({"w": bytes(reversed(range(256))) * 8000})
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4265146304\n"
FOREIGN = {
    "a page": PAGE,
    "a page in capitals": b"\xef\xbb\xbf\r\n <HTML>\n<HEAD><TITLE>x</TITLE></HEAD></HTML>",
    "a page after a comment": b"<!-- made by a router -->\n<html></html>",
    "a page of XHTML": b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML"><html></html>',
    "a page without html": b"<script>location='/login'</script>",
    "a large page": b"<html>" + b"<p>terms</p>" * 200_000,
    "a pointer": POINTER,
    "an older pointer": POINTER.replace(b"git-lfs.github.com", b"hawser.github.com"),
    "a JSON error": b'{"error": "Repository not found"}',
    "a nested JSON error": b'{"error": {"code": 404, "message": "gone"}}',
    "a JSON document": b'[{"id": 1}]',
    "an XML error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "an XML error without a head": b"<Error><Code>NoSuchKey</Code></Error>",
    "a sentence": b"Too many requests, please try again later.",
    "nothing": b"",
}


@pytest.fixture
def site() -> Iterator[Callable[[Callable[[Request], None]], ScriptedSite]]:
    with contextlib.ExitStack() as stack:
        yield lambda answer: stack.enter_context(ScriptedSite(answer))


async def _fetch(store, url, **more):
    return await store.fetch(url, store.selection(), **more)


def _kept(store):
    return [path.read_bytes() for path in store.objects.folder.glob("objects/??/*") if path.is_file()]


@pytest.mark.parametrize(("name", "has_ranges"), [("m.safetensors", True), ("m.ckpt", False), ("m", True)])
@pytest.mark.parametrize("what", FOREIGN)
async def test_foreign_bytes_are_refused_and_the_file_comes_when_it_is_there(site, store, what, has_ranges, name):
    if (what, name) == ("a sentence", "m"):
        pytest.skip("a file without an ending, such as LICENSE, may be a text")
    is_there = False
    right = _zip() if name == "m.ckpt" else MODEL

    def answer(request):
        body = right if is_there else FOREIGN[what]
        if has_ranges and body:
            request.send_range(body, ETag=VERSION)
        else:
            request.send(200, body)

    url = f"{site(answer).url}/{name}"
    with pytest.raises(FanlightError) as caught:
        await _fetch(store, url)
    assert url in caught.value.message
    assert caught.value.part == "source:127.0.0.1"
    assert _kept(store) == []
    is_there = True
    assert (await _fetch(store, url)).path.read_bytes() == right


@pytest.mark.parametrize("status", [201, 202, 203, 204, 205, 226, 300, 301, 302, 304, 307, 402, 409, 418])
async def test_any_other_status_is_an_error_that_names_it(site, store, status):
    url = site(lambda request: request.send(status, b"" if status in (204, 304) else MODEL)).url
    with pytest.raises(SourceFailed, match=str(status)) as caught:
        await _fetch(store, f"{url}/m.safetensors")
    assert caught.value.part == "source:127.0.0.1"
    assert _kept(store) == []


@pytest.mark.parametrize(
    ("what", "advice"),
    [("a page", "log in"), ("a pointer", "LFS pointer.*/resolve/"), ("an XML error", "AccessDenied")],
)
async def test_the_error_says_what_it_is_and_what_to_do(site, store, what, advice):
    url = site(lambda request: request.send(200, FOREIGN[what])).url
    with pytest.raises(SourceFailed, match=advice):
        await _fetch(store, f"{url}/m.safetensors")


async def test_the_address_of_a_files_page_is_taken_for_the_file(site, store):
    def answer(request):
        if "/blob/" in request.path:
            request.send(200, PAGE, Content_Type="text/html")
        elif request.path.startswith("/org/m/resolve/main/"):
            request.send_range(MODEL, ETag=VERSION)
        else:
            request.send(404)

    there = site(answer)
    fetched = await _fetch(store, f"{there.url}/org/m/blob/main/m.safetensors")
    assert fetched.path.read_bytes() == MODEL


async def test_a_server_may_have_a_folder_of_that_name(site, store):
    def answer(request):
        if "/blob/" in request.path:
            request.send_range(MODEL, ETag=VERSION)
        else:
            request.send(404)

    fetched = await _fetch(store, f"{site(answer).url}/store/blob/m.safetensors")
    assert fetched.path.read_bytes() == MODEL


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, protocol=2))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("m.safetensors", MODEL[: len(MODEL) // 2]),
        ("m.safetensors", MODEL + b"more"),
        ("m.safetensors", (7).to_bytes(8, "little") + b"no JSON" + bytes(2_000_000)),
        ("small.safetensors", MODEL[:5000]),
        ("m.ckpt", bytes(3_000_000)),
        ("m.pt", b"\x80\x09" + bytes(100)),
        ("pytorch_model.bin", b"\x1f\x8b" + bytes(2_000_000)),
        ("m.pth", _zip()[:-30]),
        ("m.gguf", b"GGML" + bytes(2_000_000)),
    ],
)
async def test_a_file_is_what_its_name_promises(site, store, name, body):
    url = f"{site(lambda request: request.send_range(body, ETag=VERSION)).url}/{name}"
    with pytest.raises(BadHeader, match=name):
        await _fetch(store, url)
    assert _kept(store) == []


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("m.ckpt", _zip()),
        ("m.pt", pickle.dumps({"a": 1}, protocol=2)),
        ("m.pth", pickle.dumps({"a": bytes(2_000_000)}, protocol=4)),
        ("notes.txt", b"a sentence"),
        ("config.json", b'{"type": "clip", "message": "kept", "layers": 2}'),
        ("vocab.json", json.dumps({f"w{n}": n for n in range(50)}).encode()),
        ("weights.bin", bytes(1_500_000)),
        ("model.onnx", b"\x08\x07" + bytes(100)),
        ("page.html", PAGE),
    ],
)
async def test_sound_files_of_any_kind_are_kept(site, store, name, body):
    url = f"{site(lambda request: request.send_range(body, ETag=VERSION)).url}/{name}"
    assert (await _fetch(store, url)).path.read_bytes() == body


async def test_a_repository_may_have_an_empty_file_and_a_page(site, settings):
    files = {"model.safetensors": safetensors({"a": b"1234"}), "config.json": b"{}", "tokenizer/empty.txt": b""}
    rows = [{"rfilename": name, "size": len(body)} for name, body in files.items()]

    def answer(request):
        if request.path.startswith("/api/"):
            request.send(200, json.dumps({"sha": "a" * 40, "siblings": rows}).encode())
        else:
            request.send_range(files[request.path.split("/resolve/" + "a" * 40 + "/")[1]], ETag=VERSION)

    async with open_store(settings(hf_endpoint=site(answer).url)) as store:
        await _fetch(store, "hf:org/m")
        assert {files["model.safetensors"], files["config.json"]} <= set(_kept(store))


@pytest.mark.parametrize(
    "versions",
    [
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({"ETag": '"1"'}, {}),
        ({"ETag": '"1"'}, {"ETag": 'W/"1"', "Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({"x_goog_generation": "1"}, {"x_goog_generation": "2"}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("after", [2, 3, 4])
async def test_two_versions_of_a_file_are_never_mixed(site, store, versions, after):
    def answer(request):
        is_new = len(request.site.asked) > after
        request.send_range(OTHER if is_new else MODEL, **versions[is_new])

    with contextlib.suppress(SourceFailed):
        await _fetch(store, f"{site(answer).url}/m.safetensors")
    assert _kept(store) in ([MODEL], [OTHER])


async def test_a_part_of_another_day_is_not_joined_to_a_new_version(site, store):
    new = False

    def answer(request):
        if new:
            request.send_range(OTHER, Last_Modified="Tue, 02 Jan 2024 00:00:00 GMT")
        elif len(request.site.asked) > 4:
            request.send(500)
        else:
            request.send_range(MODEL, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT")

    url = f"{site(answer).url}/m.safetensors"
    with pytest.raises(SourceFailed):
        await _fetch(store, url)
    new = True
    await _fetch(store, url)
    assert _kept(store) == [OTHER]


def _as_page(request, there):
    request.send(200, PAGE, Content_Type="text/html")


def _by_redirect(request, there):
    if request.path == "/portal":
        request.send(200, PAGE, Content_Type="text/html")
    else:
        request.send(302, Location="/portal")


def _as_511(request, there):
    request.send(511, PAGE, Content_Type="text/html")


def _without_length(request, there):
    request.send_chunked(200, PAGE)


@pytest.mark.parametrize("portal", [_as_page, _by_redirect, _as_511, _without_length])
@pytest.mark.parametrize("is_pinned", [True, False])
async def test_a_portal_in_the_middle_costs_nothing_that_was_there(site, store, portal, is_pinned):
    import hashlib

    is_open, after = False, 1_200_000

    def answer(request):
        if not is_open and request.site.sent_bytes > after:
            portal(request, request.site)
        else:
            request.send_range(MODEL, ETag=VERSION)

    there = site(answer)
    sha256 = hashlib.sha256(MODEL).hexdigest() if is_pinned else ""
    with pytest.raises(SourceFailed):
        await _fetch(store, f"{there.url}/m.safetensors", sha256=sha256)
    is_open, before = True, there.sent_bytes
    fetched = await _fetch(store, f"{there.url}/m.safetensors", sha256=sha256)
    assert fetched.path.read_bytes() == MODEL
    assert there.sent_bytes - before <= len(MODEL) - after + 10_000


async def test_a_portal_that_goes_away_meanwhile_is_waited_for(site, store):
    pages = 3

    def answer(request):
        nonlocal pages
        if request.site.sent_bytes > 600_000 and pages:
            pages -= 1
            request.send(200, PAGE, Content_Type="text/html")
        else:
            request.send_range(MODEL, ETag=VERSION)

    async def sleep(wait_s):
        pass

    store._tools.sleep = sleep
    assert (await _fetch(store, f"{site(answer).url}/m.safetensors")).path.read_bytes() == MODEL
