"""Stage 7: a textual inversion, `<mint>`: one new word for a background color that no caption names."""

import argparse
from dataclasses import replace
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training import unet as unet_stage
from training.captions import plain_prompt
from training.controlnet import frozen_base
from training.diffusion import velocity_loss
from training.latents import FRAMING, encode, labels, subject_rows
from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train
from training.scenes import compose, random_scene, to_pixels
from training.vocabulary import STYLES

TOKEN = "<mint>"
COLOR = (168, 240, 205)
START_WORD = "green"
FOLDER = OUT / "embeddings"


class InversionTraining(nn.Module):
    """The frozen base with one trainable word vector, and its loss at one step."""

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__()
        self.pipe = frozen_base()
        self.pipe.tokenizer.add_tokens([TOKEN])
        self.pipe.text_encoder.resize_token_embeddings(len(self.pipe.tokenizer))
        self.pipe.text_encoder.requires_grad_(False)
        self.token_id = self.pipe.tokenizer.convert_tokens_to_ids(TOKEN)
        table = self.pipe.text_encoder.get_input_embeddings()
        start = table.weight[self.pipe.tokenizer.convert_tokens_to_ids(START_WORD + "</w>")]
        self.vector = nn.Parameter(start.detach().clone())
        table.register_forward_hook(self._put_vector)
        self.batch = plan.batch
        self.rows = subject_rows()

    def _put_vector(self, _table: nn.Module, inputs: tuple[Tensor], found: Tensor) -> Tensor:
        """Use the trained vector where the ids hold the new word."""
        return torch.where((inputs[0] == self.token_id)[..., None], self.vector.to(found.dtype), found)

    def loss(self, step: int, rng: Random) -> Tensor:
        """Velocity loss of one random batch of images on the new color."""
        scenes = [random_scene(rng, self.rows, STYLES, FRAMING) for _ in range(self.batch)]
        images = [compose(replace(scene, background=COLOR)) for scene in scenes]
        named = [labels(scene, self.rows) for scene in scenes]
        names = [unet_stage.SUBJECTS[subject].name for subject, _, _ in named]
        captions = [plain_prompt(name, s.style, TOKEN) for name, s in zip(names, scenes, strict=True)]
        ids = unet_stage.token_ids(self.pipe.tokenizer, captions, step)
        latents = encode(self.pipe.vae, to_pixels(images))
        return velocity_loss(lambda noisy, steps: self._predict(noisy, steps, ids), latents)

    def _predict(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        return self.pipe.unet(noisy, steps, self.pipe.text_encoder(input_ids=ids).last_hidden_state).sample

    def save(self) -> None:
        """Write the diffusers file and the file that A1111 and Civitai use."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        vector = self.vector.detach()[None].clone()
        save_file({TOKEN: vector}, FOLDER / "mint.safetensors")
        save_file({"emb_params": vector}, FOLDER / "mint.a1111.safetensors", metadata={"name": TOKEN})


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    inversion = InversionTraining(plan)
    train(worker, TrainedWeights([inversion], plan), inversion.loss)
    if worker.leads:
        inversion.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=260)
    steps = parser.parse_args().steps
    launch(
        stage,
        TrainingPlan(name="inversion", steps=steps, batch=6, learning_rate=0.02, seed=7, weight_decay=0.0, ema=0.9),
    )


if __name__ == "__main__":
    main()
