"""Measure the exported starter model: one JSON file and contact sheets in out/evaluation. Trains nothing.

python -m training.evaluate all, or the names of some checks.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from training import measures
from training.captions import plain_prompt
from training.controlnet import FRAMING as CONTROL_FRAMING
from training.controlnet import canny
from training.export import STARTER
from training.inversion import COLOR, TOKEN
from training.latents import COLOR_NAMES, FRAMING, subject_rows
from training.parallel import OUT
from training.prompts import SHORT_PROMPTS, EvaluationPrompt, every_other_subject, held_in_prompts
from training.scenes import compose, random_scene, to_pixels
from training.sheets import write_sheet
from training.vocabulary import STYLES, load_subjects

FOLDER = OUT / "evaluation"
STEPS, GUIDANCE, BATCH = 20, 3.0, 8
SUBJECTS = load_subjects()


class Sampler:
    """A pipeline and how to ask it for many images."""

    def __init__(self, model: Path, controlnet: Path | None = None) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
        if controlnet:
            parts = dict(self.pipe.components, controlnet=ControlNetModel.from_pretrained(controlnet))
            self.pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    def generate(self, prompts: list[str], seed: int = 0, edges: list[np.ndarray] | None = None) -> np.ndarray:
        """Images (N, 64, 64, 3) in [0, 1]; the seeds of the prompts are seed, seed + 1, ..."""
        made = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
            options = {"generator": noise, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
            if edges is not None:
                options["image"] = [Image.fromarray(e).convert("RGB") for e in edges[start : start + BATCH]]
            made.append(self.pipe(part, output_type="np", **options).images)
        return np.concatenate(made)


def share(hits: list[bool]) -> float:
    """The share of hits, to three digits."""
    return round(sum(hits) / len(hits), 3)


def judge(prompts: list[EvaluationPrompt], images: np.ndarray) -> dict[str, float]:
    """Shares of prompts whose nearest emoji, background color and style are right."""
    pairs = list(zip(prompts, images, strict=True))
    nearest = [measures.nearest_subjects(image) for image in images]
    styles = [measures.nearest_style(image, p.subject) for p, image in pairs]
    colors = [measures.nearest_color(measures.background(image)) for image in images]
    return {
        "top1": share([found[:1] == [p.subject] for p, found in zip(prompts, nearest, strict=True)]),
        "top5": share([p.subject in found for p, found in zip(prompts, nearest, strict=True)]),
        "background": share([p.color == color for p, color in zip(prompts, colors, strict=True)]),
        "style": share([p.style == style for p, style in zip(prompts, styles, strict=True)]),
    }


def check_prompts(model: Path) -> dict:
    """64 held-in prompts, the other subjects, and what the measure says of true images and of the VAE."""
    sampler, rng = Sampler(model), Random(11)
    prompts, others = held_in_prompts(), every_other_subject()
    images = sampler.generate([p.text for p in prompts])
    write_sheet(FOLDER / "prompts.png", list(images), [p.label for p in prompts])
    rest = sampler.generate([p.text for p in others], seed=500)
    write_sheet(FOLDER / "other_subjects.png", list(rest), [p.label for p in others])
    true = np.stack([compose(p.scene(rng, FRAMING)) / 255 for p in prompts])
    shuffled = rng.sample(prompts, len(prompts))
    return {
        "held_in_64": judge(prompts, images),
        "other_subjects": judge(others, rest),
        "true_images": judge(prompts, true),
        "vae_of_true_images": judge(prompts, through_vae(sampler.pipe.vae, true)),
        "labels_shuffled": judge(shuffled, images),
    }


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode images in [0, 1]."""
    latents = vae.encode(to_pixels([image * 255 for image in images])).latent_dist.mode()
    return vae.decode(latents).sample.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()


