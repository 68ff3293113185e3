"""The command `fanlight up`: its options, its signals, and the one line it prints when everything is ready."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import AsJson
from fanlight.cli.session import read_text
from fanlight.errors import FanlightError

if TYPE_CHECKING:
    from fanlight.cli.service_plan import Addresses, ProcessPlan
    from fanlight.cli.supervisor import WaitReady
    from fanlight.client import AsyncClient

# How the services word it; they do not know this command's options.
CANNOT_LISTEN = "cannot listen on"
ASK_EVERY_S = 0.2
# Of the workers' own invitation, where they need one: it lasts as long as one can, and so do restarts of the workers.
OWN_INVITE = "the workers of `fanlight up`"
INVITE_USES, INVITE_TTL_S = 1_000, 30 * 86_400.0


def up(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="FANLIGHT_GATEWAY_DATA_DIR",
            help="Where jobs, images and logs are kept. If left out: fanlight in the XDG data home.",
        ),
    ] = None,
    http: Annotated[
        str, typer.Option(metavar="ADDRESS", envvar="FANLIGHT_GATEWAY_HTTP", help="HOST:PORT for HTTP.")
    ] = "127.0.0.1:8080",
    grpc: Annotated[
        str, typer.Option(metavar="ADDRESS", envvar="FANLIGHT_GATEWAY_GRPC", help="HOST:PORT for gRPC.")
    ] = "127.0.0.1:50051",
    workers: Annotated[
        str,
        typer.Option(
            metavar="STAGE=N,...",
            help="Worker processes of each stage, such as diffusion=2,preprocess=1. auto: as many as help on this"
            " machine's cores, memory and cards.",
        ),
    ] = "diffusion=auto,preprocess=auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the services' logs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run all of Fanlight on this machine until Ctrl-C: gateway, preprocessor and diffusion."""
    from fanlight.cli.output import say
    from fanlight.cli.service_plan import ProcessPlan, ca_file_of, default_data, require_extras
    from fanlight.worker_plan import parse_workers

    counts = parse_workers(workers)
    require_extras()
    folder = (data or default_data()).absolute()
    ca_file_of(folder, grpc, os.environ)
    plan = ProcessPlan(
        data=folder,
        http=http,
        grpc=grpc,
        report=say,
        follow=say if verbose else None,
        workers=counts,
        introduce=lambda addresses: introduced(addresses, folder),
    )
    try:
        asyncio.run(run_until_signal(plan, wait_ready=all_registered, as_json=as_json))
    except FanlightError as error:
        if CANNOT_LISTEN in error.message:
            error.message += "; name another with --http or --grpc"
        raise


async def run_until_signal(plan: "ProcessPlan", *, wait_ready: "WaitReady", as_json: bool) -> None:
    """The first signal stops all services in order, a second one kills them."""
    from fanlight.cli.supervisor import run_services

    running, kill_now, is_stopping = asyncio.current_task(), asyncio.Event(), False
    assert running is not None

    def on_signal() -> None:
        nonlocal is_stopping
        if is_stopping:
            kill_now.set()
        else:
            is_stopping = True
            running.cancel()
            # Last, because the terminal may be gone.
            plan.report("stopping once the running work has ended; a second signal stops it at once")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def body(addresses: "Addresses") -> None:
        _print_ready(addresses, as_json=as_json)
        await asyncio.Event().wait()

    try:
        await run_services(plan, wait_ready, body, kill_now=kill_now)
    except asyncio.CancelledError:
        if not is_stopping:
            raise


def _print_ready(addresses: "Addresses", *, as_json: bool) -> None:
    from fanlight.cli.output import print_json_line

    if as_json:
        print_json_line({"http": addresses.http, "grpc": addresses.grpc})
    else:
        print(f"ready http={addresses.http} grpc={addresses.grpc}", flush=True)


async def all_registered(addresses: "Addresses", *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Returns once the gateway knows a live worker of every stage. CallFailed where the gateway cannot be asked."""
    from fanlight.cli.service_plan import STAGES

    async with client_of(addresses) as client:
        while True:
            workers = await client.list_workers()
            if {status.worker.stage for status in workers if status.live} >= STAGES:
                return
            await sleep(ASK_EVERY_S)


def client_of(addresses: "Addresses") -> "AsyncClient":
    """A client of the gateway that was started here, with the token and the CA file that match its settings."""
    from fanlight.client import AsyncClient

    return AsyncClient(addresses.local_grpc, token=_token(), ca_file=addresses.ca_file)


def _token() -> str:
    """The token that the gateway started here takes from clients."""
    if token := os.environ.get("FANLIGHT_CLIENT_TOKEN"):
        return token
    file = os.environ.get("FANLIGHT_CLIENT_TOKEN_FILE")
    return read_text(Path(file)).strip() if file else ""


async def introduced(addresses: "Addresses", data: Path) -> Mapping[str, str]:
    """What the stages need to join the gateway. Nothing where it knows them by their loopback address."""
    if not addresses.is_elsewhere:
        return {}
    async with client_of(addresses) as client:
        for old in await client.nodes.list_invites():
            if old.comment == OWN_INVITE:
                await client.nodes.remove_invite(old.id)
        made = await client.nodes.invite(uses=INVITE_USES, ttl_s=INVITE_TTL_S, comment=OWN_INVITE)
    return {
        "FANLIGHT_WORKER_JOIN_CODE": made.join_code,
        "FANLIGHT_WORKER_STATE_DIR": str(data / "node"),
    }
