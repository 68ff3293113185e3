"""Images are generated from weights that lie in a store that is read-only, or on a full disk."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fanlight.channel import open_channel
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from fanlight.errors import FanlightError
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.models import make_tiny_model
from tests.fakes.range_server import RangeServer
from tests.fakes.small_disks import fill, read_only, tmpfs
from tests.fakes.weight_sites import put_repository

REQUEST = diffusion_pb2.GenerateRequest(
    model="hf:org/tiny", prompt="a boat", steps=2, seed=5, width_px=64, height_px=64, format="png"
)
LIMIT_S = 120


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
    with RangeServer() as server:
        put_repository(server, "org/tiny", _files(folder / "model"))
        put_repository(server, "org/other", _files(make_tiny_model(folder.parent / "other", seed=1) / "model"))
        yield server.url


@contextlib.contextmanager
def _service(store: Path, hub: str) -> Iterator[str]:
    """The address of a diffusion service that fetches from the hub into the store."""
    settings = {
        "FANLIGHT_WEIGHTS_DIR": str(store),
        "FANLIGHT_WEIGHTS_HF_ENDPOINT": hub,
        "FANLIGHT_WEIGHTS_RETRIES": "1",
        "FANLIGHT_DIFFUSION_FETCH": "any",
        "FANLIGHT_DIFFUSION_GRPC": "127.0.0.1:0",
        "FANLIGHT_DIFFUSION_THREADS": "1",
        "FANLIGHT_DIFFUSION_PRELOAD": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "services.diffusion"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}, cwd=Path.cwd()
    )
    try:
        line = started.stdout.readline()
        ready = re.fullmatch(r"ready grpc=(\S+)\n", line)
        assert ready, line
        yield ready[1]
    finally:
        started.kill()
        started.wait(LIMIT_S)


async def _image(address: str, request: diffusion_pb2.GenerateRequest = REQUEST) -> bytes:
    async with open_channel(address) as channel:
        stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)
        images = [answer.image.data async for answer in stub.Generate(request) if answer.HasField("image")]
    [image] = images
    return image


@pytest.fixture(scope="module")
def filled(hub: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A store that has the model, and the image of `REQUEST`."""
    store = tmp_path_factory.mktemp("filled")
    with _service(store, hub) as address:
        return store, asyncio.run(_image(address))


async def test_a_read_only_store_generates_the_same_image(filled, hub, tmp_path):
    store, image = filled
    with read_only(store, tmp_path / "there") as there, _service(there, hub) as address:
        assert await _image(address) == image
        with pytest.raises(FanlightError, match="read-only") as caught:
            await _refusal(address)
    assert caught.value.field == "model"


async def test_a_store_on_a_full_disk_generates_the_same_image(filled, hub, tmp_path):
    store, image = filled
    with tmpfs(tmp_path / "small", "30m") as small:
        shutil.copytree(store, small / "store", symlinks=True)
        fill(small)
        with _service(small / "store", hub) as address:
            assert await _image(address) == image
            with pytest.raises(FanlightError, match="only 0 are available") as caught:
                await _refusal(address)
    assert caught.value.field == "model"


async def _refusal(address: str) -> None:
    """What asking for a model that is not in the store is answered by."""
    other = diffusion_pb2.GenerateRequest()
    other.CopyFrom(REQUEST)
    other.model = "hf:org/other"
    try:
        await _image(address, other)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
