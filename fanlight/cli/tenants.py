"""`fanlight tenants`: what each tenant is granted, and how much of it is used."""

from typing import TYPE_CHECKING, Annotated

import typer

from fanlight.cli.options import DEFAULT_GATEWAY, AsJson, Gateway

if TYPE_CHECKING:
    from fanlight.client import AsyncClient
    from fanlight.tenants.v1.tenants_pb2 import Quota, Tenant

app = typer.Typer(help="Show and change what tenants are granted.", no_args_is_help=True)

COLUMNS = ("TENANT", "WEIGHT", "CLASS", "POOL", "POLICY", "LIMITS", "NOTE")
Name = Annotated[str, typer.Argument(metavar="TENANT", help="Its name.", show_default=False)]


def parse_limit(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        equals = ""
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=NUMBER, such as streams=20", param_hint="--limit")
    return name, int(number) if number.is_integer() else number


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 50,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """List the tenants that were granted something of their own."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.tenants.list(limit=limit))
    if as_json:
        print_json([to_dict(each) for each in found])
    else:
        print_columns(COLUMNS, [_row(each) for each in found])


@app.command("set")
def set_(
    tenant: Name,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Names as `show` has them; may be repeated.")
    ] = None,
    clear: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This limit is the gateway's again; may be repeated.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Its share of the workers, 0.01 to 100.")] = None,
    service_class: Annotated[
        int | None, typer.Option("--class", help="Its jobs go before all of lower classes, 0 to 9.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Its jobs go to nodes of this pool only; '' for any.")] = None,
    note: Annotated[str | None, typer.Option(help="For yourself.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Of unsafe content, at least: off, flag, blur or block; '' for the gateway's default."),
    ] = None,
    policy_pool: Annotated[
        str | None,
        typer.Option(help="While the policy is not off, its jobs go to nodes of this pool only; '' for any."),
    ] = None,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Change what a tenant is granted; what is not given stays."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    limits = dict(map(parse_limit, limit or ()))
    changed = talk(
        gateway,
        lambda client: client.tenants.set(
            tenant,
            limits=limits,
            clear_limits=clear or (),
            weight=weight,
            service_class=service_class,
            pool=pool,
            note=note,
            policy=policy,
            policy_pool=policy_pool,
        ),
    )
    if as_json:
        print_json(to_dict(changed))
    else:
        print_columns(COLUMNS, [_row(changed)])


@app.command()
def show(
    tenant: Annotated[str, typer.Argument(metavar="[TENANT]", help="Its name; your own without.")] = "",
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Show each limit of a tenant, and how much of it is used."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    async def work(client: "AsyncClient") -> "tuple[Quota, Tenant | None]":
        quota = await client.tenants.quota(tenant)
        # Only operators name a tenant, and only they may see its record.
        return quota, await client.tenants.get(tenant) if tenant else None

    quota, record = talk(gateway, work)
    if record is not None and record.HasField("deletion"):
        _print_deletion(record, as_json=as_json)
        return
    if as_json:
        print_json(to_dict(quota))
        return
    print(f"tenant: {quota.tenant}")
    rows = [
        (line.name, _number(line.used), _number(line.limit), "the tenant's" if line.is_own else "the gateway's")
        for line in quota.lines
    ]
    print_columns(("LIMIT", "USED", "OF", "WHOSE"), rows)


@app.command()
def delete(
    tenant: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    gateway: Gateway = DEFAULT_GATEWAY,
    as_json: AsJson = False,
) -> None:
    """Delete a tenant with its API keys and all its data, and destroy its data key."""
    from fanlight.cli.output import print_json, to_dict
    from fanlight.cli.session import talk

    if not yes:
        typer.confirm(f"Delete {tenant} and all its data? Nothing brings it back", abort=True)
    done = talk(gateway, lambda client: client.tenants.delete(tenant))
    if as_json:
        print_json(to_dict(done))
        return
    if not done.is_done:
        print(f"{tenant}: closed; the gateways go on with the deletion, see `fanlight tenants show {tenant}`")
    key = "its data key is destroyed" if done.is_key_destroyed else "it had no data key"
    print(f"{tenant}: deleted {done.records} records, {done.blobs} blobs and {done.api_keys} API keys; {key}")
    for sentence in done.remains:
        print(f"remains: {sentence}")


@app.command("rotate-data-key")
def rotate_data_key(tenant: Name, gateway: Gateway = DEFAULT_GATEWAY) -> None:
    """Seal a tenant's new data with a new key; the older one goes when no data has it any more."""
    from fanlight.cli.session import talk

    number = talk(gateway, lambda client: client.tenants.rotate_data_key(tenant))
    print(f"{tenant}: new data is sealed with its data key {number}")


@app.command()
def sealing(gateway: Gateway = DEFAULT_GATEWAY, as_json: AsJson = False) -> None:
    """Show the tenants' data keys, and how much is still in clear."""
    from fanlight.cli.output import print_columns, print_json, to_dict
    from fanlight.cli.session import talk

    found = talk(gateway, lambda client: client.tenants.sealing())
    if as_json:
        print_json(to_dict(found))
        return
    if not found.is_on:
        print("nothing is sealed: FANLIGHT_GATEWAY_SEAL_KEY_FILE is not set at the gateway")
        return
    print(f"wrapped keys: {found.vault}; the operator's key is {found.wrapped_by}")
    rows = [
        (
            each.tenant,
            each.current or "-",
            each.older,
            " ".join(each.wrapped_by) or "-",
            each.fault or ("destroyed" if each.is_destroyed else "-"),
        )
        for each in found.tenants
    ]
    print_columns(("TENANT", "DATA KEY", "OLDER", "WRAPPED BY", "STATE"), rows)
    print(f"in clear: {found.clear_records} records, {found.clear_blobs} blobs")
    if found.lost_records:
        print(f"cannot be opened: {found.lost_records} records; see `fanlight records`")


def _print_deletion(tenant: "Tenant", *, as_json: bool) -> None:
    from fanlight.cli.output import print_json, to_dict

    if as_json:
        print_json(to_dict(tenant))
        return
    done = tenant.deletion
    ended = done.end_time.ToJsonString()[:19] if done.HasField("end_time") else ""
    print(f"tenant: {tenant.name}")
    print(f"deleted: {ended}" if ended else f"being deleted since {done.begin_time.ToJsonString()[:19]}")
    print(f"gone: {done.records} records, {done.blobs} blobs, {done.api_keys} API keys")
    for sentence in done.remains:
        print(f"remains: {sentence}")


def _row(tenant: "Tenant") -> tuple[object, ...]:
    own = " ".join(f"{field.name}={_number(value)}" for field, value in tenant.limits.ListFields())
    policy = " in ".join(filter(None, (tenant.policy, tenant.policy_pool))) or "-"
    weight, pool, note = f"{tenant.weight:g}", tenant.pool or "-", tenant.note or "-"
    return tenant.name, weight, tenant.service_class, pool, policy, own or "-", note


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"
