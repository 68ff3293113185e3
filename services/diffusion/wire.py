"""What this service reports about its models, as protobuf messages: those it lists, and a worker's capabilities."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fanlight.contract.defaults import NO_DEFAULTS
from fanlight.contract.filled import defaults_to_proto
from fanlight.contract.schedulers import SHORT_NAMES
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.defaults import defaults_of
from services.diffusion.models.entries import KINDS, CheckpointEntry, Entry, checkpoint_entry, controlnet_aliases
from services.diffusion.models.tiers import Residency
from services.diffusion.parse.abilities import pipelines_of, size_step_px
from services.diffusion.supply import RemoteModel, is_here

_Model = diffusion_pb2.Model
_LeftOut = diffusion_pb2.LeftOutModel
_RESIDENCIES = {
    Residency.REMOTE: _Model.RESIDENCY_REMOTE,
    Residency.DISK: _Model.RESIDENCY_DISK,
    Residency.RAM: _Model.RESIDENCY_RAM,
    Residency.VRAM: _Model.RESIDENCY_VRAM,
}


def left_out_to_proto(catalog: ModelCatalog) -> list[_LeftOut]:
    return [_LeftOut(path=each.path, reason=each.reason) for each in catalog.left_out]


def models_to_proto(
    catalog: ModelCatalog,
    *,
    residency_of: Callable[[Entry], Residency] = lambda entry: Residency.DISK,
    digest_of: Callable[[Entry], str] = lambda entry: "",
    remote: Iterable[RemoteModel] = (),
) -> list[_Model]:
    """`digest_of`: sha256, empty where it is not known yet. `remote`: what could be fetched."""
    offers, models = list(remote), list[_Model]()
    nets_to_fetch = {offer.family for offer in offers if offer.kind == "controlnet"}
    for entry in catalog.entries:
        model = _Model(
            id=entry.id,
            kind=KINDS[type(entry)],
            size_bytes=entry.size_bytes,
            license=entry.license,
            family=catalog.family_of(entry),
            residency=_RESIDENCIES[residency_of(entry)],
            sha256=digest_of(entry),
            aliases=_aliases(entry.id, entry.reference, KINDS[type(entry)], getattr(entry, "aliases", ())),
            note=entry.note,
        )
        if isinstance(entry, CheckpointEntry):
            _fill_checkpoint(model, entry)
            model.is_default = entry is catalog.default_or_none()
            has_controlnets = model.family in nets_to_fetch or bool(catalog.controlnets_of(entry))
            model.pipelines[:] = pipelines_of(entry, has_controlnets=has_controlnets)
        models.append(model)
    return [*models, *(_remote(model, catalog.default_id) for model in offers)]


def capable_models(
    catalog: ModelCatalog, *, digest_of: Callable[[Entry], str], offers: Sequence[RemoteModel]
) -> list[_Model]:
    """What a worker can do, whatever it has loaded or fetched: an offer stays one when its model has been fetched.

    `digest_of`: empty where the digest may change.
    """
    offered = {offer.reference for offer in offers}
    entries = [entry for entry in catalog.entries if entry.reference.removeprefix("catalog:") not in offered]
    own = ModelCatalog(entries, default_id=catalog.default_id)
    missing = [offer for offer in offers if not is_here(offer, own)]
    models = models_to_proto(own, digest_of=digest_of, remote=missing)
    for model in models:
        model.ClearField("residency")
    return models


def _aliases(id_: str, reference: str, kind: str, own: Sequence[str] = ()) -> list[str]:
    """Its own id is among them: aliases are matched without case and ending."""
    if id_ == "*":
        return []
    more = controlnet_aliases(id_) if kind == "controlnet" else []
    return list(dict.fromkeys(filter(None, [id_, reference, *more, *own])))


def _remote(model: RemoteModel, default_id: str) -> _Model:
    message = _Model(
        id=model.id,
        kind=model.kind,
        size_bytes=model.size_bytes,
        license=model.license,
        family=model.family,
        residency=_Model.RESIDENCY_DISK if model.is_on_disk else _Model.RESIDENCY_REMOTE,
        is_default=model.kind == "checkpoint" and model.id == default_id,
        aliases=_aliases(model.id, model.reference, model.kind),
    )
    if model.recipe is not None:
        likely = checkpoint_entry(Path(model.id), model.recipe, model.size_bytes)
        _fill_checkpoint(message, likely)
        message.pipelines[:] = pipelines_of(likely, has_controlnets=True)
    return message


def _fill_checkpoint(model: _Model, entry: CheckpointEntry) -> None:
    model.width_px, model.height_px = entry.width_px, entry.height_px
    model.size_step_px = size_step_px(entry)
    model.schedulers[:] = SHORT_NAMES
    model.text_encoder_layers = entry.text_encoder_layers
    if (defaults := defaults_of(entry)) != NO_DEFAULTS:
        model.defaults.CopyFrom(defaults_to_proto(defaults))