def check_short(model: Path) -> dict:
    """24 prompts as a newcomer types them, with three seeds each."""
    sampler = Sampler(model)
    names = {subject.name: index for index, subject in enumerate(SUBJECTS)}
    found, sheet = {}, []
    for seed in (0, 100, 200):
        images = sampler.generate([text for text, _ in SHORT_PROMPTS], seed=seed)
        nearest = [measures.nearest_subjects(image, 1) for image in images]
        wanted = [{names[name] for name in accepted} for _, accepted in SHORT_PROMPTS]
        found[f"seed_{seed}"] = share([bool(set(n) & w) for n, w in zip(nearest, wanted, strict=True)])
        sheet += list(images)
    write_sheet(FOLDER / "short_prompts.png", sheet, [text for text, _ in SHORT_PROMPTS] * 3)
    return found


def check_seeds(model: Path) -> dict:
    """Eight seeds of each of eight prompts: how much the images differ, and how many are still right."""
    prompts = held_in_prompts()[:8]
    names = [plain_prompt(SUBJECTS[prompt.subject].name) for prompt in prompts]
    sampler = Sampler(model)
    return {
        "full_prompts": eight_seeds(sampler, prompts, [prompt.text for prompt in prompts], "seeds.png"),
        "names_alone": eight_seeds(sampler, prompts, names, "seeds_of_names.png"),
    }


