"""Looks up what a request names among what workers offer."""

from collections.abc import Iterable

from services.gateway.jobs.painting import ANY, is_reference
from services.gateway.jobs.workers import CHECKPOINT, CONTROLNET, REMOTE, Annotator, Catalog, Model
from services.kernel.errors import InvalidField, NotFound, Unavailable

RETRY_AFTER_S = 5.0
# How many names an error tells.
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
    checkpoints = {model.id: model for model in catalog.of_kind(CHECKPOINT)}
    if _is_fetched(catalog, CHECKPOINT, model_id):
        return checkpoints.get(model_id) or Model(id=model_id, kind=CHECKPOINT)
    checkpoints.pop(ANY, None)
    if model_id in checkpoints:
        return checkpoints[model_id]
    if model_id:
        raise NotFound(f"there is no such model; there are {_names(checkpoints)}", field=field)
    held = [model for model in checkpoints.values() if model.residency != REMOTE]
    if not held:
        raise NotFound(f"no worker holds a model; name one of {_names(checkpoints)}", field=field)
    return next((model for model in held if model.is_default), held[0])


def controlnet_of(
    catalog: Catalog, controlnet_id: str, annotator: Annotator | None, model: Model, *, field: str
) -> str:
    """The named one, or the first that the annotator's control images are made for."""
    fitting = models_for(catalog, CONTROLNET, model)
    if controlnet_id:
        if controlnet_id not in fitting and not _is_fetched(catalog, CONTROLNET, controlnet_id):
            raise NotFound(f"{model.id} has no such ControlNet; it has {_names(fitting)}", field=field)
        return controlnet_id
    if annotator is None:
        raise InvalidField(f"is missing, and no annotator tells it; {model.id} has {_names(fitting)}", field=field)
    for each in annotator.controlnets:
        if each in fitting:
            return each
    raise InvalidField(f"no ControlNet of {model.id} is made for {annotator.id}; it has {_names(fitting)}", field=field)


def model_of(catalog: Catalog, kind: str, name: str, checkpoint: Model, *, field: str) -> str:
    """The id of the LoRA, VAE or embedding of that name that fits the checkpoint. NotFound tells those that do."""
    fitting = models_for(catalog, kind, checkpoint)
    if name not in fitting and not _is_fetched(catalog, kind, name):
        raise NotFound(f"{checkpoint.id} has no {kind} {name[:80]!r}; it has {_names(fitting)}", field=field)
    return name


def _is_fetched(catalog: Catalog, kind: str, name: str) -> bool:
    """Whether the name is a reference, and some worker fetches any; what it leads to is seen when it is fetched."""
    return is_reference(name) and any(model.id == ANY for model in catalog.of_kind(kind))


def models_for(catalog: Catalog, kind: str, checkpoint: Model) -> dict[str, Model]:
    """By id, those of a kind that fit the checkpoint."""
    return {each.id: each for each in catalog.of_kind(kind) if each.id != ANY and _fits(each, checkpoint)}


def _fits(model: Model, checkpoint: Model) -> bool:
    return not model.family or not checkpoint.family or model.family == checkpoint.family


def _names(known: Iterable[str]) -> str:
    names = sorted(known)
    more = f" and {len(names) - NAMES_LIMIT} more" if len(names) > NAMES_LIMIT else ""
    return ", ".join(names[:NAMES_LIMIT]) + more if names else "none"
