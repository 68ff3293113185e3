"""Stage 3: a pool of scenes encoded to latents once, so that the UNet's training never waits for the VAE."""

import argparse
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import vae as vae_stage
from training.parallel import OUT, WORLD, TrainingProcess, launch
from training.scenes import Framing, Scene, compose, random_scene, rows_by_emoji, to_pixels
from training.vocabulary import STYLES, load_colors, load_subjects

# Never mirrored: a base this small draws a blend of both mirrorings. Place and size are what seeds change.
FRAMING = Framing(scale=(0.76, 0.94), reach=1.0, jitter=9.0, mirrored=0.0)
CHUNK = 20
COLOR_NAMES = list(load_colors())


def subject_rows() -> list[int]:
    """Sprite row of each subject, in the order of subjects."""
    return [rows_by_emoji()[subject.emoji] for subject in load_subjects()]


def labels(scene: Scene, rows: list[int]) -> tuple[int, int, int]:
    """Indices of subject, style and color."""
    return rows.index(scene.row), STYLES.index(scene.style), COLOR_NAMES.index(scene.color)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) to scaled latents (B, 4, H/4, W/4), float32."""
    with torch.autocast("cpu", torch.bfloat16):
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor


def stage(worker: TrainingProcess, count: int) -> None:
    """Encode this process's share and write out/latents_RANK.pt."""
    vae = AutoencoderKL.from_pretrained(vae_stage.FOLDER).eval().to(memory_format=torch.channels_last)
    rng, rows = Random(500 + worker.rank), subject_rows()
    latents, marks = [], []
    for _ in range(count // WORLD // CHUNK):
        scenes = [random_scene(rng, rows, STYLES, FRAMING) for _ in range(CHUNK)]
        latents.append(encode(vae, to_pixels([compose(scene) for scene in scenes])).half().contiguous())
        marks += [labels(scene, rows) for scene in scenes]
    part = {"latents": torch.cat(latents), "labels": torch.tensor(marks)}
    torch.save(part, OUT / f"latents_{worker.rank}.pt")


def load_pool() -> tuple[Tensor, Tensor]:
    """All latents (N, 4, 16, 16) float16 and labels (N, 3): subject, style, color."""
    parts = [torch.load(OUT / f"latents_{rank}.pt", weights_only=True) for rank in range(WORLD)]
    return torch.cat([part["latents"] for part in parts]), torch.cat([part["labels"] for part in parts])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    launch(stage, parser.parse_args().count)
    latents, _ = load_pool()
    print(f"{len(latents)} latents, mean {latents.float().mean():.3f}, deviation {latents.float().std():.3f}")


if __name__ == "__main__":
    main()
