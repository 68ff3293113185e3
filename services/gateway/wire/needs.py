"""What a request needs of a worker, and its refusal by the field where no worker of the fleet has that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from google.protobuf.message import Message

from fanlight.contract.needs import Needs
from fanlight.contract.revision import REVISION, unknown_fields
from services.gateway.jobs.catalog import Catalog
from services.gateway.jobs.model import Facts
from services.kernel.errors import FailedPrecondition, FanlightError, InvalidField

Amounts = tuple[tuple[str, int], ...]
NOTHING = Needs(offers=(), amounts=())


class Fleet(Protocol):
    """What is known of workers; `app.workers.Workers` is one."""

    def catalog(self) -> Catalog: ...
    def can_any(self, needs: frozenset[str], amounts: Amounts = (), *, only_live: bool = False) -> bool: ...
    def offering(self, need: str) -> Sequence[str]: ...
    def limits_of(self, name: str, needs: frozenset[str] = frozenset()) -> Sequence[tuple[str, int | None]]: ...


@contextmanager
def within(field: str) -> Iterator[None]:
    """Errors about a stage's request name the field of the client's request."""
    try:
        yield
    except FanlightError as error:
        raise error.within(field) from error


def names_of(needs: Needs) -> frozenset[str]:
    return frozenset(need for need, _ in needs.offers)


def amounts_of(needs: Needs) -> Amounts:
    return tuple(sorted((name, amount) for name, amount, _ in needs.amounts))


def newer_fields(message: Message) -> Needs:
    """Fields that this gateway's contract does not know: only a worker whose contract does may get them."""
    return Needs(
        offers=tuple((f"field:{each.message_name}:{each.number}", each.path) for each in unknown_fields(message)),
        amounts=(),
    )


def require(fleet: Fleet, needs: Needs) -> None:
    """InvalidField or FailedPrecondition says which field asks for what no worker can, and who could do what."""
    names, amounts = names_of(needs), amounts_of(needs)
    if fleet.can_any(names, amounts):
        return
    for need, field in needs.offers:
        if not fleet.can_any(frozenset({need})):
            _refuse_need(need, field)
    for name, amount, field in needs.amounts:
        if not fleet.can_any(frozenset(), ((name, amount),)):
            raise FailedPrecondition(f"needs {_amount(name, amount)}; {_limits(fleet, name)}", field=field)
    together = [f"{need} ({', '.join(fleet.offering(need))})" for need in sorted(names)]
    together += [f"{_amount(name, amount)} ({_limits(fleet, name)})" for name, amount in amounts]
    raise FailedPrecondition(f"no worker has all of these together: {'; '.join(together)}", field="")


def _refuse_need(need: str, field: str) -> None:
    kind, _, name = need.partition(":")
    if kind == "field":
        message, _, number = name.partition(":")
        raise InvalidField(
            f"has field {number} of {message}, which is newer than this gateway's contract, revision {REVISION};"
            " no worker knows it either",
            field=field,
        )
    raise FailedPrecondition(f"needs {kind.replace('_', ' ')} {name}, which no worker offers", field=field)


def _amount(name: str, amount: int) -> str:
    return f"{amount} {name.partition(':')[0].replace('_', ' ')}"


def _limits(fleet: Fleet, name: str) -> str:
    said = [f"{node} takes {'any' if limit is None else limit}" for node, limit in fleet.limits_of(name)]
    return ", ".join(said) or "no worker has a limit for it"


def facts_of(needs: Needs, **known: object) -> Facts:
    return Facts(needs=names_of(needs), amounts=amounts_of(needs), **known)  # type: ignore[arg-type]
