"""What a file is that this service does not use: told from the names of its tensors, or from its own name.

Reads nothing, loads no torch.
"""

import re
from collections.abc import Collection
from pathlib import PurePath

# Of kinds that share names with those that are used, so that they are looked for first: what it is, what a tensor's
# name has.
_FOREIGN = (
    ("of Flux", r"double_blocks[._]\d|single_blocks[._]\d|single_transformer_blocks[._]\d"),
    (
        "of Stable Diffusion 3 or another diffusion transformer",
        r"joint_blocks[._]\d|transformer_blocks[._]\d+[._](norm1_context|attn[._])|(^|\.)pos_embed_input\.",
    ),
    (
        "of Hunyuan, Wan, PixArt or another diffusion transformer",
        r"(^|[._])(cross_attn|caption_projection|y_embedder|t_block|adaln_single|cap_embedder|noise_refiner)[._]",
    ),
    ("of Stable Cascade", r"(^|\.)(clip_txt_pooled_mapper|effnet_mapper|down_repeat_mappers)\."),
    ("a motion module of AnimateDiff", r"(^|[._])(motion_modules|temporal_transformer)[._]"),
    ("an IP-Adapter", r"^(ip_adapter|image_proj|image_proj_model)\.|\.to_[kv]_ip\."),
    ("a ControlNet-LLLite", r"^lllite_"),
    ("a PhotoMaker or InstantID adapter", r"^(id_encoder|lora_weights|face_adapter)\."),
    ("a BrushNet", r"^brushnet_"),
    ("a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block1|block2|resnets|in_conv|down_opt)\b"),
    ("a GLIGEN", r"(^|\.)position_net\."),
)
# Looked for where a file is of no kind that is used.
_OTHER = (
    ("an OFT", r"oft_unet|\.oft_(blocks|diag|R)\b"),
    ("a CLIP vision encoder", r"(^|\.)(vision_model|visual)\."),
    ("a T5 text encoder", r"(^|\.)encoder\.block\.\d+\.layer\."),
    ("a text encoder without its model", r"(^|\.)(text_model|text_projection|transformer\.resblocks)\b"),
    ("a UNet without its text encoders and VAE", r"^(down|up|mid)_blocks?\.|^(input|output)_blocks\."),
    (
        "an upscaler",
        r"^(model\.\d+\.(sub|weight|bias)|conv_first|upconv\d|conv_up\d|body\.\d+\.(weight|rdb\d|RDB\d)|RRDB_trunk)"
        r"|residual_group",
    ),
    ("a diffusion model of another family", r"^model\.diffusion_model\."),
)
_FOREIGN_MARKS = tuple((what, re.compile(pattern)) for what, pattern in _FOREIGN)
_OTHER_MARKS = tuple((what, re.compile(pattern)) for what, pattern in _OTHER)

SAFETENSORS = ".safetensors"
PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_FORMATS = {
    ".gguf": "a GGUF file, which is not supported",
    ".sft": "named .sft; rename it to .safetensors",
    ".onnx": "an ONNX file, which is not supported",
    ".msgpack": "of Flax, which is not supported",
    ".h5": "of Keras, which is not supported",
    ".engine": "a TensorRT engine, which is not supported",
    ".trt": "a TensorRT engine, which is not supported",
    ".tflite": "of TensorFlow, which is not supported",
    ".mlmodel": "of Core ML, which is not supported",
    ".mlpackage": "of Core ML, which is not supported",
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".gz", ".tgz"), "packed; unpack it"),
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".incomplete"), "an unfinished download"
    ),
}
# A file of an unknown ending is worth a word only where it may hold weights.
LARGE_BYTES = 1024 * 1024
# Large, and no weights.
_DOCUMENTS = frozenset({
    ".avif", ".bmp", ".csv", ".flac", ".gif", ".html", ".ipynb", ".jpeg", ".jpg", ".json", ".jsonl", ".log", ".m4a",
    ".md", ".mkv", ".mov", ".mp3", ".mp4", ".pdf", ".png", ".psd", ".py", ".svg", ".tif", ".tiff", ".toml", ".txt",
    ".wav", ".webm", ".webp", ".xml", ".yaml", ".yml",
})  # fmt: skip


def foreign_kind(names: Collection[str]) -> str:
    """What a file is by its tensors' names, such as `a T2I-Adapter`; empty for what may be of a kind that is used."""
    return _first(_FOREIGN_MARKS, names)


def unknown_kind(names: Collection[str]) -> str:
    """For a file of no kind that is used: a sentence."""
    if not names:
        return "it has no tensors"
    what = foreign_kind(names) or _first(_OTHER_MARKS, names)
    if what:
        return f"it is {what}, which is not supported"
    return f"its tensors are those of no known kind of model, such as {next(iter(names))[:60]!r}"


def _first(marks: tuple[tuple[str, re.Pattern[str]], ...], names: Collection[str]) -> str:
    return next((what for what, mark in marks if any(mark.search(name) for name in names)), "")


def unread_file(path: PurePath, size_bytes: int) -> str:
    """Why a file is not used that is not opened: a sentence, by its ending. Empty for what is no model at all."""
    ending = path.suffix.lower()
    if ending in PICKLES:
        return (
            "it is a pickle, which could run code and is not loaded; convert it to .safetensors"
            " (textual inversions are read in folders named embeddings)"
        )
    if ending in _FORMATS:
        return f"it is {_FORMATS[ending]}"
    if ending in _DOCUMENTS or size_bytes < LARGE_BYTES:
        return ""
    return f"its name ends in {ending[:20]!r}, as no model's does" if ending else "its name has no ending"
