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
from fanlight.errors import FanlightError, InvalidInput

if TYPE_CHECKING:
    from fanlight.cli.service_plan import Addresses, ProcessPlan
    from fanlight.cli.supervisor import WaitReady
    from fanlight.client import AsyncClient

# How the services word it; they do not know this command's options.
CANNOT_LISTEN = "cannot listen on"
ASK_EVERY_S = 0.2


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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the services' logs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run all of Fanlight on this machine until Ctrl-C: gateway, preprocessor and diffusion."""
    from fanlight.cli.output import say
    from fanlight.cli.service_plan import ProcessPlan, default_data, require_extras

    require_extras()
    _require_roots(os.environ)
    folder = (data or default_data()).absolute()
    plan = ProcessPlan(data=folder, http=http, grpc=grpc, report=say, follow=say if verbose else None)
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

    return AsyncClient(addresses.local_grpc, token=_token(), ca_file=_ca_file())


def _token() -> str:
    """The token that the gateway started here takes from clients."""
    if token := os.environ.get("FANLIGHT_CLIENT_TOKEN"):
        return token
    file = os.environ.get("FANLIGHT_CLIENT_TOKEN_FILE")
    return read_text(Path(file)).strip() if file else ""


def _require_roots(environ: Mapping[str, str]) -> None:
    """InvalidInput for a gateway with TLS that its own workers could not trust."""
    if environ.get("FANLIGHT_TLS_CERT_FILE") and not environ.get("FANLIGHT_TLS_CA_FILE"):
        raise InvalidInput(
            "FANLIGHT_TLS_CERT_FILE is set: set FANLIGHT_TLS_CA_FILE too, to the roots that signed it; the workers here"
            " call the gateway with TLS"
        )


def _ca_file() -> Path | None:
    """Only a gateway with a certificate speaks TLS."""
    file = os.environ.get("FANLIGHT_TLS_CA_FILE")
    return Path(file) if file and os.environ.get("FANLIGHT_TLS_CERT_FILE") else None
