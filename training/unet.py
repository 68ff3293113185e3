"""Stage 4: text encoder and UNet, trained together from scratch on the pool of latents. Knows no pixels.

Not compiled: with torch 2.13 on a CPU the compiled backward pass gives no gradient below the upsamplers.
"""

import argparse
from random import Random

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import tokenizer as tokenizer_stage
from training import vae as vae_stage
from training.captions import caption
from training.diffusion import FULL_CAPTION_TOKENS, SHORT_CAPTION_TOKENS, scheduler, velocity_loss
from training.latents import COLOR_NAMES, load_pool
from training.parallel import OUT, TrainedWeights, TrainingPlan, TrainingProcess, launch, train
from training.vocabulary import STYLES, load_subjects

DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 96, 96, 96),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
    "down_block_types": DOWN,
    "up_block_types": UP,
}
TEXT_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": FULL_CAPTION_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 128,
}
SUBJECTS = load_subjects()
CAPTION_DROPPED, FULL_EVERY = 0.1, 8
FOLDER = OUT / "model"


def load_tokenizer() -> CLIPTokenizer:
    """The tokenizer of stage 2."""
    return CLIPTokenizer.from_pretrained(tokenizer_stage.FOLDER)


def new_models(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Untrained text encoder and UNet; plain attention is faster than SDPA at this size."""
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **TEXT_CONFIG))
    text.set_attn_implementation("eager")
    unet = UNet2DConditionModel(**UNET_CONFIG)
    unet.set_attn_processor(AttnProcessor())
    return text, unet.to(memory_format=torch.channels_last)


def caption_tokens(step: int) -> int:
    """Mostly short captions, which are cheap; often enough all 77 tokens, or the padding stays untrained."""
    return FULL_CAPTION_TOKENS if step % FULL_EVERY == FULL_EVERY - 1 else SHORT_CAPTION_TOKENS


def token_ids(tokenizer: CLIPTokenizer, captions: list[str], step: int) -> Tensor:
    """Ids (B, L) of the length that this step uses in every process."""
    shape = {"padding": "max_length", "max_length": caption_tokens(step), "truncation": True}
    return tokenizer(captions, return_tensors="pt", **shape).input_ids


def caption_of(label: list[int], rng: Random, dropped: float = CAPTION_DROPPED) -> str:
    """A random caption for one label row, or the empty one that guidance needs."""
    subject, style, color = label
    if rng.random() < dropped:
        return ""
    return caption(SUBJECTS[subject], STYLES[style], COLOR_NAMES[color], rng)


class BaseTraining:
    """The two models, the pool, and their loss at one step."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.tokenizer = load_tokenizer()
        self.text, self.unet = new_models(self.tokenizer)
        self.batch = plan.batch
        self.pool, labels = load_pool()
        self.labels = labels.tolist()

    def loss(self, step: int, rng: Random) -> Tensor:
        """Velocity loss of one random batch."""
        chosen = [rng.randrange(len(self.pool)) for _ in range(self.batch)]
        ids = token_ids(self.tokenizer, [caption_of(self.labels[row], rng) for row in chosen], step)
        return velocity_loss(lambda noisy, steps: self._predict(noisy, steps, ids), self.pool[chosen].float())

    def _predict(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, steps, self.text(input_ids=ids).last_hidden_state).sample

    def pipeline(self) -> StableDiffusionPipeline:
        """Everything of stages 1 to 4 as a Stable Diffusion pipeline."""
        return StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(vae_stage.FOLDER),
            text_encoder=self.text.float().eval(),
            tokenizer=self.tokenizer,
            unet=self.unet.to(memory_format=torch.contiguous_format).eval(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def stage(worker: TrainingProcess, plan: TrainingPlan) -> None:
    """What each process runs."""
    base = BaseTraining(plan)
    train(worker, TrainedWeights([base.unet, base.text], plan), base.loss)
    if worker.leads:
        base.pipeline().save_pretrained(FOLDER)


def peek(plan: TrainingPlan) -> None:
    """Write the pipeline of the checkpoint as it stands, while training goes on."""
    base = BaseTraining(plan)
    weights = TrainedWeights([base.unet, base.text], plan)
    step = weights.resume()
    weights.swap()
    base.pipeline().save_pretrained(OUT / "peek")
    print(f"step {step} of {plan.steps}: {OUT / 'peek'}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9_500)
    parser.add_argument("--peek", action="store_true", help="only write the checkpoint's model to out/peek")
    options = parser.parse_args()
    plan = TrainingPlan(name="unet", steps=options.steps, batch=12, learning_rate=1e-3, seed=4)
    if options.peek:
        peek(plan)
    else:
        launch(stage, plan)


if __name__ == "__main__":
    main()
