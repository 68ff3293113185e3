"""The command `fanlight up`: its options, its signals, and the one line it prints."""

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import AsJson
from fanlight.errors import FanlightError

if TYPE_CHECKING:
    from fanlight.cli.up.house import Arrival
    from fanlight.cli.up.plan import Addresses, Plan

# As services say it, who know nothing of our options.
CANNOT_LISTEN = "cannot listen on"


def up(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="FANLIGHT_GATEWAY_DATA_DIR",
            help="Where jobs, pictures and logs are kept. If left out: fanlight in the XDG data home.",
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
    from fanlight.cli.up.plan import Plan, default_data, require_extras
    from fanlight.cli.up.registered import all_registered

    require_extras()
    folder = (data or default_data()).absolute()
    plan = Plan(data=folder, http=http, grpc=grpc, tell=say, follow=say if verbose else None)
    try:
        asyncio.run(stay(plan, arrival=all_registered, as_json=as_json))
    except FanlightError as error:
        if CANNOT_LISTEN in error.message:
            error.message += "; name another with --http or --grpc"
        raise


async def stay(plan: "Plan", *, arrival: "Arrival", as_json: bool) -> None:
    """Until it is told to stop. The first signal stops all in order, a second one at once."""
    from fanlight.cli.up.house import run_house

    staying, hurry, is_asked = asyncio.current_task(), asyncio.Event(), False
    assert staying is not None

    def on_signal() -> None:
        nonlocal is_asked
        if is_asked:
            hurry.set()
        else:
            is_asked = True
            staying.cancel()
            # Last, for the terminal may be what is gone.
            plan.tell("stopping when what runs has ended; once more stops it at once")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def body(addresses: "Addresses") -> None:
        _announce(addresses, as_json=as_json)
        await asyncio.Event().wait()

    try:
        await run_house(plan, arrival, body, hurry=hurry)
    except asyncio.CancelledError:
        if not is_asked:
            raise


def _announce(addresses: "Addresses", *, as_json: bool) -> None:
    from fanlight.cli.output import print_json_line

    if as_json:
        print_json_line({"http": addresses.http, "grpc": addresses.grpc})
    else:
        print(f"ready http={addresses.http} grpc={addresses.grpc}", flush=True)
