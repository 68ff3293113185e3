"""Looks up what a request names among what workers offer."""

from collections.abc import Iterable, Sequence

from fanlight.contract.names import ANY, is_reference
from fanlight.errors import InvalidField, NotFound, Unavailable
from services.gateway.jobs.catalog import Catalog
from services.gateway.jobs.workers import CHECKPOINT, CONTROLNET, Annotator, Model

RETRY_AFTER_S = 5.0
# How many names an error lists.
NAMES_LIMIT = 20


def require_stage(catalog: Catalog, stage: str) -> None:
    if stage not in catalog.stages:
        raise Unavailable(f"no {stage} worker has come yet; start one", retry_after_s=RETRY_AFTER_S)


def annotator_of(catalog: Catalog, annotator_id: str, *, field: str) -> Annotator:
    if not annotator_id:
        raise InvalidField(f"is missing; there are {_names(catalog.annotators)}", field=field)
    annotator = catalog.annotator(annotator_id)
    if annotator is None:
        raise NotFound(f"there is no such annotator; there are {_names(catalog.annotators)}", field=field)
    return annotator


def checkpoint_of(catalog: Catalog, model_id: str, *, field: str) -> Model:
    """Where none is named the default one, which is never one that would have to be fetched first."""
    found = catalog.model(CHECKPOINT, model_id) if model_id else catalog.default_checkpoint()
    if found is not None:
        return found
    if _is_fetched(catalog, CHECKPOINT, model_id):
        return Model(id=model_id, kind=CHECKPOINT)
    there = _names(models_for(catalog, CHECKPOINT, Model(id="", kind=CHECKPOINT)))
    if model_id:
        raise NotFound(f"there is no such model{_not_fetched(model_id)}; there are {there}", field=field)
    raise NotFound(f"no worker holds a model; name one of {there}", field=field)


def controlnet_of(
    catalog: Catalog, controlnet_id: str, annotator: Annotator | None, model: Model, *, field: str
) -> str:
    """The named one, or the first that the annotator's control images are made for."""
    if controlnet_id:
        found = catalog.model(CONTROLNET, controlnet_id, model.family)
        if found is None and not _is_fetched(catalog, CONTROLNET, controlnet_id):
            has = _names(models_for(catalog, CONTROLNET, model))
            raise NotFound(f"{model.id} has no such ControlNet; it has {has}", field=field)
        return found.id if found else controlnet_id
    for each in annotator.controlnets if annotator else ():
        found = catalog.model(CONTROLNET, each, model.family)
        if found is not None and found.id == each:
            return each
    has = _names(models_for(catalog, CONTROLNET, model))
    if annotator is None:
        raise InvalidField(f"is missing, and no annotator says it; {model.id} has {has}", field=field)
    raise InvalidField(f"no ControlNet of {model.id} is made for {annotator.id}; it has {has}", field=field)


def model_of(catalog: Catalog, kind: str, name: str, checkpoint: Model, *, field: str) -> str:
    """The id of the LoRA, VAE or embedding of that name that fits the checkpoint. NotFound tells those that do."""
    found = catalog.model(kind, name, checkpoint.family)
    if found is None and not _is_fetched(catalog, kind, name):
        has = _names(models_for(catalog, kind, checkpoint))
        raise NotFound(f"{checkpoint.id} has no {kind} {name[:80]!r}{_not_fetched(name)}; it has {has}", field=field)
    return found.id if found else name


def _is_fetched(catalog: Catalog, kind: str, name: str) -> bool:
    """Whether the name is a reference, and some worker fetches any; what it leads to is seen when it is fetched."""
    return is_reference(name) and catalog.fetches_any(kind)


def models_for(catalog: Catalog, kind: str, checkpoint: Model) -> dict[str, Model]:
    """By id, those of a kind that fit the checkpoint. Linear in them: for messages."""
    return {each.id: each for each in catalog.of_kind(kind) if each.id != ANY and _fits(each, checkpoint)}


def _fits(model: Model, checkpoint: Model) -> bool:
    return not model.family or not checkpoint.family or model.family == checkpoint.family


def _names(known: Iterable[str]) -> str:
    return names(sorted(known))


def names(known: Sequence[str]) -> str:
    """For a message, in their order."""
    more = f" and {len(known) - NAMES_LIMIT} more" if len(known) > NAMES_LIMIT else ""
    return ", ".join(known[:NAMES_LIMIT]) + more if known else "none"


def _not_fetched(name: str) -> str:
    """Why a reference is as unknown as any other name."""
    return (
        ", and no worker fetches what it is not set to fetch (FANLIGHT_DIFFUSION_FETCH)" if is_reference(name) else ""
    )
