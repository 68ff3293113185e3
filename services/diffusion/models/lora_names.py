"""The names of tensors in LoRA files of all formats: which layer of which part each is for, and what it is to it.

kohya's, diffusers' of all ages, PEFT's, LyCORIS' and ComfyUI's. Reads nothing, loads no torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

PARTS = ("unet", "text_encoder", "text_encoder_2")
BUNDLED = "bundle_emb."
NAMES_CACHED = 16_384


class UnsupportedForm(Exception):
    """A LoRA that cannot be applied; the message goes on from "it is"."""


class LoraName(NamedTuple):
    """What a tensor's name says. `module`: with the file's own dots or underscores, without what stands before it."""

    part: str
    module: str
    # One of the values of `_WHAT` and `_ALONE`.
    what: str
    # PEFT's name for what was trained, such as `default`; empty where the file has none.
    adapter: str = ""


# What a tensor is, by a mark in its name and the name's end; PEFT has an adapter's name between the two.
_WHAT: Mapping[tuple[str, str], str] = {
    **{(mark, "weight"): "down" for mark in ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")},
    **{(mark, "weight"): "up" for mark in ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")},
    **{(mark, "bias"): "up_bias" for mark in ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")},
    ("lora_mid", "weight"): "mid",
    ("lora_magnitude_vector", "weight"): "row_magnitude",
    ("lora_magnitude_vector", ""): "row_magnitude",
    ("lora_embedding_A", ""): "token_down",
    ("lora_embedding_B", ""): "token_up",
    ("ia3_l", ""): "ia3_scale",
    **{(mark, "weight"): f"glora_{mark}" for mark in ("a1", "a2", "b1", "b2", "bm")},
    **{
        (mark, ""): mark
        for mark in (
            *(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
    },
}
# Of formats without adapters.
_ALONE = {
    "alpha": "alpha",
    "scale": "scale",
    "scalar": "scalar",
    "dora_scale": "magnitude",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_rotations",
    "rescale": "rescale",
    "on_input": "on_input",
}
_AFTER_UNDERSCORES = {f"{mark}.{end}" if end else mark: what for (mark, end), what in _WHAT.items()} | _ALONE
_MARKS = "|".join(re.escape(mark) for mark in sorted({mark for mark, _ in _WHAT}, key=len, reverse=True))
_MARK = re.compile(
    rf"(?P<module>.+?)\.(?P<mark>{_MARKS})"
    r"(?:\.(?P<adapter>[^.]+?))??(?:\.(?P<end>weight|bias))?"
)
_ALONE_MARK = re.compile(rf"(?P<module>.+)\.(?P<mark>{'|'.join(_ALONE)})")
# PEFT's whole tensors: biases that were trained too, and layers of `modules_to_save`.
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<end>weight|bias)")
_WHOLE_TENSORS = frozenset({"whole_weight", "whole_bias"})
# Known and not supported, by what is in a tensor's name. PEFT's forms, which are LoRAs in no other sense, come first.
_PEFTS_OWN = (
    (r"\.(oft_[rR]|oft_embedding_R)\b", "an OFT of PEFT"),
    (r"\.(boft_[RsP])\b", "a BOFT of PEFT"),
    (r"\.(lora_E|ranknum)\b", "an AdaLoRA"),
    (r"\.(vera_lambda|vera_[AB])", "a VeRA"),
    (
        r"\.(hra_u|vblora_|fourierft_spectrum|poly_lora|randlora_|bone_|miss_|shira_|c3a_|road_|waveft_)",
        "of a form that only PEFT has",
    ),
)
_TRANSFORMER = "of a diffusion transformer (Flux, SD3 or newer)"
_OTHER_FORMS = tuple(
    (re.compile(pattern), form)
    for pattern, form in (
        *_PEFTS_OWN,
        (r"\.bias_(indices|values|size)$", "a LoCon with sparse biases"),
        (r"^lora_controlnet$", "a Control-LoRA, which is a ControlNet"),
        (r"^(text_encoder|unet):\d+:", "in cloneofsimo's format, which only numbers its layers"),
        (r"[._](te3|text_encoder_3)[._]|^lora_transformer[._]|^transformer\.", _TRANSFORMER),
        (r"(double|single)_blocks[._]\d|joint_blocks[._]\d", _TRANSFORMER),
        (r"motion_modules|temporal_transformer", "a motion LoRA of AnimateDiff"),
        (r"^lora_prior_", "of Stable Cascade"),
    )
)
# A name of a form above has one of these: looked for in all names at once, which costs nothing.
_HINTS = (
    ".oft_r", ".oft_R", ".oft_e", ".boft_", ".lora_E", ".ranknum", ".vera_", ".hra_u", ".vblora_", ".fourierft_",
    ".poly_lora", ".randlora_", ".bone_", ".miss_", ".shira_", ".c3a_", ".road_", ".waveft_", ".bias_",
    "lora_controlnet", "text_encoder:", "unet:", "te3", "text_encoder_3", "lora_transformer", "transformer.",
    "double_blocks", "single_blocks", "joint_blocks", "motion_modules", "temporal_transformer", "lora_prior_",
)  # fmt: skip
_IGNORED_END = "position_ids"
# What trainers' wrappers put before everything else, some of them twice.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.")
_HEADS = {
    **{
        f"{kind}_{part}_": meant
        for kind in ("lora", "oft", "lycoris")
        for part, meant in (
            ("unet", "unet"),
            ("te1", "text_encoder"),
            ("te2", "text_encoder_2"),
            ("te", "text_encoder"),
        )
    },
    "lycoris_": "unet",
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    # ComfyUI's.
    **{
        f"{head}{clip}.": meant
        for head in ("text_encoders.", "")
        for clip, meant in (("clip_l", "text_encoder"), ("clip_h", "text_encoder"), ("clip_g", "text_encoder_2"))
    },
}
_WRAPPED = f"(?:{'|'.join(map(re.escape, _WRAPPERS))})*"
_BEFORE = re.compile(f"{_WRAPPED}({'|'.join(map(re.escape, _HEADS))})?{_WRAPPED}")
_TEXT = re.compile(r"(text_model|encoder|final_layer_norm|embeddings)\.")
# `attn1.processor.to_q_lora.down`, as diffusers wrote before PEFT.
_OLD_ATTENTION = re.compile(r"\.(to_q|to_k|to_v|to_out)_lora\.(?=(?:down|up)\.)")
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def is_lora(names: Iterable[str]) -> bool:
    """Whether the names of a file's tensors are those of a LoRA in the widest sense."""
    return any(
        name.startswith(("lora_", "oft_", "lycoris_"))
        or ((found := _MARK.fullmatch(name)) is not None and (found["mark"], found["end"] or "") in _WHAT)
        or _OLD_ATTENTION.search(name)
        or name.endswith((".dora_scale", ".oft_blocks", ".oft_diag", ".on_input"))
        or any(mark.search(name) for mark, _ in _OTHER_FORMS[: len(_PEFTS_OWN)])
        for name in names
    )


