"""What no digest pins: a page, a pointer, an error or another file is never kept under a model's name."""

import io
import json
import pickle
import zipfile

import pytest

from fanlight.errors import FanlightError, NotFound
from services.weights.errors import ForeignAnswer, SourceFailed
from services.weights.references.tensors import BadHeader
from tests.fakes.scripted_site import ScriptedSite
from tests.fakes.weight_sites import safetensors

MODEL = safetensors({"w": b"7" * 3_000_000})
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
XML = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'
FOREIGN = [
    (PAGE, "a web page.*log in there"),
    (b"\xef\xbb\xbf  <!-- cached -->\n<HTML lang=en>" + b" " * 9000, "a web page"),
    (POINTER, "a Git LFS pointer.*/resolve/"),
    (b'{"error": "Invalid username or password."}', "a JSON error .Invalid username"),
    (b'[{"a": 1}]', "a JSON document"),
    (XML, "an XML error .NoSuchKey"),
    (b"", "an empty file"),
]


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 3000)
    return out.getvalue()


@pytest.fixture
def site():
    with ScriptedSite(lambda request, site: request.send(404)) as site:
        yield site


@pytest.fixture
def serve(site):
    def body_for_all(body: bytes, **headers: str) -> None:
        site.answer = lambda request, site: request.send_file(body, ETag='"1"', **headers)

    return body_for_all


def _kept(store) -> list[str]:
    return [row.sha256 for row in store.objects.index.objects()]


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(("body", "what"), FOREIGN)
async def test_what_is_no_model_is_not_kept_and_the_model_is_fetched_later(site, store, body, what, has_ranges):
    def answer(request, _):
        if has_ranges:
            request.send_file(body, ETag='"1"') if body else request.send(416, Content_Range="bytes */0")
            return
        request.send(200, body)

    site.answer = answer
    with pytest.raises(ForeignAnswer, match=what) as caught:
        await store.ensure(f"{site.url}/a.safetensors")
    assert caught.value.part == "source:127.0.0.1"
    assert _kept(store) == []
    assert not list(store.objects.parts.iterdir())
    site.answer = lambda request, _: request.send_file(MODEL, ETag='"2"')
    assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == MODEL


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "download", "a.gguf"])
async def test_a_page_is_kept_under_no_name_of_a_model(store, site, serve, name):
    serve(PAGE)
    with pytest.raises(ForeignAnswer, match=f"a web page instead of {name}"):
        await store.ensure(f"{site.url}/{name}")
    assert _kept(store) == []


@pytest.mark.parametrize("status", [201, 202, 203, 204, 300, 301, 302, 304, 402, 409, 418])
async def test_every_other_status_is_an_error_that_names_it(store, site, status):
    site.answer = lambda request, _: request.send(status, b"" if status in (204, 304) else b"something")
    with pytest.raises(FanlightError, match=f"127.0.0.1 answers {status}"):
        await store.ensure(f"{site.url}/a.safetensors")
    assert _kept(store) == []


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("a.safetensors", MODEL[:-5], "not a sound safetensors file"),
        ("a.safetensors", b"\x00" * 2_000_000, "not a sound safetensors file"),
        ("a.ckpt", b"7" * 2_000_000, "neither a zip archive nor a pickle"),
        ("pytorch_model.bin", b"7" * 20_000, "neither a zip archive nor a pickle"),
        ("a.pth", _zip()[:-40], "cut off: its zip archive has no end"),
        ("a.gguf", b"7" * 20_000, "no GGUF file"),
    ],
)
async def test_a_file_that_is_not_of_its_names_kind_is_refused(store, site, serve, name, body, why):
    serve(body)
    with pytest.raises(BadHeader, match=why):
        await store.ensure(f"{site.url}/{name}")
    assert _kept(store) == []
    assert not list(store.objects.parts.iterdir())


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.safetensors", safetensors({"w": b"7"})),
        ("a.ckpt", pickle.dumps({"w": 1}, protocol=2)),
        ("pytorch_model.bin", _zip()),
        ("weights.bin", b"\x07" * 3000),
        ("a.gguf", b"GGUF" + b"\x00" * 50),
        ("config.json", b'{"error_weight": 1, "message": "x"}'),
        ("README.md", b"<html><h1>A model</h1></html>"),
    ],
)
async def test_a_file_of_its_names_kind_is_kept(store, site, serve, name, body):
    serve(body)
    assert (await store.ensure(f"{site.url}/{name}")).read_bytes() == body


async def test_an_address_of_a_hubs_page_leads_to_the_file(store, site):
    def answer(request, _):
        is_file = request.path == "/org/m/resolve/main/a.safetensors?download=true"
        request.send_file(MODEL, ETag='"1"') if is_file else request.send(200, PAGE)

    site.answer = answer
    path = await store.ensure(f"{site.url}/org/m/blob/main/a.safetensors?download=true")
    assert path.read_bytes() == MODEL
    assert not any("/blob/" in each for each in site.asked)


async def test_an_address_of_another_host_with_blob_in_it_is_taken_as_it_is_where_that_is_right(settings, site, store):
    def answer(request, _):
        request.send_file(MODEL, ETag='"1"') if "/blob/" in request.path else request.send(404)

    site.answer = answer
    url = f"{site.url}/a/b/blob/c/a.safetensors"
    store._planner.resolver._hub = "https://hub.example"
    assert (await store.ensure(url)).read_bytes() == MODEL


async def test_a_page_in_place_of_a_repositorys_small_file_is_refused(store, site):
    rows = [{"rfilename": "model.safetensors", "size": len(MODEL)}, {"rfilename": "config.json", "size": len(PAGE)}]
    listing = json.dumps({"id": "org/m", "sha": "a" * 40, "siblings": rows}).encode()

    def answer(request, _):
        if request.path.startswith("/api/"):
            request.send(200, listing)
            return
        request.send_file(MODEL) if request.path.endswith("safetensors") else request.send(200, PAGE)

    site.answer = answer
    store._planner.resolver._hub = site.url
    with pytest.raises(ForeignAnswer, match=r"a web page instead of config\.json"):
        await store.ensure("hf:org/m")


async def test_a_page_in_place_of_a_hubs_list_is_said(store, site, serve):
    serve(PAGE)
    store._planner.resolver._hub = site.url
    with pytest.raises(ForeignAnswer, match=r"hf:org/m: .*a web page instead of JSON.*log in"):
        await store.ensure("hf:org/m")


async def test_the_next_source_is_taken_where_one_sends_a_page(store, site):
    site.answer = lambda request, _: (
        request.send(200, PAGE) if request.path == "/page" else request.send_file(MODEL, ETag='"1"')
    )
    from tests.integration.weights.test_fetch_faults import _use_manifest

    urls = [f"{site.url}/page", f"{site.url}/file"]
    assert (await store.ensure(_use_manifest(store, urls, MODEL))).read_bytes() == MODEL


async def test_a_missing_file_blames_no_source(store, site):
    with pytest.raises(NotFound) as caught:
        await store.ensure(f"{site.url}/a.safetensors")
    assert caught.value.part == ""


async def test_a_source_that_breaks_is_named_as_the_part_that_failed(store, site):
    store._tools.sleep = _no_sleep
    site.answer = lambda request, _: request.send(500)
    with pytest.raises(SourceFailed) as caught:
        await store.ensure(f"{site.url}/a.safetensors")
    assert caught.value.part == "source:127.0.0.1"


async def _no_sleep(wait_s: float) -> None:
    pass
