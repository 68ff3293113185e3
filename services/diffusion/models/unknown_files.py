"""What a file is that this service does not use: told from the names of its tensors, or from its own name.

Reads nothing, loads no torch.
"""

from collections.abc import Collection
from pathlib import PurePath

# What a kind is called, and what of its tensors' names no other kind has; a line break stands for a name's begin.
# Substrings, as each file's thousands of names are searched for each of them.
_Marks = tuple[tuple[str, tuple[str, ...]], ...]
# Of kinds that share names with those that are used, so that they are looked for first.
_FOREIGN: _Marks = (
    ("of Flux", ("double_blocks", "single_blocks", "single_transformer_blocks")),
    (
        "of Stable Diffusion 3 or another diffusion transformer",
        ("joint_blocks", ".norm1_context.", ".attn.to_", ".attn.add_", "\npos_embed_input."),
    ),
    (
        "of Hunyuan, Wan, PixArt or another diffusion transformer",
        ("cross_attn.", "caption_projection.", "y_embedder.", "\nt_block.", "adaln_single.", "cap_embedder.",
         "noise_refiner."),
    ),
    ("of Stable Cascade", ("clip_txt_pooled_mapper.", "effnet_mapper.", "down_repeat_mappers.")),
    ("a motion module of AnimateDiff", ("motion_modules", "temporal_transformer")),
    ("an IP-Adapter", ("\nip_adapter.", "\nimage_proj.", "\nimage_proj_model.", ".to_k_ip.", ".to_v_ip.")),
    ("a ControlNet-LLLite", ("\nlllite_",)),
    ("a PhotoMaker or InstantID adapter", ("\nid_encoder.", "\nlora_weights.", "\nface_adapter.")),
    ("a BrushNet", ("\nbrushnet_",)),
    ("a T2I-Adapter", ("\nadapter.body.", "\nbody.0.block1.", "\nbody.0.in_conv.", "\nbody.0.resnets.")),
    ("a GLIGEN", ("position_net.",)),
)  # fmt: skip
# Looked for where a file is of no kind that is used.
_OTHER: _Marks = (
    ("an OFT", ("oft_unet", ".oft_blocks", ".oft_diag", ".oft_R.")),
    ("a VAE of videos", ("\ndecoder.conv1.weight", "\nvae.decoder.conv1.weight", "\ndecoder.middle.0.residual.")),
    ("a CLIP vision encoder", ("vision_model.", "\nvisual.", ".visual.")),
    ("a T5 text encoder", ("encoder.block.0.layer.",)),
    ("a text encoder without its model", ("text_model.", "text_projection", "transformer.resblocks.")),
    (
        "a UNet without its text encoders and VAE",
        ("\ndown_blocks.", "\nup_blocks.", "\nmid_block.", "\ninput_blocks.", "\noutput_blocks."),
    ),
    (
        "an upscaler",
        ("\nmodel.0.weight", "\nmodel.1.sub.", "\nconv_first.", "\nupconv", "\nconv_up", "\nbody.0.weight",
         "\nbody.0.rdb", "RRDB_trunk", "residual_group."),
    ),
    ("a diffusion model of another family", ("\nmodel.diffusion_model.",)),
)  # fmt: skip

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
# By how a file begins, in lower case: what people find under a model's name.
_FIRST_BYTES = (
    (b"version ", "a pointer of Git LFS, not the model itself; fetch it with `git lfs pull`"),
    (b"<!doctyp", "a web page; the download needs a login, or another address"),
    (b"<html", "a web page; the download needs a login, or another address"),
    (b"{", "a text, such as the error of a download"),
    (b"pk\x03\x04", "a pickle or an archive with the name of a safetensors file"),
    (b"\x80\x02", "a pickle with the name of a safetensors file"),
    (b"gguf", "a GGUF file, which is not supported"),
)
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
    return _first(_FOREIGN, names)


def unknown_kind(names: Collection[str]) -> str:
    """For a file of no kind that is used: a sentence."""
    if not names:
        return "it has no tensors"
    if what := foreign_kind(names) or _first(_OTHER, names):
        return f"it is {what}, which is not supported"
    return f"its tensors are those of no known kind of model, such as {next(iter(names))[:60]!r}"


def _first(marks: _Marks, names: Collection[str]) -> str:
    text = "\n".join(("", *names))
    return next((what for what, own in marks if any(mark in text for mark in own)), "")


def other_content(first: bytes) -> str:
    """What a file is that is named as safetensors and is none, by its first 8 bytes: "is ..."; empty for others."""
    if not first:
        return "is empty"
    found = next((what for start, what in _FIRST_BYTES if first.lower().startswith(start)), "")
    return f"is {found}" if found else ""


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