def eight_seeds(
    sampler: Sampler, prompts: list[EvaluationPrompt], texts: list[str], sheet_name: str
) -> dict[str, float]:
    """Deviation over eight seeds of each text, and the share of images that show the prompt's subject."""
    deviations, hits, sheet = [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        images = sampler.generate([text] * 8, seed=1000)
        deviations.append(measures.seed_deviation(images))
        hits += [measures.nearest_subjects(image, 1) == [prompt.subject] for image in images]
        sheet += list(images)
    write_sheet(FOLDER / sheet_name, sheet, [text for text in texts for _ in range(8)])
    mean = statistics.mean(deviations)
    return {"mean_deviation": round(mean, 4), "smallest": round(min(deviations), 4), "top1": share(hits)}


def check_control(model: Path) -> dict:
    """Edge F1 without and with control, for prompts that name the object and that name another."""
    rng, rows = Random(77), subject_rows()
    scenes = [random_scene(rng, rows, STYLES, CONTROL_FRAMING) for _ in range(32)]
    images = [compose(scene) for scene in scenes]
    edges = [canny(image) for image in images]
    named = [EvaluationPrompt(rows.index(s.row), s.style, s.color).text for s in scenes]
    other = [EvaluationPrompt(rng.randrange(len(rows)), s.style, rng.choice(COLOR_NAMES)) for s in scenes]
    base, controlled = Sampler(model), Sampler(model, STARTER / "controlnet-canny")
    made = {
        "without": base.generate(named),
        "with": controlled.generate(named, edges=edges),
        "with_another_object_named": controlled.generate([p.text for p in other], edges=edges),
        "ceiling_vae": through_vae(base.pipe.vae, np.stack(images) / 255),
    }
    edge_images = np.repeat(np.stack(edges)[..., None] / 255, 3, axis=-1)
    columns = [edge_images, made["without"], made["with"], made["with_another_object_named"]]
    lines = [("edges", "without", n[2:], p.text[2:]) for n, p in zip(named, other, strict=True)]
    sheet = [column[index] for index in range(24) for column in columns]
    write_sheet(FOLDER / "control.png", sheet, [line for row in lines[:24] for line in row])
    return {
        name: round(statistics.mean(measures.edge_f1(e, p) for e, p in zip(edges, column, strict=True)), 3)
        for name, column in made.items()
    }


def check_lora(model: Path) -> dict:
    """Distance to the cyanotype line at scale 0, 0.5 and 1; the kohya file; what removal leaves."""
    sampler, prompts = Sampler(model), [p.text for p in held_in_prompts()[:8]]
    folder, name = STARTER / "lora-cyanotype", "pytorch_lora_weights.safetensors"
    made = {"base": sampler.generate(prompts)}
    sampler.pipe.load_lora_weights(folder, weight_name=name, adapter_name="style")
    made["one"] = sampler.generate(prompts)
    sampler.pipe.set_adapters(["style"], [0.5])
    made["half"] = sampler.generate(prompts)
    sampler.pipe.unload_lora_weights()
    restored = sampler.generate(prompts)
    sampler.pipe.load_lora_weights(folder, weight_name="kohya.safetensors", adapter_name="kohya")
    kohya = sampler.generate(prompts)
    sheet = [*made["base"], *made["half"], *made["one"]]
    write_sheet(FOLDER / "lora.png", sheet, [text[2:] for text in prompts] * 3)
    result = {n: round(statistics.mean(map(measures.cyanotype_distance, p)), 4) for n, p in made.items()}
    result["removal_differs_by"] = float(np.abs(restored - made["base"]).max())
    result["kohya_differs_by"] = float(np.abs(kohya - made["one"]).max())
    return result


def check_inversion(model: Path) -> dict:
    """Background's distance to the taught color, for the new word and for the nearest old ones."""
    sampler = Sampler(model)
    sampler.pipe.load_textual_inversion(STARTER / "embeddings" / "mint.safetensors", token=TOKEN)
    result, sheet, lines = {}, [], []
    for word in (TOKEN, "green", "teal", "mint"):
        prompts = [plain_prompt(SUBJECTS[p.subject].name, p.style, word) for p in held_in_prompts()[:8]]
        images = sampler.generate(prompts)
        offs = [np.abs(measures.background(image) - np.array(COLOR) / 255).mean() for image in images]
        result[word] = round(float(np.mean(offs)), 4)
        sheet, lines = sheet + list(images), lines + [word] * 8
    write_sheet(FOLDER / "inversion.png", sheet, lines)
    return result


def check_vae(model: Path) -> dict:
    """PSNR of the VAE, and the saturation that the second one adds to the same latents."""
    sampler, prompts = Sampler(model), [p.text for p in held_in_prompts()[:8]]
    rng = Random(11)
    true = np.stack([compose(p.scene(rng, FRAMING)) / 255 for p in held_in_prompts()])
    error = np.square(through_vae(sampler.pipe.vae, true) - true).mean((1, 2, 3))
    plain = sampler.generate(prompts)
    sampler.pipe.vae = AutoencoderKL.from_pretrained(STARTER / "vae-vivid")
    rich = sampler.generate(prompts)
    write_sheet(FOLDER / "vae.png", [*plain, *rich], ["plain"] * 8 + ["vivid"] * 8)
    means = [round(statistics.mean(map(measures.saturation, made)), 4) for made in (plain, rich)]
    psnr_db = round(float((-10 * np.log10(error)).mean()), 2)
    return {"psnr_db": psnr_db, "saturation": {"plain": means[0], "vivid": means[1]}}


def check_speed(model: Path) -> dict:
    """Seconds for one image, 20 steps with guidance: median of five."""
    sampler = Sampler(model)
    seconds = []
    for seed in range(6):
        start = time.perf_counter()
        sampler.generate(["a red apple on a blue background"], seed=seed)
        seconds.append(time.perf_counter() - start)
    return {"seconds": round(statistics.median(seconds[1:]), 2), "threads": torch.get_num_threads()}


CHECKS = {
    "prompts": check_prompts,
    "short": check_short,
    "seeds": check_seeds,
    "control": check_control,
    "lora": check_lora,
    "inversion": check_inversion,
    "vae": check_vae,
    "speed": check_speed,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="+", choices=[*CHECKS, "all"])
    parser.add_argument("--model", type=Path, default=STARTER / "model")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in CHECKS if "all" in options.checks else options.checks:
        result = CHECKS[name](options.model)
        (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