def lora_names(names: Collection[str]) -> Mapping[str, LoraName]:
    """What each tensor's name says, without those that change no layer. UnsupportedForm for the whole file."""
    text = "\n".join(names)
    if any(hint in text for hint in _HINTS):
        for mark, form in _OTHER_FORMS:
            if found := next(filter(mark.search, names), ""):
                raise UnsupportedForm(f"{form}, which is not supported (tensor {found[:80]})")
    read = {name: _read(name) for name in names if not (name.startswith(BUNDLED) or name.endswith(_IGNORED_END))}
    _check(read)
    return read


def _check(read: Mapping[str, LoraName]) -> None:
    if not read:
        raise UnsupportedForm("without a single layer")
    if unknown := _without_owner(read):
        raise UnsupportedForm(f"of an unknown form, which is not supported (tensor {unknown[:80]})")
    if not any(meant.adapter for meant in read.values()):
        return
    adapters: dict[tuple[str, str, str], str] = {}
    for meant in read.values():
        other = adapters.setdefault((meant.part, plain_name(meant.module), meant.what), meant.adapter)
        if other != meant.adapter:
            raise UnsupportedForm(f"of two adapters, {other[:40]!r} and {meant.adapter[:40]!r}; save one of them")


def _without_owner(read: Mapping[str, LoraName]) -> str:
    """The name of a whole tensor that is neither PEFT's nor LyCORIS' IA3's; empty where there is none."""
    whole = {name: meant for name, meant in read.items() if meant.what in _WHOLE_TENSORS}
    if not whole or any(name.startswith("base_model.model.") or ".base_layer." in name for name in read):
        return ""
    ia3 = {(meant.part, meant.module) for meant in read.values() if meant.what == "on_input"}
    return next((name for name, meant in whole.items() if (meant.part, meant.module) not in ia3), "")


# Most LoRAs have the same names, of a few trainers.
@lru_cache(maxsize=NAMES_CACHED)
def _read(name: str) -> LoraName:
    part, rest = _part_of(name)
    module, _, mark = rest.partition(".")
    if what := _AFTER_UNDERSCORES.get(mark):
        # Of most files, and five times as fast.
        return LoraName(part=part, module=module, what=what)
    if ".processor." in rest or "_lora." in rest:
        rest = _OLD_ATTENTION.sub(lambda old: f".{_new_name(old[1], part)}.lora.", rest.replace(".processor.", "."))
    if found := _MARK.fullmatch(rest):
        ends = (found["end"] or "", "weight") if found["end"] is None else (found["end"],)
        what = next((_WHAT[found["mark"], end] for end in ends if (found["mark"], end) in _WHAT), "")
        if what:
            return LoraName(part=part, module=found["module"], what=what, adapter=found["adapter"] or "")
    if found := _ALONE_MARK.fullmatch(rest):
        return LoraName(part=part, module=found["module"], what=_ALONE[found["mark"]])
    if found := _WHOLE.fullmatch(rest):
        return LoraName(part=part, module=found["module"], what=f"whole_{found['end']}")
    raise UnsupportedForm(f"of an unknown form, which is not supported (tensor {name[:80]})")


def _new_name(old: str, part: str) -> str:
    if part != "unet":
        return _OLD_TEXT_NAMES[old]
    return "to_out.0" if old == "to_out" else old


def _part_of(name: str) -> tuple[str, str]:
    """The part of the model, and the name without what stands before the layer's."""
    found = _BEFORE.match(name)
    assert found is not None, "it matches nothing at least"
    rest = name[found.end() :]
    part = _HEADS.get(found[1] or "", "")
    if not part:
        return ("text_encoder" if _TEXT.match(rest) else "unet"), rest
    return part, rest if part == "unet" else rest.removeprefix("transformer.")


def plain_name(module: str) -> str:
    """With underscores for dots, and without `text_model` before a text encoder's names."""
    return module.replace(".", "_").removeprefix("text_model_")
