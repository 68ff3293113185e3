"""Stage 5: a canny ControlNet on the frozen base, with images bent far more than the base saw."""

import argparse
from random import Random

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from training import unet as unet_stage
from training.diffusion import velocity_loss
from training.latents import encode, labels, subject_rows
from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train
from training.scenes import Framing, compose, random_scene, to_pixels
from training.vocabulary import STYLES

FOLDER = OUT / "controlnet-canny"
# The preprocessor's defaults; training draws others too, so that a user's thresholds work as well.
CANNY_LOW, CANNY_HIGH = 100, 200
FRAMING = Framing(scale=(0.55, 0.96), reach=0.95, tilt_deg=15, stretch=1.25)
CAPTION_DROPPED = 0.3


def canny(image: np.ndarray, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> np.ndarray:
    """Edges of a uint8 image, RGB (H, W, 3) or gray (H, W), as the annotator finds them: 0 or 255."""
    return cv2.Canny(np.ascontiguousarray(image), low, high)


def drawn_edges(image: np.ndarray, rng: Random) -> np.ndarray:
    """Edges at thresholds that a user might choose, in color or in gray."""
    low = rng.uniform(50, 110)
    seen = image if rng.random() < 0.6 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    return canny(seen, low, 2 * low)


def control_pixels(edges: list[np.ndarray]) -> Tensor:
    """Edges as ControlNet wants them: (B, 3, H, W) in [0, 1]."""
    stacked = torch.from_numpy(np.stack(edges)).float().div(255)
    return stacked[:, None].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


def frozen_base() -> StableDiffusionPipeline:
    """The pipeline of stage 4, with nothing to train, laid out for speed."""
    pipe = StableDiffusionPipeline.from_pretrained(unet_stage.FOLDER)
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.eval().requires_grad_(False)
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


class ControlNetTraining:
    """The base, the ControlNet that starts as its copy, and their loss at one step."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.pipe = frozen_base()
        self.net = ControlNetModel.from_unet(self.pipe.unet, conditioning_embedding_out_channels=(16, 32, 48))
        self.net.requires_grad_(True).train()
        self.net.set_attn_processor(AttnProcessor())
        self.net.to(memory_format=torch.channels_last)
        self.batch = plan.batch
        self.rows = subject_rows()

    def loss(self, step: int, rng: Random) -> Tensor:
        """Velocity loss of one random batch of images, their edges and their captions."""
        scenes = [random_scene(rng, self.rows, STYLES, FRAMING) for _ in range(self.batch)]
        images = [compose(scene) for scene in scenes]
        marks = [labels(scene, self.rows) for scene in scenes]
        captions = [unet_stage.caption_of(mark, rng, dropped=CAPTION_DROPPED) for mark in marks]
        ids = unet_stage.token_ids(self.pipe.tokenizer, captions, step)
        with torch.no_grad():
            words = self.pipe.text_encoder(input_ids=ids).last_hidden_state
        edges = control_pixels([drawn_edges(image, rng) for image in images])
        latents = encode(self.pipe.vae, to_pixels(images))
        return velocity_loss(lambda noisy, steps: self._predict(noisy, steps, words, edges), latents)

    def _predict(self, noisy: Tensor, steps: Tensor, words: Tensor, edges: Tensor) -> Tensor:
        down, middle = self.net(noisy, steps, words, controlnet_cond=edges, return_dict=False)
        return self.pipe.unet(
            noisy, steps, words, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    control = ControlNetTraining(plan)
    train(worker, TrainedWeights([control.net], plan), control.loss)
    if worker.leads:
        control.net.to(memory_format=torch.contiguous_format).save_pretrained(FOLDER)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    steps = parser.parse_args().steps
    launch(stage, TrainingPlan(name="controlnet", steps=steps, batch=10, learning_rate=1e-3, seed=5, ema=0.995))


if __name__ == "__main__":
    main()
