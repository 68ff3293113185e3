"""The start of a worker beside others: the wait for a gateway that starts too, and what it says of itself."""

import asyncio

import pytest

from services.worker.retry import Env
from services.worker.start import private_bytes, say_warm, until_listens

LIMIT_S = 30


async def listening(port: int = 0) -> asyncio.Server:
    return await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)


def port_of(server: asyncio.Server) -> int:
    return server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("gateway", ["gateway.example:1", "127.0.0.1:1,127.0.0.1:2"])
async def test_a_gateway_elsewhere_is_not_waited_for(gateway):
    async with asyncio.timeout(LIMIT_S):
        await until_listens(gateway, asyncio.Event(), wait_s=1e9, env=Env())


async def test_a_gateway_that_comes_up_is_waited_for():
    server = await listening()
    port = port_of(server)
    server.close()
    await server.wait_closed()
    waiting = asyncio.create_task(until_listens(f"127.0.0.1:{port}", asyncio.Event(), wait_s=1e9, env=Env()))
    await asyncio.wait({waiting}, timeout=0.2)
    assert not waiting.done()

    async with await listening(port):
        await asyncio.wait_for(waiting, LIMIT_S)


async def test_the_wait_ends_with_its_limit_and_with_the_worker():
    server = await listening()
    gateway = f"127.0.0.1:{port_of(server)}"
    server.close()
    await server.wait_closed()
    stop = asyncio.Event()
    stop.set()

    async with asyncio.timeout(LIMIT_S):
        await until_listens(gateway, asyncio.Event(), wait_s=0.01, env=Env())
        await until_listens(gateway, stop, wait_s=1e9, env=Env())


def test_what_a_process_has_for_itself_leaves_out_mapped_weights(tmp_path):
    file = tmp_path / "smaps_rollup"
    file.write_text(
        "00-ff ---p 0 00:00 0 [rollup]\nRss: 900 kB\nPrivate_Clean:      700 kB\nPrivate_Dirty:      200 kB\n"
    )

    assert private_bytes(file) == 200 * 1024
    assert private_bytes(tmp_path / "absent") == 0


def test_the_line_has_cores_memory_and_cards(capsys):
    say_warm(cores=1.024, cards=2)

    words = capsys.readouterr().out.split()
    assert words[:2] == ["warm", "cores=1.02"]
    assert words[3] == "cards=2"
