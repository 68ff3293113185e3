"""`fanlight jobs`: look after jobs that were handed in."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway, job_name

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.gateway.v1.gateway_pb2 import Job

app = typer.Typer(help="Look after jobs that were handed in.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="JOB", help="`jobs/ID` or the id alone.", show_default=False)]


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@app.command("list")
def list_(
    state: Annotated[State | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest first.")] = 20,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    from fanlight.cli.job_table import print_jobs
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    async def work(client: "AsyncClient") -> "list[Job]":
        from fanlight.gateway.v1.gateway_pb2 import Job

        wanted = Job.State.Value(f"STATE_{state.name}") if state else Job.STATE_UNSPECIFIED
        return await client.list_jobs(limit=limit, state=wanted)

    found = talk(gateway, work)
    if as_json:
        print_json([to_dict(job) for job in found])
    else:
        print_jobs(found)


@app.command()
def show(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show one job with its tasks and images."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.get_job(job_name(name))), as_json=as_json)


@app.command()
def watch(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Follow a job to its end. With --json, one line for each event."""
    from fanlight.cli.output import print_json_line, to_dict
    from fanlight.cli.progress import JobBar
    from fanlight.cli.session import talk

    async def work(client: "AsyncClient") -> "Job":
        if as_json:
            return await client.wait_job(job_name(name), on_event=lambda event: print_json_line(to_dict(event)))
        with JobBar() as bar:
            return await client.wait_job(job_name(name), on_event=bar.on_event)

    job = talk(gateway, work)
    if not as_json:
        _print(job, as_json=False)


@app.command()
def explain(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Say why a job waits, when it should be done, and why each worker is or is not the one."""
    from fanlight.cli.explanation import print_explanation
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.explain_job(job_name(name)))
    if as_json:
        print_json(to_dict(found))
    else:
        print_explanation(found)


@app.command()
def cancel(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Cancel what has not ended of a job."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.cancel_job(job_name(name))), as_json=as_json)


@app.command()
def webhook(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show how the telling of a job's end to its webhook goes."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    told = talk(gateway, lambda client: client.get_webhook(job_name(name)))
    if as_json:
        print_json(to_dict(told))
        return
    print(f"{told.job} to {told.url}: {type(told).State.Name(told.state).removeprefix('STATE_').lower()}\n")
    rows = [(each.try_time.ToJsonString()[:19], each.status or "-", each.error or "-") for each in told.tries]
    print_columns(("TRIED", "STATUS", "ERROR"), rows)


def _print(job: "Job", *, as_json: bool) -> None:
    from fanlight.cli.job_table import print_job
    from fanlight.cli.output import print_json, to_dict

    if as_json:
        print_json(to_dict(job))
    else:
        print_job(job)
