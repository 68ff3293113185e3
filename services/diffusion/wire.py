"""What this service reports about its models, as protobuf messages."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fanlight.contract.schedulers import SHORT_NAMES
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry, Entry
from services.diffusion.models.folders import checkpoint_entry
from services.diffusion.models.library import Residency
from services.diffusion.models.names import controlnet_aliases
from services.diffusion.parse.pipelines import pipelines_of
from services.diffusion.parse.sizes import size_step_px
from services.diffusion.provenance import KINDS
from services.diffusion.remote import RemoteModel, is_here

_Model = diffusion_pb2.Model
_RESIDENCIES = {
    Residency.REMOTE: _Model.RESIDENCY_REMOTE,
    Residency.DISK: _Model.RESIDENCY_DISK,
    Residency.RAM: _Model.RESIDENCY_RAM,
    Residency.VRAM: _Model.RESIDENCY_VRAM,
}


def models_to_proto(
    catalogue: Catalogue,
    *,
    residency_of: Callable[[Entry], Residency] = lambda entry: Residency.DISK,
    digest_of: Callable[[Entry], str] = lambda entry: "",
    remote: Iterable[RemoteModel] = (),
) -> list[_Model]:
    """`digest_of`: sha256, empty where it is not known yet. `remote`: what could be fetched."""
    offers, models = list(remote), list[_Model]()
    nets_to_fetch = {offer.family for offer in offers if offer.kind == "controlnet"}
    for entry in catalogue.entries:
        model = _Model(
            id=entry.id,
            kind=KINDS[type(entry)],
            size_bytes=entry.size_bytes,
            license=entry.license,
            family=catalogue.family_of(entry),
            residency=_RESIDENCIES[residency_of(entry)],
            sha256=digest_of(entry),
            aliases=_aliases(entry.id, entry.reference, KINDS[type(entry)]),
        )
        if isinstance(entry, CheckpointEntry):
            _fill_checkpoint(model, entry)
            model.is_default = entry is catalogue.default_or_none()
            has_controlnets = model.family in nets_to_fetch or bool(catalogue.controlnets_of(entry))
            model.pipelines[:] = pipelines_of(entry, has_controlnets=has_controlnets)
        models.append(model)
    return [*models, *(_remote(model, catalogue.default_id) for model in offers)]


def capable_models(
    catalogue: Catalogue, *, digest_of: Callable[[Entry], str], offers: Sequence[RemoteModel]
) -> list[_Model]:
    """What a worker can do whatever it has loaded or fetched: an offer stays one when its model has been fetched.

    `digest_of`: where it never changes.
    """
    offered = {offer.reference for offer in offers}
    entries = [entry for entry in catalogue.entries if entry.reference.removeprefix("catalog:") not in offered]
    own = Catalogue(entries, default_id=catalogue.default_id)
    missing = [offer for offer in offers if not is_here(offer, own)]
    models = models_to_proto(own, digest_of=digest_of, remote=missing)
    for model in models:
        model.ClearField("residency")
    return models


def _aliases(id_: str, reference: str, kind: str) -> list[str]:
    """Its own id is among them, as case and ending do not matter to an alias."""
    if id_ == "*":
        return []
    more = controlnet_aliases(id_) if kind == "controlnet" else []
    return list(dict.fromkeys(filter(None, [id_, reference, *more])))


def _remote(model: RemoteModel, default_id: str) -> _Model:
    message = _Model(
        id=model.id,
        kind=model.kind,
        size_bytes=model.size_bytes,
        license=model.license,
        family=model.family,
        residency=_Model.RESIDENCY_DISK if model.is_held else _Model.RESIDENCY_REMOTE,
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
