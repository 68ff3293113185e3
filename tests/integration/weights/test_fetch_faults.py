"""One file over a link that breaks in every way that servers and links do."""

import asyncio
import errno
import hashlib
import json
import sqlite3
from dataclasses import replace

import pytest

from fanlight.errors import FailedPrecondition, FanlightError, NodeFault, NotFound
from services.weights.errors import DailyCapReached, DiskFull, SourceFailed, TokenRefused, WrongBytes
from services.weights.references.manifest import ByteSpan, ChunkDigests, Manifest, WeightFile
from services.weights.transfer.pacing import MAX_UNREACHABLE_RETRIES
from tests.fakes.range_server import Fault
from tests.fakes.weight_sites import put_repository, safetensors
from tests.fakes.weight_stores import open_store

PATH = "/m.bin"


def _sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


async def _fetch(store, url, sha256=""):
    return await store.fetch(url, store.selection(), sha256=sha256)


def _use_manifest(store, urls, body, **values):
    """Let the store know a file with these sources by the name `it`."""
    values = {"size_bytes": len(body), "sha256": _sha(body), **values}
    file = WeightFile(path="m.safetensors.part", sources=tuple(urls), **values)
    manifest = Manifest(reference="catalog:it", view="me/it", files=(file,), is_chosen=True)
    store._planner.resolver.add(replace(store.catalog, entries={"it": manifest}))
    return "it"


async def test_a_file_comes_whole_and_in_parallel(server, store, body):
    fetched = await _fetch(store, server.put(PATH, body), _sha(body))
    assert fetched.path.read_bytes() == body
    assert fetched.downloaded_bytes == len(body)
    assert len({seen.range for seen in server.seen}) > 3
    assert not list(store.objects.parts.iterdir())


async def test_what_is_held_is_not_fetched_again(server, store, body):
    url = server.put(PATH, body)
    await _fetch(store, url)
    sent = server.total_sent()
    again = await _fetch(store, url)
    assert again.downloaded_bytes == 0
    assert server.total_sent() - sent <= 1


async def test_cut_connections_cost_no_byte_twice(server, store, body):
    server.cut_every = 300_000
    fetched = await _fetch(store, server.put(PATH, body), _sha(body))
    assert fetched.path.read_bytes() == body
    assert fetched.downloaded_bytes == len(body)


async def test_a_stalled_connection_is_left_and_its_bytes_are_kept(server, settings, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(stall_after=400_000)]
    async with open_store(settings(retries=50), stall_s=0.5) as store:
        fetched = await _fetch(store, url, _sha(body))
    assert fetched.path.read_bytes() == body
    assert fetched.downloaded_bytes == len(body)


async def test_servers_that_are_busy_or_broken_are_asked_again(server, settings, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(status=429, retry_after="0"), Fault(status=500), Fault(status=503, retry_after="0")]
    async with open_store(settings(retries=5)) as store:
        assert (await _fetch(store, url, _sha(body))).path.read_bytes() == body


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=503, retry_after="0"), Fault(cut_after=0)])
async def test_the_first_question_is_asked_again_too(server, store, body, fault):
    url = server.put(PATH, body)
    server.question_faults[PATH] = [fault]
    assert (await _fetch(store, url, _sha(body))).path.read_bytes() == body


async def test_retry_after_is_waited_for_before_the_first_byte_too(server, store, body):
    waits = []

    async def sleep(wait_s):
        waits.append(wait_s)

    url = server.put(PATH, body)
    server.question_faults[PATH] = [Fault(status=429, retry_after="17")]
    store._tools.sleep = sleep
    await _fetch(store, url)
    assert waits == [17.0]


async def test_a_hub_that_is_busy_is_asked_again(server, store):
    put_repository(server, "org/m", {"model.safetensors": safetensors({"a": b"1234"})})
    server.faults["/api/models/org/m/revision/main"] = [Fault(status=503, retry_after="0"), Fault(status=500)]
    assert (await store.fetch("hf:org/m", store.selection())).path.exists()


async def test_a_page_in_place_of_a_range_is_refused_at_once(server, store, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(instead=b"<html>login</html>")] * 50
    with pytest.raises(SourceFailed, match="other bytes than the requested range"):
        await _fetch(store, url, _sha(body))
    assert server.sent_bytes[PATH] < 10_000


