"""Looks up what a request names among what workers offer."""

import re
from collections.abc import Iterable, Mapping, Sequence

from fanlight.contract.names import ANY, is_reference
from services.gateway.jobs.workers import CHECKPOINT, CONTROLNET, REMOTE, Annotator, Catalog, Model
from services.kernel.errors import InvalidField, NotFound, Unavailable

RETRY_AFTER_S = 5.0
_BEHIND_A_NAME = re.compile(r"(\.(safetensors|ckpt|pth|pt|bin))?(\s*\[[0-9a-fA-F]{6,64}\])?$")
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
    checkpoints = {model.id: model for model in catalog.of_kind(CHECKPOINT) if model.id != ANY}
    if found := _meant(checkpoints, model_id):
        return checkpoints[found]
    if _is_fetched(catalog, CHECKPOINT, model_id):
        return Model(id=model_id, kind=CHECKPOINT)
    if model_id:
        raise NotFound(f"there is no such model{_not_fetched(model_id)}; there are {_names(checkpoints)}", field=field)
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
        found = _meant(fitting, controlnet_id)
        if not found and not _is_fetched(catalog, CONTROLNET, controlnet_id):
            raise NotFound(f"{model.id} has no such ControlNet; it has {_names(fitting)}", field=field)
        return found or controlnet_id
    if annotator is None:
        raise InvalidField(f"is missing, and no annotator tells it; {model.id} has {_names(fitting)}", field=field)
    for each in annotator.controlnets:
        if each in fitting:
            return each
    raise InvalidField(f"no ControlNet of {model.id} is made for {annotator.id}; it has {_names(fitting)}", field=field)


def model_of(catalog: Catalog, kind: str, name: str, checkpoint: Model, *, field: str) -> str:
    """The id of the LoRA, VAE or embedding of that name that fits the checkpoint. NotFound tells those that do."""
    fitting = models_for(catalog, kind, checkpoint)
    found = _meant(fitting, name)
    if not found and not _is_fetched(catalog, kind, name):
        raise NotFound(
            f"{checkpoint.id} has no {kind} {name[:80]!r}{_not_fetched(name)}; it has {_names(fitting)}", field=field
        )
    return found or name


def _meant(known: Mapping[str, Model], name: str) -> str:
    """The id of the model that has this name for its id or an alias; empty where there is none."""
    if name in known:
        return name
    plain = plain_name(name)
    return next((each.id for each in known.values() if plain in map(plain_name, each.aliases)), "") if plain else ""


def plain_name(name: str) -> str:
    """`canny` of `Canny.safetensors [d14c016b]`: without what A1111 writes behind a model's name."""
    return _BEHIND_A_NAME.sub("", name.strip()).lower()


def _is_fetched(catalog: Catalog, kind: str, name: str) -> bool:
    """Whether the name is a reference, and some worker fetches any; what it leads to is seen when it is fetched."""
    return is_reference(name) and any(model.id == ANY for model in catalog.of_kind(kind))


def models_for(catalog: Catalog, kind: str, checkpoint: Model) -> dict[str, Model]:
    """By id, those of a kind that fit the checkpoint."""
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
