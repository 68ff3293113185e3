"""What one node publishes, another fetches: fewer bytes, the same file."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from services.weights.errors import SourceFailed
from services.weights.mirror.mirrors import FolderDestination, publish
from tests.fakes.range_server import Fault
from tests.fakes.weight_sites import put_repository, safetensors
from tests.fakes.weight_stores import open_store

VAE = "vae/diffusion_pytorch_model.fp16.safetensors"


def trained(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float16).tobytes()


UNET = safetensors({"a": trained(1, 900_000), "b": trained(2, 600_000), "c": trained(3, 7)}, dtype="F16")
VAE_BODY = safetensors({"decoder.a": trained(4, 700_000), "encoder.a": trained(5, 800_000)}, dtype="F16")
FILES = {"model_index.json": b"{}", "unet/diffusion_pytorch_model.fp16.safetensors": UNET, VAE: VAE_BODY}


@pytest.fixture
async def mirror(server, settings, tmp_path):
    """The address of a mirror that another node has published the repository to."""
    put_repository(server, "org/model", FILES)
    async with open_store(settings(dir=tmp_path / "publisher")) as store:
        await store.ensure("hf:org/model")
        done = await store.run(publish, store.objects, ["org/model"], FolderDestination(tmp_path / "mirror"))
    assert done.mirror_bytes < 0.88 * done.size_bytes
    for path in (tmp_path / "mirror").iterdir():
        server.put(f"/mirror/{path.name}", path)
    server.sent_bytes.clear()
    return f"{server.url}/mirror"


def sent(server, start: str) -> int:
    return sum(count for path, count in server.sent_bytes.items() if path.startswith(start))


async def test_the_packed_form_is_fetched_and_the_file_is_the_same_bit_by_bit(server, settings, mirror):
    async with open_store(settings(mirrors=mirror)) as store:
        path = await store.ensure("hf:org/model")
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == UNET
        assert (path / "vae/diffusion_pytorch_model.safetensors").read_bytes() == VAE_BODY
    assert sent(server, "/cdn/") == 0
    packed = sum(count for path, count in server.sent_bytes.items() if path.endswith(".packed"))
    assert packed < 0.87 * (len(UNET) + len(VAE_BODY))


async def test_only_the_frames_of_the_tensors_that_are_wanted_come(server, settings, mirror):
    async with open_store(settings(mirrors=mirror)) as store:
        (plan,) = await store.plan(["hf:org/model"], store.selection("text2img"))
        path = await store.ensure("hf:org/model", "text2img")
        assert (path / "vae/diffusion_pytorch_model.safetensors").stat().st_size < 1_400_000 + 1000
    packed = sum(count for path, count in server.sent_bytes.items() if path.endswith(".packed"))
    assert packed <= plan.fetch_bytes + 2
    assert packed < 0.87 * (len(UNET) + 1_400_000)
    total = plan.fetch_bytes + plan.held_bytes + plan.skipped_bytes + plan.packed_away_bytes
    assert total == sum(len(body) for body in FILES.values())


async def test_a_model_of_the_mirror_alone_is_named_by_its_entry(server, settings, mirror):
    for path in [path for path in server.files if not path.startswith("/mirror/")]:
        del server.files[path]
    async with open_store(settings(mirrors=mirror)) as store:
        path = await store.ensure("org-model")
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == UNET
        assert (path / "model_index.json").read_bytes() == b"{}"


async def test_one_wrong_frame_is_fetched_again_alone(server, settings, mirror):
    name = max((path for path in server.files if path.endswith(".packed")), key=lambda path: len(server.files[path]))
    server.faults[name] = [Fault(flip_at=1_000_000)]
    async with open_store(settings(mirrors=mirror)) as store:
        await store.ensure("hf:org/model")
    assert sent(server, "/cdn/") == 0
    assert sent(server, name) < 2 * len(server.files[name])


async def test_where_the_mirror_is_gone_the_source_itself_is_asked(server, settings, mirror):
    for path in [path for path in server.files if path.endswith(".packed")]:
        del server.files[path]
    async with open_store(settings(mirrors=mirror)) as store:
        path = await store.ensure("hf:org/model")
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == UNET


async def test_a_mirror_that_packs_something_else_under_the_name_is_not_trusted(server, settings, mirror, tmp_path):
    document = json.loads((tmp_path / "mirror/catalog.json").read_text())
    (unet, vae) = [row["sha256"] for row in document["entries"][0]["files"] if row["path"].endswith("safetensors")]
    document["packed"][unet], document["packed"][vae] = document["packed"][vae], document["packed"][unet]
    server.put_json("/mirror/catalog.json", {"packed": document["packed"]})
    async with open_store(settings(mirrors=mirror)) as store:
        path = await store.ensure("hf:org/model")
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == UNET


@pytest.mark.parametrize("answer", [b"no json", b'{"packed": {"x": {"frames": [[0, 1, ""]], "sources": []}}}', b"[]"])
async def test_a_mirror_whose_catalog_cannot_be_read_costs_nothing_but_its_forms(server, settings, mirror, answer):
    server.put("/mirror/catalog.json", answer)
    async with open_store(settings(mirrors=mirror)) as store:
        path = await store.ensure("hf:org/model")
        assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == UNET


@pytest.mark.parametrize("answer", [b"<html>please log in</html>", b'{"error": "down"}', b""])
async def test_a_page_does_not_replace_the_catalog_that_was_read_last(server, settings, mirror, answer):
    for body in (None, answer, answer):
        if body is not None:
            server.put("/mirror/catalog.json", body)
        async with open_store(settings(mirrors=mirror)) as store:
            await store.plan(["org-model"], store.selection())
            assert "org-model" in store.catalog.entries


async def test_a_mirror_allows_no_pickle(server, settings, mirror):
    entry = {"name": "evil", "view": "e/v", "kind": "", "is_chosen": True}
    entry["files"] = [{"path": "m.bin", "bytes": 3, "sha256": "0" * 64, "sources": ["./m"]}]
    server.put_json("/mirror/catalog.json", {"entries": [entry]})
    async with open_store(settings(mirrors=mirror)) as store:
        await store.plan(["sd15"], store.selection())
        assert "evil" not in store.catalog.entries
        assert "0" * 64 not in store.catalog.pinned_pickles()


async def test_a_model_whose_only_source_is_a_mirror_that_is_gone_is_named(server, settings, mirror):
    for path in [path for path in server.files if path.endswith(".packed")]:
        del server.files[path]
    async with open_store(settings(mirrors=mirror)) as store:
        with pytest.raises(Exception, match="org-model") as raised:
            await store.ensure("org-model")
    assert not isinstance(raised.value, AssertionError)
    assert isinstance(raised.value, SourceFailed) or raised.value.reason == "NOT_FOUND"


async def test_publishing_twice_writes_nothing_new(server, settings, mirror, tmp_path):
    async with open_store(settings(dir=tmp_path / "publisher")) as store:
        again = await store.run(publish, store.objects, ["org/model"], FolderDestination(tmp_path / "mirror"))
    assert again.written_bytes == 0


async def test_what_does_not_pack_is_written_without_reading_it_into_memory(server, settings, tmp_path, monkeypatch):
    body = safetensors({"a": np.random.default_rng(1).bytes(2_000_000)})
    put_repository(server, "org/noise", {"unet/m.safetensors": body})
    async with open_store(settings(dir=tmp_path / "publisher")) as store:
        held = await store.ensure("hf:org/noise")
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read whole"))
            patched.setattr(FolderDestination, "read", lambda self, name: None)
            done = await store.run(publish, store.objects, ["org/noise"], FolderDestination(tmp_path / "mirror"))
    assert done.mirror_bytes == done.size_bytes == len(body)
    assert (tmp_path / "mirror" / hashlib.sha256(body).hexdigest()).read_bytes() == body
    assert (held / "unet/m.safetensors").read_bytes() == body
