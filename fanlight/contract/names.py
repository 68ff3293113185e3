"""What models, annotators and schedulers are called: references, aliases, near names. Knows none that are there."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from fanlight.contract.annotator_aliases import ALIASES as ANNOTATOR_ALIASES

__all__ = ["ANNOTATOR_ALIASES", "ANY", "find_name", "is_reference", "near_names", "need", "plain_name"]

# The id under which a worker offers to fetch whatever a reference names.
ANY = "*"
# What A1111 writes behind a model's name.
_BEHIND_A_NAME = re.compile(r"(\.(safetensors|ckpt|pth|pt|bin))?(\s*\[[0-9a-fA-F]{6,64}\])?$", re.IGNORECASE)
# Longer names have no near ones: comparing costs the product of the lengths.
_NEAR_CHARACTERS = 80


def is_reference(name: str) -> bool:
    """Says where the model comes from, such as `hf:org/repo`; ids have neither colon nor slash."""
    return ":" in name or "/" in name


def plain_name(name: str) -> str:
    """`canny` of `Canny.safetensors [d14c016b]`: in lower case, without ending and hash."""
    return _BEHIND_A_NAME.sub("", name.strip()).lower()


def find_name(known: Mapping[str, Sequence[str]], name: str) -> str:
    """The id that is meant, or whose alias is meant; empty where there is none. `known`: aliases by id.

    An id as it is written wins over one in another case, and any id over an alias.
    """
    if name in known and name != ANY:
        return name
    plain = plain_name(name)
    if not plain or plain == ANY:
        return ""
    others = [each for each in known if each != ANY]
    by_id = next((each for each in others if plain_name(each) == plain), "")
    return by_id or next((each for each in others if plain in map(plain_name, known[each])), "")


def need(kind: str, name: str) -> str:
    """What a worker must offer for a model: the model, or that it fetches any reference of the kind."""
    return f"{kind}:{ANY if is_reference(name) else name}"


def near_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to so many of the known names that are like it, the nearest first; case does not count."""
    by_lower: dict[str, str] = {}
    for each in known:
        by_lower.setdefault(each.lower(), each)
    wanted = name.strip().lower()[:_NEAR_CHARACTERS]
    return [by_lower[each] for each in difflib.get_close_matches(wanted, by_lower, n=count, cutoff=0.5)]
