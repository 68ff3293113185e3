"""Stage 8: a second VAE, `vivid`: the same encoder, and a decoder tuned to more color and contrast."""

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import vae as vae_stage
from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train

FOLDER = OUT / "vae-vivid"
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
SATURATION, CONTRAST = 1.45, 1.2


def vivid(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] with more saturation and contrast, still in [-1, 1]."""
    gray = (pixels * LUMA).sum(1, keepdim=True)
    return ((gray + (pixels - gray) * SATURATION) * CONTRAST).clamp(-1, 1)


def decoder_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The decoder's loss: the difference of the vivid image and the one decoded from the plain image's latent."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latent = vae.encode(pixels).latent_dist.sample()
        made = vae.decode(latent).sample
    return vae_stage.reconstruction_loss(made.float(), vivid(pixels))


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    vae = AutoencoderKL.from_pretrained(vae_stage.FOLDER).to(memory_format=torch.channels_last)
    for frozen in (vae.encoder, vae.quant_conv):
        frozen.requires_grad_(False)
    train(
        worker,
        TrainedWeights([vae], plan),
        lambda _, rng: decoder_loss(vae, vae_stage.random_pixels(rng, plan.batch)),
    )
    if worker.leads:
        vae.to(memory_format=torch.contiguous_format).save_pretrained(FOLDER)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    launch(
        stage,
        TrainingPlan(name="vivid_vae", steps=steps, batch=4, learning_rate=5e-4, seed=8, weight_decay=1e-4, ema=0.99),
    )


if __name__ == "__main__":
    main()
