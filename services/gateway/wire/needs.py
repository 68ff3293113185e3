"""What a request needs of a worker, and its refusal by the field where no worker of the fleet has that."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

from google.protobuf.message import Message

from fanlight.contract.generation import PRECISIONS, SAFETY_MODES
from fanlight.contract.needs import PRECISION, SAFETY_CHECKER, SCHEDULER, Needs
from fanlight.contract.revision import REVISION, unknown_fields
from fanlight.contract.schedulers import SCHEDULERS
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField
from services.gateway.jobs.catalog import Catalog
from services.gateway.jobs.model import Facts
from services.gateway.wire.catalog import names

_CHOICES: Mapping[str, Iterable[str]] = {
    PRECISION: PRECISIONS,
    SAFETY_CHECKER: SAFETY_MODES,
    SCHEDULER: SCHEDULERS,
}

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
        offers=tuple((f"field:{each.message_name}:{each.number}", each.field) for each in unknown_fields(message)),
        amounts=(),
    )


def require(fleet: Fleet, needs: Needs) -> None:
    """InvalidField or FailedPrecondition says which field asks for what no worker can, and who could do what."""
    if fleet.can_any(names_of(needs), amounts_of(needs)):
        return
    for need, field in needs.offers:
        if not fleet.can_any(frozenset({need})):
            _refuse_need(fleet, need, field)
    together: frozenset[str] = frozenset()
    for need, field in needs.offers:
        if not fleet.can_any(together | {need}):
            raise FailedPrecondition(_no_worker_has(fleet, [*together, need]), field=field)
        together |= {need}
    amounts: Amounts = ()
    for name, amount, field in needs.amounts:
        if not fleet.can_any(together, ((name, amount),)):
            raise FailedPrecondition(f"needs {_amount(name, amount)}; {_limits(fleet, name, together)}", field=field)
        amounts = (*amounts, (name, amount))
        if not fleet.can_any(together, amounts):
            each_of = "; ".join(f"{_amount(*each)}: {_limits(fleet, each[0], together)}" for each in amounts)
            raise FailedPrecondition(f"no worker takes all of these together: {each_of}", field=field)


def _no_worker_has(fleet: Fleet, needs: Sequence[str]) -> str:
    each_of = "; ".join(f"{need} has {', '.join(fleet.offering(need))}" for need in sorted(needs))
    return f"no worker has all of these together: {each_of}"


def _refuse_need(fleet: Fleet, need: str, field: str) -> NoReturn:
    kind, _, name = need.partition(":")
    if kind == "field":
        message, _, number = name.partition(":")
        raise InvalidField(
            f"field {number} of {message} is newer than this gateway's contract, revision {REVISION}, and than that of"
            " every worker: leave it out, or update a worker",
            field=field,
        )
    there = _offered(fleet, kind)
    raise FailedPrecondition(
        f"needs {kind.replace('_', ' ')} {name}, which no worker offers{f'; there are {there}' if there else ''}",
        field=field,
    )


def _offered(fleet: Fleet, kind: str) -> str:
    """What workers offer of a kind whose names the contract knows, and which nodes; empty for other kinds."""
    nodes = {name: fleet.offering(f"{kind}:{name}") for name in _CHOICES.get(kind, ())}
    return names([f"{name} ({', '.join(by)})" for name, by in nodes.items() if by]) if nodes else ""


def _amount(name: str, amount: int) -> str:
    return f"{amount} {name.partition(':')[0].replace('_', ' ')}"


def _limits(fleet: Fleet, name: str, needs: frozenset[str]) -> str:
    """What workers that have the rest take."""
    said = [f"{node} takes {'any' if limit is None else limit}" for node, limit in fleet.limits_of(name, needs)]
    return ", ".join(said) or "no worker has a limit for it"


def facts_of(needs: Needs, **known: object) -> Facts:
    return Facts(needs=names_of(needs), amounts=amounts_of(needs), **known)  # type: ignore[arg-type]