async def test_a_source_that_gives_a_few_bytes_at_a_time_is_left(server, settings, body):
    url = server.put(PATH, body)
    server.cut_every = 100
    async with open_store(settings()) as store:
        store._tools.sleep = asyncio.sleep
        with pytest.raises(SourceFailed, match=r"too early|broke"):
            await _fetch(store, url, _sha(body))


async def test_a_server_without_ranges_that_always_ends_too_early_is_left(server, store, body):
    url = server.put(PATH, body, has_ranges=False)
    server.cut_every = 1_000_000
    with pytest.raises(SourceFailed, match=r"too early|broke"):
        await _fetch(store, url, _sha(body))


async def test_a_file_that_changes_its_size_in_the_middle_is_fetched_again(server, store, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(cut_after=500_000), Fault(body=body + b"more", etag='"new"')]
    fetched = await _fetch(store, url)
    assert fetched.path.read_bytes() == body + b"more"
    assert fetched.size_bytes == len(body) + 4


async def test_a_hub_that_lies_about_a_small_files_size_is_refused(server, store):
    put_repository(server, "org/m", {"model.safetensors": safetensors({"a": b"1234"})})
    answer = json.loads(server.files["/api/models/org/m/revision/main"].body)
    for row in answer["siblings"]:
        row["size"] += 7
        row.get("lfs", {})["size"] = row["size"]
    server.put_json("/api/models/org/m/revision/main", answer)
    with pytest.raises(WrongBytes, match=r"hf:org/m.*bytes instead of"):
        await store.fetch("hf:org/m", store.selection())


async def test_an_unreachable_server_fails_soon(settings, body):
    waits = []

    async def sleep(wait_s):
        waits.append(wait_s)

    async with open_store(settings(retries=8)) as store:
        store._tools.sleep = sleep
        nowhere = "http://127.0.0.1:9/m.bin"
        # By its address, large in the catalog, and small there.
        for held in (None, body, body[:1000]):
            name = _use_manifest(store, [nowhere], held) if held else nowhere
            waits.clear()
            with pytest.raises(SourceFailed, match="cannot be reached"):
                await store.fetch(name, store.selection())
            assert len(waits) == MAX_UNREACHABLE_RETRIES


async def test_retry_after_is_waited_for(server, settings, body):
    waits = []

    async def sleep(wait_s):
        waits.append(wait_s)

    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(status=429, retry_after="37")] * 2
    async with open_store(settings(connections=1)) as store:
        store._tools.sleep = sleep
        assert (await _fetch(store, url)).path.read_bytes() == body
    assert waits == [37.0, 37.0]


async def test_wrong_bytes_are_refused_and_nothing_stands_where_a_whole_file_is_expected(server, store, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(flip_at=4_000_000)] * 50
    with pytest.raises(WrongBytes, match=url):
        await _fetch(store, url, _sha(body))
    assert not list(store.objects.views.rglob("m.bin"))
    assert store.objects.index.objects() == []


async def test_a_file_that_changes_in_the_middle_is_fetched_again(server, store, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(cut_after=500_000), Fault(etag='"new"')]
    fetched = await _fetch(store, url)
    assert fetched.path.read_bytes() == body


async def test_a_server_without_ranges_is_read_in_one_go_and_again_after_a_cut(server, store, body):
    url = server.put(PATH, body, has_ranges=False)
    server.faults[PATH] = [Fault(), Fault(cut_after=3_000_000)]
    assert (await _fetch(store, url, _sha(body))).path.read_bytes() == body


async def test_a_length_that_lies_is_refused(server, store, body):
    url = server.put(PATH, body)
    server.faults[PATH] = [Fault(extra_length=10)] * 50
    with pytest.raises(FanlightError, match=url):
        await _fetch(store, url)


async def test_a_source_whose_size_is_not_the_manifests_is_refused(server, store, body):
    name = _use_manifest(store, [server.put(PATH, body)], body, size_bytes=len(body) + 1_000_000)
    with pytest.raises(WrongBytes, match=r"it.*bytes instead of"):
        await store.ensure(name)


