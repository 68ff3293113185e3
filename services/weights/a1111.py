"""Where the A1111 web UI, and those that took over its folders, look for a model. Pure."""

from collections.abc import Iterable, Sequence

from services.weights.components import VAE_DECODER, is_single_file, part_of_vae

FOLDER = "a1111"
CHECKPOINTS, LORAS, VAES, CONTROLNETS = (f"models/{name}" for name in ("Stable-diffusion", "Lora", "VAE", "ControlNet"))
EMBEDDINGS = "embeddings"

_KINDS = {
    "checkpoint": CHECKPOINTS,
    "lora": LORAS,
    "locon": LORAS,
    "lycoris": LORAS,
    "dora": LORAS,
    "vae": VAES,
    "controlnet": CONTROLNETS,
    "textualinversion": EMBEDDINGS,
    "embedding": EMBEDDINGS,
}
_LORA_MARKS = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1")
_CONTROL_MARKS = ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.")
_EMBEDDING_NAMES = frozenset({"emb_params", "clip_l", "clip_g", "string_to_param"})
# What diffusers calls every model alike; the model's own name says more.
_PLAIN_STEMS = frozenset({"diffusion_pytorch_model", "model", "pytorch_lora_weights", "learned_embeds"})


def place_of(kind: str, view: str, link: str, tensors: Sequence[str]) -> str:
    """The path of a model that is one file, below FOLDER; empty where it is none that has a place there."""
    folder = _folder(kind, tensors)
    stem, _, ending = link.rpartition("/")[2].rpartition(".")
    name = view.rpartition("/")[2] if stem in _PLAIN_STEMS else stem
    return f"{folder}/{name}.{ending}" if folder else ""


def _folder(kind: str, tensors: Iterable[str]) -> str:
    """By what is in it; what the source calls it is asked where that says nothing."""
    names = set(tensors)
    if is_single_file(names):
        return CHECKPOINTS
    if any(mark in name for name in names for mark in _LORA_MARKS):
        return LORAS
    if any(name.startswith(_CONTROL_MARKS) for name in names):
        return CONTROLNETS
    if names and names <= _EMBEDDING_NAMES:
        return EMBEDDINGS
    if VAE_DECODER in {part_of_vae(name) for name in names}:
        return VAES
    return _KINDS.get(kind, "") if not names or kind != "checkpoint" else ""
