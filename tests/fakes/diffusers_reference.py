"""The diffusers pipelines, which Fanlight's images must equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline

from services.diffusion.engine.generation import Generation, Pipeline

_SDE = {"algorithm_type": "sde-dpmsolver++"}
# By our names: the class, and the options that diffusers' table gives for A1111's name.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpmpp_2m_sde_heun": ("DPMSolverMultistepScheduler", {**_SDE, "solver_type": "heun"}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
}
NOISE_SCHEDULES: Mapping[str, Mapping[str, object]] = {
    "": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}

_PIPELINES = {
    Pipeline.TEXT2IMG: "",
    Pipeline.IMG2IMG: "Img2Img",
    Pipeline.INPAINT: "Inpaint",
    Pipeline.CONTROLNET: "ControlNet",
    Pipeline.CONTROLNET_IMG2IMG: "ControlNetImg2Img",
    Pipeline.CONTROLNET_INPAINT: "ControlNetInpaint",
}


@dataclass(frozen=True)
class Reference:
    """The pipelines over one folder of models."""

    folder: Path

    def latents(self, generation: Generation, **arguments: object) -> torch.Tensor:
        """`arguments`: over what the generation says, such as `prompt_embeds`."""
        return torch.as_tensor(self._run(generation, "latent", arguments))

    def pixels(self, generation: Generation, **arguments: object) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        return np.asarray(self._run(generation, "np", arguments))[0]

    def _run(self, generation: Generation, output_type: str, more: Mapping[str, object]) -> object:
        pipeline = self.pipeline(generation)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(generation, pipeline.scheduler.config)
        arguments = {
            "prompt": generation.prompt,
            "negative_prompt": generation.negative_prompt,
            "num_inference_steps": generation.steps,
            "guidance_scale": generation.guidance_scale,
            "eta": generation.eta,
            # Ours changes nothing for SDXL.
            "clip_skip": None if generation.is_sdxl else generation.clip_skip - 1 or None,
            "generator": torch.Generator("cpu").manual_seed(generation.seed),
            "output_type": output_type,
            **_size(generation),
            **_start(generation),
            **(_controls(generation) if generation.controls else {}),
            **more,
        }
        return pipeline(**arguments).images

    def pipeline(self, generation: Generation) -> Any:
        plain = _plain(self.folder)
        nets = [_net(control.controlnet.path) for control in generation.controls]
        named = {"controlnet": nets if len(nets) > 1 else nets[0]} if nets else {}
        family = type(plain).__name__.removesuffix("Pipeline")
        cls = getattr(import_module("diffusers"), f"{family}{_PIPELINES[generation.pipeline]}Pipeline")
        checker = {} if "XL" in family else {"requires_safety_checker": False}
        return cls(**plain.components, **named, **checker)


@cache
def _plain(folder: Path) -> DiffusionPipeline:
    plain = DiffusionPipeline.from_pretrained(folder / "model", local_files_only=True, dtype=torch.float32)
    # Where the pipelines look for the last layer's norm; transformers 5 has moved it up.
    plain.text_encoder.__dict__["text_model"] = plain.text_encoder
    return plain


@cache
def _net(folder: Path) -> ControlNetModel:
    return ControlNetModel.from_pretrained(folder)


def make_scheduler(generation: Generation, config: Any) -> Any:
    cls, options = SCHEDULERS[generation.scheduler]
    made = {**options, **NOISE_SCHEDULES[generation.noise_schedule]}
    if cls == "LMSDiscreteScheduler":
        _give_lms_an_integral()
        return import_module("diffusers.schedulers.scheduling_lms_discrete").LMSDiscreteScheduler.from_config(
            config, **made
        )
    return getattr(import_module("diffusers.schedulers"), cls).from_config(config, **made)


def _give_lms_an_integral() -> None:
    """Its own comes from scipy, which is not there."""

    class Integrate:
        @staticmethod
        def quad(function: Any, low: Any, high: Any, epsrel: float) -> tuple[float]:
            at = np.linspace(float(low), float(high), 401)
            values = np.array([float(function(each)) for each in at])
            return (float(((values[1:] + values[:-1]) / 2 * np.diff(at)).sum()),)

    import_module("diffusers.schedulers.scheduling_lms_discrete").integrate = Integrate  # type: ignore[attr-defined]


def _size(generation: Generation) -> dict[str, object]:
    """img2img pipelines take the image's."""
    if generation.pipeline is Pipeline.IMG2IMG:
        return {}
    return {"width": generation.width_px, "height": generation.height_px}


def _start(generation: Generation) -> dict[str, object]:
    start = generation.start
    if start is None:
        return {}
    mask = {} if start.mask is None else {"mask_image": start.mask}
    return {"image": start.image, "strength": start.strength, **mask}


def _controls(generation: Generation) -> dict[str, object]:
    """Lists for several nets, plain values for one."""
    controls = generation.controls
    columns: dict[str, list[object]] = {
        "image" if generation.start is None else "control_image": [control.image for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
    }
    plain = {name: values if len(controls) > 1 else values[0] for name, values in columns.items()}
    return {**plain, "guess_mode": generation.guess_mode}