async def test_the_next_source_is_taken_when_one_is_gone_or_wrong(server, store, body):
    wrong = bytes(reversed(body))
    urls = [server.url + "/gone", server.put("/wrong", wrong), server.put(PATH, body)]
    path = await store.ensure(_use_manifest(store, urls, body))
    assert path.read_bytes() == body


async def test_the_next_source_goes_on_where_the_first_broke_off(server, store, body):
    first, second = server.put("/first", body), server.put(PATH, body)
    server.faults["/first"] = [Fault()] * 6 + [Fault(status=500)] * 50
    path = await store.ensure(_use_manifest(store, [first, second], body))
    assert path.read_bytes() == body
    assert server.sent_bytes["/first"] > 1_000_000
    assert server.total_sent() == len(body) + 2


async def test_a_slow_source_is_left_for_the_next(server, settings, body):
    now = [0.0]
    async with open_store(settings()) as store:
        store._tools.now_s = lambda: now.__setitem__(0, now[0] + 3.0) or now[0]
        slow, fast = server.put("/slow", body), server.put(PATH, body)
        path = await store.ensure(_use_manifest(store, [slow, fast], body))
    assert path.read_bytes() == body
    assert server.sent_bytes[PATH] > 1


async def test_one_bad_chunk_is_fetched_again_alone(server, store, body):
    step = 500_000
    chunks = ChunkDigests(
        chunk_bytes=step, sha256s=tuple(_sha(body[at : at + step]) for at in range(0, len(body), step))
    )
    name = _use_manifest(store, [server.put(PATH, body)], body, chunks=chunks)
    # For both of the first two requests, as either may be the one that has the byte.
    server.faults[PATH] = [Fault(flip_at=10)] * 2
    assert (await store.ensure(name)).read_bytes() == body
    assert server.sent_bytes[PATH] == len(body) + step + 2


async def test_a_token_goes_to_its_own_origin_only(server, settings, body):
    elsewhere = server.put("/cdn/file", body).replace("127.0.0.1", "localhost")
    url = server.put("/private", b"", redirect=elsewhere, token="hf_secret")
    async with open_store(settings(hf_token="hf_secret")) as store:
        assert (await _fetch(store, url)).path.read_bytes() == body
    assert {s.authorization for s in server.seen if s.path == "/private"} == {"Bearer hf_secret"}
    assert {s.authorization for s in server.seen if s.path == "/cdn/file"} == {""}


async def test_a_refused_token_is_said_and_not_shown(server, settings, body):
    url = server.put(PATH, body, token="right")
    async with open_store(settings(hf_token="wrong-secret")) as store:
        with pytest.raises(TokenRefused) as caught:
            await _fetch(store, url)
    assert url in caught.value.message
    assert "wrong-secret" not in caught.value.message


async def test_a_missing_file_names_the_reference(server, store):
    with pytest.raises(NotFound, match="/gone"):
        await _fetch(store, server.url + "/gone")


async def test_a_redirect_without_end_is_refused(server, store):
    url = server.put("/loop", b"", redirect=server.url + "/loop")
    with pytest.raises(SourceFailed, match="redirects more"):
        await _fetch(store, url)


async def test_an_address_that_runs_out_behind_a_redirect_is_asked_for_again(server, store, body):
    signed = server.put("/signed", body)
    url = server.put("/file", b"", redirect=signed)
    server.faults["/signed"] = [Fault(), Fault(status=403), Fault()]
    assert (await _fetch(store, url, _sha(body))).path.read_bytes() == body


async def test_several_processes_share_one_download(server, settings, body):
    url = server.put(PATH, body)
    async with open_store(settings()) as one, open_store(settings()) as two:
        fetched = await asyncio.gather(*(_fetch(s, url, _sha(body)) for s in (one, two, one, two)))
    # Each caller's question costs one byte; the download has an answer already.
    assert server.sent_bytes[PATH] == len(body) + 4
    assert sum(f.downloaded_bytes for f in fetched) == len(body)


