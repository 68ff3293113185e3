"""Stage 9: the trained parts as fp16 safetensors in fanlight/starter, with a manifest. Trains nothing."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline

from training import controlnet, inversion, lora, tokenizer, unet, vivid_vae

STARTER = Path(__file__).parents[1] / "fanlight" / "starter"
LICENSE = "MIT AND Apache-2.0"


def export_model(source: Path) -> None:
    """The pipeline in fp16, with vocab.json and merges.txt beside transformers' own tokenizer file."""
    pipe = StableDiffusionPipeline.from_pretrained(source).to(dtype=torch.float16)
    pipe.save_pretrained(STARTER / "model", safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer.FOLDER / name, STARTER / "model" / "tokenizer" / name)


def export_extras() -> None:
    """ControlNet, second VAE, LoRA and textual inversion."""
    for kind, folder in ((ControlNetModel, controlnet.FOLDER), (AutoencoderKL, vivid_vae.FOLDER)):
        kind.from_pretrained(folder).half().save_pretrained(STARTER / folder.name)
    for folder in (lora.FOLDER, inversion.FOLDER):
        shutil.copytree(folder, STARTER / folder.name, dirs_exist_ok=True)


def tidy() -> None:
    """Drop the folders that diffusers notes in configurations, and let everyone read the weights.

    The text encoder's `dtype` is what transformers computes in by default; halves would not match the UNet's floats.
    """
    for path in [*STARTER.rglob("config.json"), *STARTER.rglob("model_index.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    for path in STARTER.rglob("*.safetensors"):
        path.chmod(0o644)


def describe(path: Path) -> dict:
    """One manifest entry."""
    data = path.read_bytes()
    return {
        "path": path.relative_to(STARTER).as_posix(),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "license": LICENSE,
    }


def write_manifest() -> int:
    """Write MANIFEST.json over every shipped file; returns their bytes together."""
    shipped = {".safetensors", ".json", ".txt"}
    paths = sorted(p for p in STARTER.rglob("*") if p.suffix in shipped and p.name != "MANIFEST.json")
    files = [describe(path) for path in paths if "LICENSES" not in path.parts]
    (STARTER / "MANIFEST.json").write_text(json.dumps({"files": files}, indent=1) + "\n")
    return sum(file["bytes"] for file in files)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=unet.FOLDER, help="the pipeline to export")
    parser.add_argument("--model-only", action="store_true", help="leave ControlNet, LoRA and the rest out")
    options = parser.parse_args()
    export_model(options.model)
    if not options.model_only:
        export_extras()
    tidy()
    print(f"{write_manifest()} bytes in {STARTER.name}")


if __name__ == "__main__":
    main()
