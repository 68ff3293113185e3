"""`fanlight jobs` and `fanlight dead`: list, show, follow and cancel jobs; list and retry dead letters."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway, job_name

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.gateway.v1.gateway_pb2 import Attempt, DeadLetter, Job


app = typer.Typer(help="List, show, follow and cancel jobs.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="JOB", help="`jobs/ID` or the id alone.", show_default=False)]


class StateFilter(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@app.command("list")
def list_(
    state: Annotated[StateFilter | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest first.")] = 20,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.reports import print_jobs
    from fanlight.cli.session import talk

    async def work(client: "AsyncClient") -> "list[Job]":
        from fanlight.gateway.v1.gateway_pb2 import Job

        only = Job.State.Value(f"STATE_{state.name}") if state else Job.STATE_UNSPECIFIED
        return await client.list_jobs(limit=limit, state=only)

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
    from fanlight.cli.reports import JobBar
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
    """Say why a job waits, when it should be ready, and why each worker was or was not chosen."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.reports import print_explanation
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.explain_job(job_name(name)))
    if as_json:
        print_json(to_dict(found))
    else:
        print_explanation(found)


@app.command()
def delete(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Delete a job for good, with its results. A running job is cancelled first."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    deleted = talk(gateway, lambda client: client.delete_job(job_name(name)))
    if as_json:
        print_json(to_dict(deleted))
        return
    kept = f"; {deleted.shared_blobs} stay, because other jobs use them" if deleted.shared_blobs else ""
    print(f"{deleted.name}: deleted with {deleted.blobs} blobs{kept}")


@app.command()
def cancel(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Cancel a job's unfinished tasks."""
    from fanlight.cli.session import talk

    _print(talk(gateway, lambda client: client.cancel_job(job_name(name))), as_json=as_json)


@app.command()
def webhook(name: Name, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show a job's webhook deliveries and retries."""
    from fanlight.cli.output import print_columns, print_json, print_line, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.get_webhook(job_name(name)))
    if as_json:
        print_json(to_dict(found))
        return
    print_line(f"{found.job} to {found.url}: {type(found).State.Name(found.state).removeprefix('STATE_').lower()}")
    print()
    rows = [(each.try_time.ToJsonString()[:19], each.status or "-", each.error or "-") for each in found.tries]
    print_columns(("TRIED", "STATUS", "ERROR"), rows)


def _print(job: "Job", *, as_json: bool) -> None:
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.reports import print_job

    if as_json:
        print_json(to_dict(job))
    else:
        print_job(job)


dead_app = typer.Typer(help="List tasks that failed too often, and retry them.", no_args_is_help=True)

Task = Annotated[str, typer.Argument(metavar="TASK", help="`jobs/ID/tasks/NUMBER`.", show_default=False)]


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most, the newest first.")] = 20,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List dead letters, those of the newest jobs first."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.list_dead_letters(limit=limit))
    if as_json:
        print_json([to_dict(letter) for letter in found])
    else:
        print_columns(
            ("TASK", "STAGE", "TENANT", "DIED", "ATTEMPTS", "LAST REASON"), [_letter_row(each) for each in found]
        )


@dead_app.command("show")
def show_dead(task: Task, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show one dead letter with every attempt's node and reason."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    letter = talk(gateway, lambda client: client.get_dead_letter(task))
    if as_json:
        print_json(to_dict(letter))
        return
    print_columns(("TASK", "STAGE", "TENANT", "DIED", "ATTEMPTS", "LAST REASON"), [_letter_row(letter)])
    print()
    print_columns(("NODE", "WORKER", "LEASED", "ENDED", "REASON"), [_attempt_row(each) for each in letter.attempts])


@dead_app.command()
def redrive(task: Task, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Retry the task's job. Finished tasks stay finished."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.reports import print_job
    from fanlight.cli.session import talk

    job = talk(gateway, lambda client: client.redrive_dead_letter(task))
    if as_json:
        print_json(to_dict(job))
    else:
        print_job(job)


def _letter_row(letter: "DeadLetter") -> tuple[object, ...]:
    died = letter.end_time.ToJsonString()[:19]
    return letter.task, letter.stage, letter.tenant or "-", died, len(letter.attempts), letter.failure.message


def _attempt_row(attempt: "Attempt") -> tuple[object, ...]:
    why = f"{attempt.failure.reason}: {attempt.failure.message}" if attempt.HasField("failure") else "vanished"
    times = [time.ToJsonString()[:19] for time in (attempt.lease_time, attempt.end_time)]
    return attempt.node, attempt.worker, *times, why