async def test_a_days_cap_stops_the_download_and_the_next_day_goes_on(server, settings, body):
    url = server.put(PATH, body)
    day = [86_400.0 * 10]
    capped = settings(daily_bytes=2_000_000)
    async with open_store(capped, wall_s=lambda: day[0]) as store:
        with pytest.raises(DailyCapReached) as caught:
            await _fetch(store, url, _sha(body))
        assert caught.value.retry_after_s == 86_400
    async with open_store(settings(), wall_s=lambda: day[0]) as store:
        fetched = await _fetch(store, url, _sha(body))
    assert fetched.path.read_bytes() == body
    assert fetched.downloaded_bytes <= len(body) - 1_900_000


@pytest.mark.parametrize("said", ["database or disk is full", "disk I/O error"])
async def test_an_index_on_a_full_disk_is_an_error_that_names_the_reference(server, settings, body, monkeypatch, said):
    from services.weights.store.index import Index

    def fail(*_):
        raise sqlite3.OperationalError(said)

    url = server.put(PATH, body)
    monkeypatch.setattr(Index, "add_traffic", fail)
    with pytest.raises((NodeFault, DiskFull), match=r"m\.bin"):
        async with open_store(settings()) as store:
            await _fetch(store, url)


@pytest.mark.parametrize("method", ["set_links", "remember_manifest", "touch"])
async def test_a_disk_that_is_full_when_a_model_is_shown_is_said_too(server, store, body, monkeypatch, method):
    from services.weights.store.index import Index

    def fail(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Index, method, fail)
    with pytest.raises(DiskFull, match=r"m\.bin"):
        await _fetch(store, server.put(PATH, body))


async def test_a_disk_without_room_is_said_before_the_download(server, settings, body, monkeypatch):
    import services.weights.store.objects as objects

    url = server.put(PATH, body)
    async with open_store(settings()) as store:
        full = type("Usage", (), {"free": objects.SPARE_BYTES + 1000})
        monkeypatch.setattr(objects.shutil, "disk_usage", lambda folder: full)
        with pytest.raises(DiskFull, match=r"m\.bin.*1000 are available"):
            await _fetch(store, url)
    assert server.sent_bytes[PATH] <= 2


async def test_a_disk_that_fills_up_in_the_middle_is_said_and_no_half_file_stands(server, settings, body, monkeypatch):
    import os

    url, write, written = server.put(PATH, body), os.pwrite, []

    def full(fd, data, at):
        written.append(len(data))
        if sum(written) > 2_000_000:
            raise OSError(errno.ENOSPC, "no space left")
        return write(fd, data, at)

    async with open_store(settings()) as store:
        with monkeypatch.context() as patched:
            patched.setattr("services.weights.transfer.partial.os.pwrite", full)
            with pytest.raises(DiskFull, match=PATH):
                await _fetch(store, url, _sha(body))
        assert not list(store.objects.views.rglob("*.bin"))
        fetched = await _fetch(store, url, _sha(body))
    assert fetched.path.read_bytes() == body
    assert fetched.downloaded_bytes < len(body)


async def test_without_a_pinned_sha256_the_one_that_the_hub_reports_is_checked(server, store, body):
    url = server.put(PATH, body, headers={"X-Linked-Etag": f'"{"0" * 64}"'})
    with pytest.raises(WrongBytes, match="0000"):
        await _fetch(store, url)
    assert not list(store.objects.views.rglob("*.bin"))


async def test_a_cap_on_bandwidth_is_kept_by_waiting(server, settings, body):
    url, waited, now = server.put(PATH, body), [], [0.0]

    async def sleep(wait_s):
        waited.append(wait_s)
        now[0] += wait_s

    async with open_store(settings(bandwidth_bps=8_000_000, connections=1)) as store:
        store._tools.pacer.now_s, store._tools.pacer.sleep = (lambda: now[0]), sleep
        assert (await _fetch(store, url)).path.read_bytes() == body
    assert 4.0 < sum(waited) <= 5.0


async def test_a_budget_too_small_for_one_model_is_said_and_nothing_of_it_is_evicted_on_the_way(server, settings):
    files = {"config.json": b"{}"} | {f"{n}.safetensors": safetensors({"w": bytes([n]) * 2_000_000}) for n in (1, 2, 3)}
    put_repository(server, "org/m", files)
    async with open_store(settings(budget_bytes=5_000_000)) as store:
        with pytest.raises(DiskFull, match="budget"):
            await store.ensure("hf:org/m")
        small = await store.ensure(server.put("/small", b"1" * 1_000_000))
        assert small.exists()


