import asyncio
from typing import NamedTuple

import pytest

from fanlight.errors import InvalidField, NodeFault
from services.weights.errors import NotHeld
from services.weights.provision import Provision
from services.weights.store.fetching import SOURCE
from tests.fakes.range_server import Fault
from tests.fakes.weight_sites import put_repository, safetensors


class Usage(NamedTuple):
    free: int


MODEL = safetensors({"unet": b"u" * 3_000_000})
OTHER = safetensors({"b": b"b" * 2_000_000})


@pytest.fixture
def repository(server):
    files = {"unet/diffusion_pytorch_model.safetensors": MODEL, "unet/config.json": b"{}", "model_index.json": b"{}"}
    put_repository(server, "org/model", files)
    return "hf:org/model"


async def test_a_worker_that_asks_for_nothing_opens_nothing(settings, tmp_path):
    async with Provision(settings()) as provision:
        assert list(provision.inventory()) == []
        assert provision.link_bps == 0
    assert not (tmp_path / "store").exists()


async def test_what_a_task_needs_is_fetched_and_cannot_be_evicted_meanwhile(settings, repository):
    async with Provision(settings()) as provision, provision.obtain(repository) as path:
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == MODEL
        objects = (await provision.store()).objects
        assert all(not objects.remove(row.sha256) for row in objects.index.objects())


async def test_the_inventory_names_what_is_held_and_by_which_references(settings, repository):
    async with Provision(settings()) as provision:
        async with provision.obtain(repository):
            pass
        (held,) = provision.inventory()
    assert (held.name, held.references) == ("org/model", (repository,))
    # Both configurations are one object.
    assert held.size_bytes == len(MODEL) + 2


async def test_the_inventory_is_read_again_only_when_the_store_has_changed(settings, repository):
    async with Provision(settings()) as provision:
        async with provision.obtain(repository):
            pass
        before = provision.inventory()
        assert provision.inventory() is before
        await (await provision.store()).run((await provision.store()).objects.drop_view, "org/model")
        assert list(provision.inventory()) == []


async def test_a_new_process_knows_what_an_earlier_one_has_fetched(settings, repository):
    async with Provision(settings()) as provision, provision.obtain(repository):
        pass
    async with Provision(settings(offline=True)) as later:
        assert [held.name for held in later.inventory()] == ["org/model"]


async def test_offline_what_is_held_is_had_without_a_request(settings, server, repository):
    async with Provision(settings()) as provision, provision.obtain(repository):
        pass
    server.seen.clear()
    async with Provision(settings(offline=True)) as provision, provision.obtain(repository) as path:
        assert (path / "unet/config.json").read_bytes() == b"{}"
    assert server.seen == []


async def test_offline_a_reference_never_fetched_is_refused_by_name(settings, server, repository):
    async with Provision(settings(offline=True)) as provision:
        with pytest.raises(NotHeld, match="hf:org/model was never fetched here"):
            async with provision.obtain(repository):
                pass
    assert server.seen == []


async def test_offline_the_missing_file_and_its_source_are_named(settings, server):
    async with Provision(settings(offline=True)) as provision:
        with pytest.raises(
            NotHeld, match=r"annotator-hed: ControlNetHED.pth is not in the store.*hf:lllyasviel/Annotators"
        ):
            async with provision.obtain("annotator-hed"):
                pass
    assert server.seen == []


async def test_a_reference_that_parses_to_nothing_opens_no_store(settings, tmp_path):
    async with Provision(settings()) as provision:
        with pytest.raises(InvalidField, match="unknown prefix"):
            async with provision.obtain("what:is/this"):
                pass
    assert not (tmp_path / "store").exists()


async def test_two_tasks_that_want_the_same_share_one_download(settings, server, repository):
    async with Provision(settings()) as provision:

        async def ask():
            async with provision.obtain(repository) as path:
                return path

        first, second = await asyncio.gather(ask(), ask())
    assert first == second
    sent = sum(count for path, count in server.sent_bytes.items() if path.startswith("/cdn/"))
    assert sent <= len(MODEL) + 2


async def test_who_waits_for_anothers_download_sees_how_it_stands(settings, server, repository):
    path = next(path for path in server.files if path.startswith("/cdn/") and len(server.files[path]) > 2_000_000)
    # The first piece comes and begins the download; the others are held back until the second caller has seen it.
    server.faults[path] = [Fault(), *[Fault(stall_after=0)] * 20]
    reports, begun, has_seen = [], asyncio.Event(), asyncio.Event()

    def begin(progress):
        if progress.total_bytes == len(MODEL):
            begun.set()

    def see(progress):
        reports.append(progress)
        if progress.source == SOURCE and progress.done_bytes:
            has_seen.set()

    async def ask(provision, report):
        async with provision.obtain(repository, report=report) as place:
            return place

    async with Provision(settings()) as first, Provision(settings()) as second, asyncio.TaskGroup() as group:
        one = group.create_task(ask(first, begin))
        await asyncio.wait_for(begun.wait(), 30)
        two = group.create_task(ask(second, see))
        await asyncio.wait_for(has_seen.wait(), 30)
        server.faults[path].clear()
        server.release.set()
    assert one.result() == two.result()
    last = reports[-1].whole
    assert last.done_bytes == last.total_bytes > 2_000_000
    assert server.sent_bytes[path] <= len(MODEL) + 1


async def test_progress_adds_up_over_the_files_of_a_reference(settings, server):
    put_repository(
        server, "org/two", {"a/model.safetensors": MODEL, "b/model.safetensors": safetensors({"b": b"b" * 2_000_000})}
    )
    reports = []
    async with Provision(settings()) as provision, provision.obtain("hf:org/two", report=reports.append):
        pass
    last = reports[-1].whole
    assert last.done_bytes == last.total_bytes > 5_000_000
    assert [t.whole.done_bytes for t in reports] == sorted(t.whole.done_bytes for t in reports)
    assert last.reference == "hf:org/two"


async def test_a_hub_is_not_queried_again_for_every_image(settings, server, repository):
    async with Provision(settings()) as provision:
        for _ in range(3):
            async with provision.obtain(repository):
                pass
    assert sum(seen.path.startswith("/api/") for seen in server.seen) == 1


async def test_a_folder_that_cannot_be_used_is_named(settings, tmp_path, repository):
    (tmp_path / "store").write_bytes(b"a file stands here")
    async with Provision(settings()) as provision:
        with pytest.raises(NodeFault, match=r"FANLIGHT_WEIGHTS_DIR .*store"):
            async with provision.obtain(repository):
                pass
        assert list(provision.inventory()) == []


async def test_a_worker_reports_how_much_prefetched_weights_may_fill_which_is_nothing_where_its_link_is_capped(
    settings, repository
):
    async with Provision(settings(budget_bytes=10**12)) as provision:
        assert provision.room_bytes == 10**12
    async with Provision(settings(bandwidth_bps=10**6, budget_bytes=10**12)) as provision:
        assert provision.room_bytes == 0
    async with Provision(settings(daily_bytes=10**9)) as provision:
        assert provision.room_bytes == 0
    async with Provision(settings(offline=True)) as provision:
        assert provision.room_bytes == 0


async def test_without_a_budget_the_room_is_what_is_held_and_what_the_disk_has_free(settings, repository, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free=10**9))
    async with Provision(settings()) as provision:
        assert provision.room_bytes == 10**9
        async with provision.obtain(repository):
            pass
        assert provision.room_bytes == 10**9 + len(MODEL) + 2
