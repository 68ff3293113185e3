"""`fanlight dead`: tasks whose attempts are spent, looked at and tried anew."""

from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway

if TYPE_CHECKING:
    from fanlight.gateway.v1.gateway_pb2 import Attempt, DeadLetter

app = typer.Typer(help="Look at tasks that failed too often, and try them anew.", no_args_is_help=True)

Task = Annotated[str, typer.Argument(metavar="TASK", help="`jobs/ID/tasks/NUMBER`.", show_default=False)]


@app.command("list")
def list_(
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
        print_columns(("TASK", "STAGE", "TENANT", "DIED", "ATTEMPTS", "LAST REASON"), [_row(each) for each in found])


@app.command()
def show(task: Task, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show one dead letter with every attempt's node and reason."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    letter = talk(gateway, lambda client: client.get_dead_letter(task))
    if as_json:
        print_json(to_dict(letter))
        return
    print_columns(("TASK", "STAGE", "TENANT", "DIED", "ATTEMPTS", "LAST REASON"), [_row(letter)])
    print()
    print_columns(("NODE", "WORKER", "LEASED", "ENDED", "REASON"), [_attempt_row(each) for each in letter.attempts])


@app.command()
def redrive(task: Task, gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Try the task's job anew. What was finished stays finished."""
    from fanlight.cli.job_table import print_job
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    job = talk(gateway, lambda client: client.redrive_dead_letter(task))
    if as_json:
        print_json(to_dict(job))
    else:
        print_job(job)


def _row(letter: "DeadLetter") -> tuple[object, ...]:
    died = letter.end_time.ToJsonString()[:19]
    return letter.task, letter.stage, letter.tenant or "-", died, len(letter.attempts), letter.failure.message


def _attempt_row(attempt: "Attempt") -> tuple[object, ...]:
    why = f"{attempt.failure.reason}: {attempt.failure.message}" if attempt.HasField("failure") else "vanished"
    times = [time.ToJsonString()[:19] for time in (attempt.lease_time, attempt.end_time)]
    return attempt.node, attempt.worker, *times, why
