"""The diffusers pipelines, which Fanlight's pictures must equal."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from services.diffusion.generation import Generation

SCHEDULERS = {
    "ddim": lambda config: DDIMScheduler.from_config(config),
    "euler": lambda config: EulerDiscreteScheduler.from_config(config),
    "euler_a": lambda config: EulerAncestralDiscreteScheduler.from_config(config),
    "dpmpp_2m": lambda config: DPMSolverMultistepScheduler.from_config(config),
    "dpmpp_2m_karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
}


@dataclass(frozen=True)
class Reference:
    """The pipelines over one folder of models."""

    folder: Path

    def latents(self, generation: Generation) -> torch.Tensor:
        return torch.as_tensor(self._run(generation, "latent"))

    def pixels(self, generation: Generation) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        return np.asarray(self._run(generation, "np"))[0]

    def _run(self, generation: Generation, output_type: str) -> object:
        pipeline, arguments = self._pipeline(generation)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = SCHEDULERS[generation.scheduler](pipeline.scheduler.config)
        return pipeline(
            prompt=generation.prompt,
            negative_prompt=generation.negative_prompt,
            width=generation.width_px,
            height=generation.height_px,
            num_inference_steps=generation.steps,
            guidance_scale=generation.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(generation.seed),
            output_type=output_type,
            **arguments,
        ).images

    def _pipeline(self, generation: Generation) -> tuple[StableDiffusionPipeline, dict[str, object]]:
        plain = StableDiffusionPipeline.from_pretrained(self.folder / "model", local_files_only=True)
        if not generation.controls:
            return plain, {}
        nets = [ControlNetModel.from_pretrained(control.controlnet.folder) for control in generation.controls]
        controlled = StableDiffusionControlNetPipeline(
            **plain.components, controlnet=nets if len(nets) > 1 else nets[0], requires_safety_checker=False
        )
        return controlled, _control_arguments(generation)


def _control_arguments(generation: Generation) -> dict[str, object]:
    """Lists for several nets, plain values for one."""
    controls = generation.controls
    columns: dict[str, list[object]] = {
        "image": [control.image for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }
    return {name: values if len(controls) > 1 else values[0] for name, values in columns.items()}
