"""Stage 1: an AutoencoderKL with latent factor 4, trained on every emoji of three packs."""

import argparse
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train
from training.scenes import PICTURE_PX, Framing, compose, random_scene, sprites, to_pixels

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "sample_size": PICTURE_PX,
    "scaling_factor": 0.18215,
}
FRAMING = Framing(scale=(0.5, 0.97), reach=0.9)
STYLES = ("3d", "flat", "noto")
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.3
FOLDER = OUT / "vae"


def random_pixels(rng: Random, count: int) -> Tensor:
    """Pixels (count, 3, 64, 64) of random scenes over all emoji."""
    rows = range(len(sprites()["names"]))
    return to_pixels([compose(random_scene(rng, rows, STYLES, FRAMING)) for _ in range(count)])


def edge_difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and of the vertical pixel steps."""
    return sum((one.diff(dim=dim) - other.diff(dim=dim)).abs().mean() for dim in (2, 3))


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 + L2 + the edges at full and half size, which keep outlines sharp."""
    half_made, half_wanted = (functional.avg_pool2d(pixels, 2) for pixels in (made, wanted))
    edges = edge_difference(made, wanted) + edge_difference(half_made, half_wanted)
    return functional.l1_loss(made, wanted) + functional.mse_loss(made, wanted) + EDGE_WEIGHT * edges


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Reconstruction plus a little KL to the unit normal."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(pixels).latent_dist
        made = vae.decode(latent.sample()).sample
    mean, logvar = latent.mean.float(), latent.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return reconstruction_loss(made.float(), pixels) + KL_WEIGHT * divergence


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean PSNR in dB of encode and decode."""
    made = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((made - pixels) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the quant convolutions.

    Images stay the same, and 0.18215 * latent has mean 0 and deviation 1: SD's scaling factor stays true.
    """
    latents = vae.encode(pixels).latent_dist.mode()
    mean = latents.mean((0, 2, 3))
    gain = 1 / (vae.config.scaling_factor * latents.std((0, 2, 3)))
    into, back = vae.quant_conv, vae.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight /= gain[None, :, None, None]
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * gain
    into.bias[4:] += 2 * gain.log()


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    weights = TrainedWeights([vae], plan)
    train(worker, weights, lambda _, rng: vae_loss(vae, random_pixels(rng, plan.batch)))
    if worker.leads:
        finish(vae.eval())


def finish(vae: AutoencoderKL) -> None:
    """Normalize, save, and say how good it is."""
    held = random_pixels(Random(99), 64)
    before = psnr(vae, held)
    normalize_latents(vae, random_pixels(Random(98), 384))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(FOLDER)
    print(f"PSNR {before:.2f} dB, {psnr(vae, held):.2f} dB after the latents were normalized", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5500)
    steps = parser.parse_args().steps
    plan = TrainingPlan(name="vae", steps=steps, batch=4, learning_rate=2e-3, seed=1, weight_decay=1e-4, ema=0.995)
    launch(stage, plan)


if __name__ == "__main__":
    main()
