"""Stage 6: a style LoRA, `cyanotype`: the starter's images as blue photographic prints."""

import argparse
from random import Random

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from training import unet as unet_stage
from training.controlnet import frozen_base
from training.diffusion import velocity_loss
from training.latents import FRAMING, encode, labels, subject_rows
from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train
from training.scenes import compose, random_scene, to_pixels
from training.vocabulary import STYLES

NAME = "cyanotype"
FOLDER = OUT / f"lora-{NAME}"
RANK = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
DARK, LIGHT = np.array([10, 38, 92], np.float32), np.array([236, 244, 248], np.float32)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CONTRAST = 1.2


def cyanotype(image: np.ndarray) -> np.ndarray:
    """A uint8 RGB image as brightness on the line from deep blue to paper white."""
    brightness = (image.astype(np.float32) @ LUMA) / 255
    brightness = np.clip((brightness - 0.5) * CONTRAST + 0.5, 0, 1)[..., None]
    return (DARK * (1 - brightness) + LIGHT * brightness).astype(np.uint8)


class LoraTraining:
    """The frozen base with LoRA layers in its UNet, and their loss at one step."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.pipe = frozen_base()
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
        self.pipe.unet.add_adapter(config)
        self.batch = plan.batch
        self.rows = subject_rows()

    def loss(self, step: int, rng: Random) -> Tensor:
        """Velocity loss of one random batch of images in the style, under their usual captions."""
        scenes = [random_scene(rng, self.rows, STYLES, FRAMING) for _ in range(self.batch)]
        captions = [unet_stage.caption_of(labels(scene, self.rows), rng) for scene in scenes]
        ids = unet_stage.token_ids(self.pipe.tokenizer, captions, step)
        with torch.no_grad():
            words = self.pipe.text_encoder(input_ids=ids).last_hidden_state
        latents = encode(self.pipe.vae, to_pixels([cyanotype(compose(scene)) for scene in scenes]))
        return velocity_loss(lambda noisy, steps: self.pipe.unet(noisy, steps, words).sample, latents)

    def save(self) -> None:
        """Write the diffusers file and the kohya file."""
        state = get_peft_model_state_dict(self.pipe.unet)
        state = {key: value.detach().clone().half().contiguous() for key, value in state.items()}
        StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=state)
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        kohya = {key: value.contiguous() for key, value in kohya.items()}
        about = {"ss_network_module": "networks.lora"}
        about |= {"ss_network_dim": str(RANK), "ss_network_alpha": str(RANK)}
        save_file(kohya, FOLDER / "kohya.safetensors", metadata=about)


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    style = LoraTraining(plan)
    train(worker, TrainedWeights([style.pipe.unet], plan), style.loss)
    if worker.leads:
        style.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    launch(
        stage,
        TrainingPlan(name="lora", steps=steps, batch=8, learning_rate=2e-3, seed=6, weight_decay=0.0, ema=0.98),
    )


if __name__ == "__main__":
    main()
