"""The fake hub is like the hub: huggingface_hub's own client takes a repository from it."""

from pathlib import Path

import pytest

from tests.fakes.weight_sites import put_repository, safetensors

huggingface_hub = pytest.importorskip("huggingface_hub")


def test_the_hubs_own_client_and_ours_get_the_same_files(server, tmp_path, settings):
    files = {"config.json": b"{}", "model.safetensors": safetensors({"w": b"1" * 5000})}
    put_repository(server, "org/m", files)
    folder = Path(huggingface_hub.snapshot_download("org/m", endpoint=server.url, cache_dir=tmp_path / "theirs"))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files


async def test_ours_gets_the_same(server, store):
    files = {"config.json": b"{}", "model.safetensors": safetensors({"w": b"1" * 5000})}
    put_repository(server, "org/m", files)
    folder = await store.ensure("hf:org/m")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
