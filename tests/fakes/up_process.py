"""`fanlight up` with services that only keep a diary: `python up_process.py DATA DIARY`."""

import asyncio
import sys
from pathlib import Path

from fanlight.cli import up
from fanlight.cli.output import say
from fanlight.cli.service_plan import Addresses, ProcessPlan

SERVICE = Path(__file__).with_name("service_process.py")


def command_of(diary: Path, **how: str):
    """What a ProcessPlan starts instead of the real services; `how` by the service's name."""
    return lambda name: (sys.executable, "-SE", str(SERVICE), name, str(diary), how.get(name, ""))


async def at_once(addresses: Addresses) -> None:
    pass


if __name__ == "__main__":
    data, diary = map(Path, sys.argv[1:])
    plan = ProcessPlan(data=data, http="127.0.0.1:0", grpc="127.0.0.1:0", report=say, command=command_of(diary))
    asyncio.run(up.run_until_signal(plan, wait_ready=at_once, as_json=False))
