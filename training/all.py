"""Run every stage in order, each in a process of its own; a stage whose result exists is not run again."""

import subprocess
import sys
from pathlib import Path

from training.parallel import OUT

# Each stage's module and the file that shows it has been run.
STAGES: list[tuple[str, Path]] = [
    ("emoji", OUT.parent / "data" / "sprites.npz"),
    ("vae", OUT / "vae" / "config.json"),
    ("tokenizer", OUT / "tokenizer" / "merges.txt"),
    ("latents", OUT / "latents_1.pt"),
    ("unet", OUT / "model" / "model_index.json"),
    ("controlnet", OUT / "controlnet-canny" / "config.json"),
    ("lora", OUT / "lora-cyanotype" / "kohya.safetensors"),
    ("inversion", OUT / "embeddings" / "mint.safetensors"),
    ("vivid_vae", OUT / "vae-vivid" / "config.json"),
]


def run(module: str, *options: str) -> None:
    """Run one stage's command."""
    print(f"== {module}", flush=True)
    subprocess.run([sys.executable, "-m", f"training.{module}", *options], check=True)


def main() -> None:
    """Train what is missing, then export and evaluate."""
    for module, result in STAGES:
        if not result.exists():
            run(module)
    run("export")
    run("evaluate", "all")


if __name__ == "__main__":
    main()
