"""What a request names and needs of a worker, looked up among what workers offer, and refused by its field."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

from google.protobuf.message import Message

from fanlight.contract.generation import PRECISIONS, SAFETY_MODES
from fanlight.contract.names import ANY, find_name, is_reference, shares_name
from fanlight.contract.needs import (
    NOISE_SCHEDULE,
    PRECISION,
    REVISION,
    SAFETY_CHECKER,
    SCHEDULER,
    Needs,
    unknown_fields,
    young_fields,
)
from fanlight.contract.schedulers import NOISE_SCHEDULES, SCHEDULERS
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, NotFound, Unavailable
from services.gateway.domain.fleet_catalog import FleetCatalog
from services.gateway.domain.job import Facts
from services.gateway.domain.workers import CHECKPOINT, CONTROLNET, AnnouncedAnnotator, AnnouncedModel, LeftOutOfFleet
from services.gateway.scheduler.queue import Amounts

RETRY_AFTER_S = 5.0
# How many names an error lists.
NAMES_LIMIT = 20
_CHOICES: Mapping[str, Iterable[str]] = {
    NOISE_SCHEDULE: NOISE_SCHEDULES,
    PRECISION: PRECISIONS,
    SAFETY_CHECKER: SAFETY_MODES,
    SCHEDULER: SCHEDULERS,
}

NOTHING = Needs(offers=(), amounts=())


class Fleet(Protocol):
    """What is known about workers; `app.fleet_offers.FleetOffers` implements it."""

    def catalog(self) -> FleetCatalog: ...
    def can_any(self, stage: str, needs: frozenset[str], amounts: Amounts = (), *, only_live: bool = False) -> bool: ...
    def offering(self, stage: str, need: str) -> Sequence[str]: ...
    def limits_of(
        self, stage: str, name: str, needs: frozenset[str] = frozenset()
    ) -> Sequence[tuple[str, int | None]]: ...
    def residency_of(self, kind: str, name: str) -> int: ...
    def left_out(self) -> LeftOutOfFleet: ...


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


def require(fleet: Fleet, stage: str, needs: Needs) -> None:
    """InvalidField or FailedPrecondition names the field that no worker of the stage can do, and which can do what."""
    if fleet.can_any(stage, names_of(needs), amounts_of(needs)):
        return
    for need, field in needs.offers:
        if not fleet.can_any(stage, frozenset({need})):
            _refuse_need(fleet, stage, need, field)
    together: frozenset[str] = frozenset()
    for need, field in needs.offers:
        if not fleet.can_any(stage, together | {need}):
            raise FailedPrecondition(_no_worker_has(fleet, stage, [*together, need]), field=field)
        together |= {need}
    amounts: Amounts = ()
    for name, amount, field in needs.amounts:
        if not fleet.can_any(stage, together, ((name, amount),)):
            raise FailedPrecondition(
                f"needs {_amount(name, amount)}; {_limits(fleet, stage, name, together)}", field=field
            )
        amounts = (*amounts, (name, amount))
        if not fleet.can_any(stage, together, amounts):
            each_of = "; ".join(f"{_amount(*each)}: {_limits(fleet, stage, each[0], together)}" for each in amounts)
            raise FailedPrecondition(f"no worker takes all of these together: {each_of}", field=field)


def _no_worker_has(fleet: Fleet, stage: str, needs: Sequence[str]) -> str:
    each_of = "; ".join(f"{need} has {', '.join(fleet.offering(stage, need))}" for need in sorted(needs))
    return f"no worker has all of these together: {each_of}"


def _refuse_need(fleet: Fleet, stage: str, need: str, field: str) -> NoReturn:
    kind, _, name = need.partition(":")
    if kind == "field":
        message, _, number = name.partition(":")
        if need in young_fields(message):
            raise FailedPrecondition("is newer than every worker here; leave it out, or update a worker", field=field)
        raise InvalidField(
            f"field {number} of {message} is newer than this gateway's contract, revision {REVISION}, and than that of"
            " every worker: leave it out, or update a worker",
            field=field,
        )
    there = _offered(fleet, stage, kind)
    raise FailedPrecondition(
        f"needs {kind.replace('_', ' ')} {name}, which no worker offers{f'; there are {there}' if there else ''}",
        field=field,
    )


def _offered(fleet: Fleet, stage: str, kind: str) -> str:
    """What workers offer of a kind whose names the contract knows, and which nodes; empty for other kinds."""
    nodes = {name: fleet.offering(stage, f"{kind}:{name}") for name in _CHOICES.get(kind, ())}
    return names([f"{name} ({', '.join(by)})" for name, by in nodes.items() if by]) if nodes else ""


def _amount(name: str, amount: int) -> str:
    return f"{amount} {name.partition(':')[0].replace('_', ' ')}"


def _limits(fleet: Fleet, stage: str, name: str, needs: frozenset[str]) -> str:
    """What the workers that have the other needs take, for a message."""
    taken = [f"{node} takes {'any' if limit is None else limit}" for node, limit in fleet.limits_of(stage, name, needs)]
    return ", ".join(taken) or "no worker has a limit for it"


def facts_of(needs: Needs, **known: object) -> Facts:
    return Facts(needs=names_of(needs), amounts=amounts_of(needs), **known)  # type: ignore[arg-type]


def require_stage(catalog: FleetCatalog, stage: str) -> None:
    if stage not in catalog.stages:
        raise Unavailable(f"no {stage} worker is connected or expected back; start one", retry_after_s=RETRY_AFTER_S)


def find_annotator(catalog: FleetCatalog, name: str) -> AnnouncedAnnotator | None:
    """By id or alias, as `fanlight.contract.names.find_name` finds it: in any case, with spaces around it."""
    known = catalog.annotators
    return catalog.annotator(name) or known.get(find_name({each.id: each.aliases for each in known.values()}, name))


def annotator_of(catalog: FleetCatalog, annotator_id: str, *, field: str) -> AnnouncedAnnotator:
    if not annotator_id:
        raise InvalidField(f"is missing; there are {_names(catalog.annotators)}", field=field)
    annotator = find_annotator(catalog, annotator_id)
    if annotator is None:
        raise NotFound(f"there is no such annotator; there are {_names(catalog.annotators)}", field=field)
    return annotator


def checkpoint_of(catalog: FleetCatalog, model_id: str, *, field: str) -> AnnouncedModel:
    """The named one, or the default one, which is never one that would have to be fetched first."""
    found = catalog.model(CHECKPOINT, model_id) if model_id else catalog.default_checkpoint()
    if found is not None:
        return found
    name = model_id or catalog.default_model
    if _is_fetched(catalog, CHECKPOINT, name):
        return AnnouncedModel(id=name, kind=CHECKPOINT)
    any_model = AnnouncedModel(id="", kind=CHECKPOINT)
    there = _names(models_for(catalog, CHECKPOINT, any_model))
    if model_id:
        _refuse_shared(catalog, CHECKPOINT, model_id, any_model, field=field)
        raise NotFound(f"there is no such model{_not_fetched(model_id)}; there are {there}", field=field)
    if name:
        raise NotFound(f"is missing, and no worker has the default one, {name[:80]}; name one of {there}", field=field)
    raise NotFound(f"no worker holds a model; name one of {there}", field=field)


def controlnet_of(
    catalog: FleetCatalog,
    controlnet_id: str,
    annotator: AnnouncedAnnotator | None,
    model: AnnouncedModel,
    *,
    field: str,
) -> str:
    """The named one, or the first that the annotator's control images are made for."""
    if controlnet_id:
        found = catalog.model(CONTROLNET, controlnet_id, model.family)
        if found is None and not _is_fetched(catalog, CONTROLNET, controlnet_id):
            _refuse_shared(catalog, CONTROLNET, controlnet_id, model, field=field)
            has = _names(models_for(catalog, CONTROLNET, model))
            raise NotFound(f"{model.id} has no such ControlNet; it has {has}", field=field)
        return found.id if found else controlnet_id
    for each in annotator.controlnets if annotator else ():
        found = catalog.model(CONTROLNET, each, model.family)
        if found is not None and found.id == each:
            return each
    has = _names(models_for(catalog, CONTROLNET, model))
    if annotator is None:
        raise InvalidField(f"is missing, and no annotator implies it; {model.id} has {has}", field=field)
    raise InvalidField(f"no ControlNet of {model.id} is made for {annotator.id}; it has {has}", field=field)


