"""Without a digest: a file that changes while it comes is noticed and begun anew; two versions are never mixed."""

import pytest

from services.weights.errors import SourceFailed
from tests.fakes.scripted_site import ScriptedSite
from tests.fakes.weight_sites import safetensors
from tests.fakes.weight_stores import open_store

OLD, NEW = (safetensors({"w": digit * 3_500_000}) for digit in (b"1", b"2"))
LONGER = safetensors({"w": b"3" * 4_500_000})
MONDAY, TUESDAY = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"


@pytest.fixture
def site():
    with ScriptedSite(lambda request, site: request.send(404)) as site:
        yield site


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        ({"Last_Modified": MONDAY}, {"Last_Modified": TUESDAY}),
        ({"ETag": 'W/"1"', "Last_Modified": MONDAY}, {"ETag": 'W/"1"', "Last_Modified": TUESDAY}),
        ({"x_goog_generation": "1"}, {"x_goog_generation": "2"}),
        ({"ETag": '"1"'}, {}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("has_ranges", [True, False])
async def test_a_replacement_in_the_middle_is_kept_alone(site, store, before, after, has_ranges):
    def answer(request, site):
        is_old = len(site.asked) < 4
        body, headers = (OLD, before) if is_old else (NEW, after)
        if not has_ranges:
            request.headers.replace_header("range", "") if "range" in request.headers else None
        if is_old and len(site.asked) == 3 and not has_ranges:
            # The old version breaks off in its middle.
            request.send(200, body[:1_000_000], **{**headers, "Content_Length": str(len(body))})
            request.cut()
        else:
            request.send_file(body, **headers)

    site.answer = answer
    path = await store.ensure(f"{site.url}/a.safetensors")
    assert path.read_bytes() in (OLD, NEW)


async def test_a_replacement_of_another_size_is_kept_alone(site, store):
    site.answer = lambda request, site: request.send_file(OLD if len(site.asked) < 4 else LONGER, Last_Modified=MONDAY)
    assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == LONGER


async def test_where_every_answer_has_another_etag_the_file_comes_in_one_answer(site, store):
    site.answer = lambda request, site: request.send_file(NEW, ETag=f'"{len(site.asked)}"')
    assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == NEW


async def test_where_nothing_tells_versions_apart_one_answer_is_the_file_and_a_cut_begins_anew(site, store):
    cuts = [1_000_000, 2_000_000]

    def answer(request, site):
        if request.span or not cuts:
            request.send_file(NEW if not cuts else OLD)
            return
        request.send(200, OLD[: cuts.pop()], Content_Length=str(len(OLD)))
        request.cut()

    site.answer = answer
    store._tools.sleep = _no_sleep
    assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == NEW


async def test_a_later_process_does_not_go_on_with_another_version(site, settings):
    def cut_after_two(request, site):
        if len(site.asked) > 4:
            request.cut()
            return
        request.send_file(OLD, Last_Modified=MONDAY)

    site.answer = cut_after_two
    async with open_store(settings(retries=0)) as store:
        with pytest.raises(SourceFailed):
            await store.ensure(f"{site.url}/a.safetensors")
    site.answer = lambda request, site: request.send_file(NEW, Last_Modified=TUESDAY)
    async with open_store(settings()) as store:
        assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == NEW


async def test_a_later_process_goes_on_with_the_same_version(site, settings):
    def cut_after_two(request, site):
        if len(site.asked) > 4:
            request.cut()
            return
        request.send_file(OLD, Last_Modified=MONDAY)

    site.answer = cut_after_two
    async with open_store(settings(retries=0)) as store:
        with pytest.raises(SourceFailed):
            await store.ensure(f"{site.url}/a.safetensors")
    site.answer = lambda request, site: request.send_file(OLD, Last_Modified=MONDAY)
    async with open_store(settings()) as store:
        assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == OLD
    assert site.sent_bytes < len(OLD) + 1_000


async def test_a_shorter_file_after_a_longer_one_has_no_bytes_of_it(site, settings):
    def cut(request, site):
        request.send_file(LONGER, ETag='"1"') if len(site.asked) < 4 else request.cut()

    site.answer = cut
    async with open_store(settings(retries=0)) as store:
        with pytest.raises(SourceFailed):
            await store.ensure(f"{site.url}/a.safetensors")
    site.answer = lambda request, site: request.send_file(OLD, ETag='"2"')
    async with open_store(settings()) as store:
        assert (await store.ensure(f"{site.url}/a.safetensors")).read_bytes() == OLD


async def _no_sleep(wait_s: float) -> None:
    pass
