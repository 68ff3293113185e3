"""Ids for models of one name: two files never hide one another.

Models whose names are the same get their folders' names before: `people.detail` and `style.detail`. The bare name then
means neither. Of ControlNets that only share a short id, one keeps it, and the others go by their files' names.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fanlight.contract.names import FOLDER_SEPARATOR
from services.diffusion.models.entries import (
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraEntry,
    controlnet_aliases,
    own_name,
    plain,
)

# Longer ids are not announced.
ID_LIMIT_BYTES = 256
# How many folders an id names.
_FOLDERS_LIMIT = 8


def with_unique_ids(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """The entries in order, each with an id of its own, and those that have to be left out, with the reason.

    Of two links to one file, one is enough: it is in neither list.
    """
    kept, left_out = _without_twins(entries)
    kept = _told_by_files(kept)
    levels = [0] * len(kept)
    for _ in range(_FOLDERS_LIMIT):
        colliding = _collisions([_at_level(entry, level) for entry, level in zip(kept, levels, strict=True)])
        if not colliding:
            break
        for group in colliding:
            keeper = _keeper([(index, kept[index], levels[index]) for index in group])
            for index in group:
                levels[index] += index != keeper
    named = [_at_level(entry, level) for entry, level in zip(kept, levels, strict=True)]
    for group in _collisions(named):
        left_out += [(named[index], f"another model has the id {named[index].id}; rename it") for index in group[1:]]
    hidden = {id(entry) for entry, _ in left_out}
    return [entry for entry in named if id(entry) not in hidden], left_out


def _told_by_files(entries: Sequence[Entry]) -> list[Entry]:
    """Of several in one folder that are called by it, each gets its file's name too."""
    groups: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[type(entry), entry.id.lower(), entry.path.parent, fits_of(entry)].append(entry)
    crowded = {id(entry) for group in groups.values() if len(group) > 1 for entry in group}
    return [
        replace(entry, id=FOLDER_SEPARATOR.join((entry.id, plain(entry.path.name))))
        if id(entry) in crowded and own_name(entry.path) != plain(entry.path.name)
        else entry
        for entry in entries
    ]


def fits_of(entry: Entry) -> object:
    """What else tells models of one kind and id apart: what they fit. Falsy where that is not known."""
    if isinstance(entry, ControlNetEntry):
        return entry.shape
    if isinstance(entry, LoraEntry):
        return entry.cross_attention_dim
    return entry.widths if isinstance(entry, EmbeddingEntry) else None


def _collisions(entries: Sequence[Entry]) -> list[list[int]]:
    """Groups of indexes of those that one name could mean."""
    by_id: dict[tuple[type, str], list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        by_id[type(entry), entry.id.lower()].append(index)
    groups = []
    for indexes in by_id.values():
        by_fits: dict[object, list[int]] = defaultdict(list)
        for index in indexes:
            by_fits[fits_of(entries[index])].append(index)
        # What may fit anything collides with all.
        is_apart = all(by_fits)
        groups += [group for group in (by_fits.values() if is_apart else [indexes]) if len(group) > 1]
    return groups


def _keeper(group: Sequence[tuple[int, Entry, int]]) -> int:
    """The index of the ControlNet that keeps the short id: the best known, if no other has its name. -1 for none."""
    ranked = []
    for index, entry, level in group:
        if not isinstance(entry, ControlNetEntry) or level:
            return -1
        name = own_name(entry.path)
        is_known = name == entry.id or name in controlnet_aliases(entry.id)
        ranked.append((entry.is_difference, not is_known, name.lower().endswith("_fp16"), index, name))
    ranked.sort()
    names = [name for *_, name in ranked]
    return ranked[0][3] if names.count(names[0]) == 1 else -1


def _at_level(entry: Entry, level: int) -> Entry:
    """Level 0 is its own id; each further one names more of it."""
    if not level:
        return entry
    if isinstance(entry, ControlNetEntry):
        if level == 1:
            return replace(entry, id=own_name(entry.path))
        level -= 1
    above = _folders_above(entry)[:level]
    id_ = FOLDER_SEPARATOR.join([*reversed(above), entry.id])
    return replace(entry, id=id_) if len(id_.encode(errors="replace")) <= ID_LIMIT_BYTES else entry


def _folders_above(entry: Entry) -> list[str]:
    """The nearest first; of a model that is called by its folder, those above that one."""
    name, names = own_name(entry.path), [folder.name for folder in entry.path.parents]
    is_by_folder = plain(entry.path.name) != name and name in names
    return [each for each in (names[names.index(name) + 1 :] if is_by_folder else names) if each]


def _without_twins(entries: Sequence[Entry]) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Of files that differ in their ending alone the one in safetensors; of links to one file the first."""
    kept: dict[tuple[object, ...], Entry] = {}
    seen: set[tuple[object, ...]] = set()
    left_out: list[tuple[Entry, str]] = []
    for entry in entries:
        try:
            stat = entry.path.stat()
        except OSError as error:
            left_out.append((entry, f"it cannot be read: {error.strerror or type(error).__name__}"))
            continue
        file = (type(entry), entry.id, stat.st_dev, stat.st_ino)
        if file in seen:
            continue
        seen.add(file)
        where = (type(entry), entry.path.parent, plain(entry.path.name).lower(), fits_of(entry))
        first = kept.setdefault(where, entry)
        if first is not entry:
            better, worse = (entry, first) if _is_safetensors(entry) > _is_safetensors(first) else (first, entry)
            kept[where] = better
            left_out.append((worse, f"{better.path.name} beside it has the same name, and is used"))
    return list(kept.values()), left_out


def _is_safetensors(entry: Entry) -> bool:
    return entry.path.suffix.lower() == ".safetensors"