def _refuse_shared(catalog: FleetCatalog, kind: str, name: str, model: AnnouncedModel, *, field: str) -> None:
    """NotFound where several models of a worker have the name, each in another folder."""
    alike = [each for each in models_for(catalog, kind, model) if shares_name(each, name)]
    if len(alike) > 1:
        raise NotFound(f"{name[:80]!r} is the name of several models: write {_names(alike)}", field=field)


def model_of(catalog: FleetCatalog, kind: str, name: str, checkpoint: AnnouncedModel, *, field: str) -> str:
    """The id of the LoRA, VAE or embedding of that name that fits the checkpoint. NotFound lists those that do."""
    found = catalog.model(kind, name, checkpoint.family)
    if found is None and not _is_fetched(catalog, kind, name):
        _refuse_shared(catalog, kind, name, checkpoint, field=field)
        has = _names(models_for(catalog, kind, checkpoint))
        raise NotFound(f"{checkpoint.id} has no {kind} {name[:80]!r}{_not_fetched(name)}; it has {has}", field=field)
    return found.id if found else name


def _is_fetched(catalog: FleetCatalog, kind: str, name: str) -> bool:
    """Whether the name is a reference and some worker fetches any; what it leads to is checked when it is fetched."""
    return is_reference(name) and catalog.fetches_any(kind)


def models_for(catalog: FleetCatalog, kind: str, checkpoint: AnnouncedModel) -> dict[str, AnnouncedModel]:
    """By id, those of a kind that fit the checkpoint. Linear in them: for messages."""
    return {each.id: each for each in catalog.of_kind(kind) if each.id != ANY and _fits(each, checkpoint)}


def _fits(model: AnnouncedModel, checkpoint: AnnouncedModel) -> bool:
    return not model.family or not checkpoint.family or model.family == checkpoint.family


def _names(known: Iterable[str]) -> str:
    return names(sorted(known))


def names(known: Sequence[str]) -> str:
    """For a message, in their order."""
    more = f" and {len(known) - NAMES_LIMIT} more" if len(known) > NAMES_LIMIT else ""
    return ", ".join(known[:NAMES_LIMIT]) + more if known else "none"


def _not_fetched(name: str) -> str:
    """Why a reference counts as an unknown name, for a message."""
    return (
        ", and no worker fetches what it is not set to fetch (FANLIGHT_DIFFUSION_FETCH)" if is_reference(name) else ""
    )