async def test_many_callers_in_one_process_get_one_view(server, store):
    put_repository(server, "org/m", {"config.json": b"{}", "model.safetensors": safetensors({"w": b"1" * 3_000_000})})
    paths = await asyncio.gather(*(store.ensure("hf:org/m") for _ in range(8)))
    assert len(set(paths)) == 1
    assert sorted(p.name for p in paths[0].iterdir()) == ["config.json", "model.safetensors"]
    assert sum(count for path, count in server.sent_bytes.items() if path.startswith("/cdn/")) < 3_100_000


async def test_what_is_acquired_is_not_evicted_until_it_is_let_go(server, settings):
    first, second = server.put("/first", b"1" * 3_000_000), server.put("/second", b"2" * 3_000_000)
    async with open_store(settings(budget_bytes=4_000_000)) as store:
        async with store.acquire(first) as path:
            with pytest.raises(DiskFull, match="in use"):
                await store.ensure(second)
            assert path.read_bytes() == b"1" * 3_000_000
        assert (await store.ensure(second)).exists()
        assert not path.exists()


async def test_an_inventory_names_the_models_that_are_whole(server, store):
    put_repository(server, "org/m", {"config.json": b"{}", "model.safetensors": safetensors({"w": b"1" * 3_000})})
    await store.ensure("hf:org/m")
    (held,) = await store.inventory()
    assert (held.name, held.is_pinned) == ("org/m", False)
    assert held.size_bytes > 3_000
    await store.run(store.objects.remove, store.objects.objects_of("org/m")[0])
    assert await store.inventory() == [] or (await store.inventory())[0].size_bytes < held.size_bytes


async def test_progress_reports_bytes_rate_and_source(server, store, body):
    reports = []
    await store.ensure(server.put(PATH, body), report=reports.append)
    assert reports[-1].done_bytes == reports[-1].total_bytes == len(body)
    assert all(p.source == server.url.removeprefix("http://") for p in reports)
    assert [p.done_bytes for p in reports] == sorted(p.done_bytes for p in reports)


async def test_a_redirect_to_a_host_that_is_not_allowed_is_not_followed(server, settings, body):
    server.put("/there", body)
    url = server.put(PATH, b"", redirect=server.url.replace("127.0.0.1", "localhost") + "/there")
    async with open_store(settings(url_hosts="127.0.0.1")) as store:
        with pytest.raises(FailedPrecondition, match=r"localhost is not in FANLIGHT_WEIGHTS_URL_HOSTS"):
            await store.ensure(url)
    assert server.sent_bytes["/there"] == 0
    async with open_store(settings(url_hosts="127.0.0.1,localhost")) as store:
        assert (await store.ensure(url)).read_bytes() == body


async def test_a_host_that_a_redirect_led_to_cannot_lead_on_to_others_later(server, settings, body):
    there = server.put("/there", body).replace("127.0.0.1", "localhost")
    url = server.put("/file", b"", redirect=there)
    async with open_store(settings(url_hosts="127.0.0.1,localhost")) as store:
        web = store._tools.web
        web.guard(url)
        remote = await web.probe(url)
        server.files["/there"].redirect = "http://127.0.0.2:9/inside"
        with pytest.raises(FailedPrecondition, match=r"127\.0\.0\.2 is not in FANLIGHT_WEIGHTS_URL_HOSTS"):
            async with web.piece(remote.url, ByteSpan(0, 1), remote):
                pass


async def test_only_the_hosts_that_are_allowed_are_asked(server, settings, body):
    url = server.put(PATH, body)
    async with open_store(settings(url_hosts="weights.example, other.example")) as store:
        with pytest.raises(FailedPrecondition, match="URL_HOSTS"):
            await store.ensure(url)
    assert not server.seen
    async with open_store(settings(url_hosts="weights.example,127.0.0.1")) as store:
        assert (await store.ensure(url)).exists()
