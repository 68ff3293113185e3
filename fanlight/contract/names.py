"""Names: of models, annotators and schedulers with their aliases and near matches; of blobs, by scope and digest.

Knows no model or annotator of a fleet, except the table of other services' names for annotators.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from unicodedata import normalize

from fanlight.errors import InvalidField

# The id under which a worker offers to fetch whatever a reference names.
ANY = "*"
# Between the folder's name and the model's, in ids of models that share a name.
FOLDER_SEPARATOR = "."
# What A1111 appends to a model's name.
_BEHIND_A_NAME = re.compile(r"(\.(safetensors|ckpt|pth|pt|bin))?(\s*\[[0-9a-fA-F]{6,64}\])?$", re.IGNORECASE)
# Longer names are cut off: comparing costs the product of the lengths.
_NEAR_CHARACTERS = 80


def is_reference(name: str) -> bool:
    """Whether the name says where the model comes from, such as `hf:org/repo`; ids have neither colon nor slash."""
    return ":" in name or "/" in name


def plain_name(name: str) -> str:
    """`canny` of `Canny.safetensors [d14c016b]`: in lower case, without ending and hash.

    Letters with marks are one character each, as most programs write them; macOS has them as two in files' names.
    """
    return normalize("NFC", _BEHIND_A_NAME.sub("", name.strip()).strip().lower())


def find_name(known: Mapping[str, Sequence[str]], name: str) -> str:
    """The id that the name or alias stands for; empty where there is none. `known`: aliases by id.

    The exact id wins over one in another case, and any id over an alias.
    """
    if name in known and name != ANY:
        return name
    plain = plain_name(name)
    if not plain or plain == ANY:
        return ""
    others = [each for each in known if each != ANY]
    by_id = next((each for each in others if plain_name(each) == plain), "")
    return by_id or next((each for each in others if plain in map(plain_name, known[each])), "")


def shares_name(id_: str, name: str) -> bool:
    """Whether a model was given its folder's name, as in `people.detail`, because the bare name is several models'."""
    plain = plain_name(name)
    return bool(plain) and plain_name(id_).endswith(f"{FOLDER_SEPARATOR}{plain}")


def need(kind: str, name: str) -> str:
    """What a worker must offer for a model: the model itself, or to fetch any reference of that kind."""
    return f"{kind}:{ANY if is_reference(name) else name}"


def near_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` known names that are similar to it, the nearest first; case is ignored."""
    by_lower: dict[str, str] = {}
    for each in known:
        by_lower.setdefault(each.lower(), each)
    searched = name.strip().lower()[:_NEAR_CHARACTERS]
    return [by_lower[each] for each in difflib.get_close_matches(searched, by_lower, n=count, cutoff=0.5)]


DEFAULT_SCOPE = "default"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SCOPE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def digest_of(data: bytes) -> str:
    return named(hashlib.sha256(data).hexdigest())


def named(hexdigest: str) -> str:
    return f"sha256:{hexdigest}"


def parse_digest(text: str, *, field: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise InvalidField("must be sha256: and 64 lower-case hexadecimal digits", field=field)
    return text


def parse_scope(text: str, *, field: str) -> str:
    """The scope's name; an empty one is the default."""
    if not text:
        return DEFAULT_SCOPE
    if not _SCOPE.fullmatch(text):
        raise InvalidField("must be 1 to 63 of a-z, 0-9 and -, not starting with -", field=field)
    return text


# Other services' names for annotators. A1111: the modules of sd-webui-controlnet. Civitai: its orchestration's
# ImageTransformer and preprocessImage kinds. Runware: its ControlNet preprocessors. Horde: AI Horde's control types.
_A1111 = {
    "depth": "depth_midas",
    "depth_leres_boost": "depth_leres++",
    "normal_map": "normal_midas",
    "lineart": "lineart_realistic",
    "lineart_standard (from white bg & black line)": "lineart_standard",
    "hed": "softedge_hed",
    "hed_safe": "softedge_hedsafe",
    "pidinet": "softedge_pidinet",
    "pidinet_safe": "softedge_pidsafe",
    "softedge_pidisafe": "softedge_pidsafe",
    "pidinet_scribble": "scribble_pidinet",
    "softedge_teed": "teed",
    "softedge_anyline": "anyline",
    "segmentation": "seg_ufade20k",
    "oneformer_ade20k": "seg_ofade20k",
    "oneformer_coco": "seg_ofcoco",
    "dw_openpose_full": "dwpose",
    "tile_resample": "tile",
    "inpaint_only": "inpaint",
    "inpaint_global_harmonious": "inpaint",
    "none": "ip2p",
    "depth_anything": "depth_anything_v2",
    "invert (from white bg & black line)": "invert",
}
_CIVITAI = {
    "depthZoe": "depth_zoe",
    "zoeDepth": "depth_zoe",
    "zoe-depth": "depth_zoe",
    "depthAnything": "depth_anything_v2",
    "depth-anything": "depth_anything_v2",
    "depthAnythingV2": "depth_anything_v2",
    "depth-anything-v2": "depth_anything_v2",
    "midasDepth": "depth_midas",
    "midas-depth": "depth_midas",
    "leresDepth": "depth_leres",
    "leres-depth": "depth_leres",
    "softedgePidinet": "softedge_pidinet",
    "midasNormal": "normal_midas",
    "midas-normal": "normal_midas",
    "baeNormal": "normal_bae",
    "bae-normal": "normal_bae",
    "lineartRealistic": "lineart_realistic",
    "lineart-realistic": "lineart_realistic",
    "lineartStandard": "lineart_standard",
    "lineart-standard": "lineart_standard",
    "lineartAnime": "lineart_anime",
    "lineart-anime": "lineart_anime",
    "scribble": "scribble_pidinet",
    "scribbleXdog": "scribble_xdog",
    "scribble-xdog": "scribble_xdog",
    "scribblePidinet": "scribble_pidinet",
    "scribble-pidinet": "scribble_pidinet",
    "fakeScribble": "scribble_hed",
    "fake-scribble": "scribble_hed",
    "oneformerCoco": "seg_ofcoco",
    "oneformer-coco": "seg_ofcoco",
    "oneformerAde20k": "seg_ofade20k",
    "oneformer-ade20k": "seg_ofade20k",
    "uniformer": "seg_ufade20k",
    "rembg": "remove_background",
    "binary": "threshold",
    "mediapipe-face": "mediapipe_face",
    # Of its older SDKs.
    "Canny": "canny",
    "DepthZoe": "depth_zoe",
    "SoftedgePidinet": "softedge_pidinet",
    "Rembg": "remove_background",
}
_RUNWARE = {
    "canny_edge": "canny",
    "lineart_fine": "lineart_realistic",
    "openpose_body": "openpose",
    "seg": "seg_ofade20k",
    "normalbae": "normal_bae",
    "softedge": "softedge_hed",
    "tile_gaussian": "blur_gaussian",
}
_HORDE = {
    "normal": "normal_bae",
    "fakescribbles": "scribble_hed",
    "hough": "mlsd",
}

ANNOTATOR_ALIASES: Mapping[str, str] = {**_HORDE, **_RUNWARE, **_CIVITAI, **_A1111}
