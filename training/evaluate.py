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
from training.inversion import COLOUR, TOKEN
from training.latents import COLOUR_NAMES, FRAMING, subject_rows
from training.parallel import OUT
from training.pictures import compose, random_scene, to_pixels
from training.prompts import SHORT_PROMPTS, Prompt, every_other_subject, held_in_prompts
from training.sheets import write_sheet
from training.vocabulary import STYLES, load_subjects

FOLDER = OUT / "evaluation"
STEPS, GUIDANCE, BATCH = 20, 3.0, 8
SUBJECTS = load_subjects()


class Studio:
    """A pipeline and how to ask it for many pictures."""

    def __init__(self, model: Path, controlnet: Path | None = None) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
        if controlnet:
            parts = dict(self.pipe.components, controlnet=ControlNetModel.from_pretrained(controlnet))
            self.pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    def paint(self, prompts: list[str], seed: int = 0, edges: list[np.ndarray] | None = None) -> np.ndarray:
        """Pictures (N, 64, 64, 3) in [0, 1]; the seeds of the prompts are seed, seed + 1, ..."""
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


def judge(prompts: list[Prompt], pictures: np.ndarray) -> dict[str, float]:
    """Shares of prompts whose nearest emoji, background colour and style are right."""
    pairs = list(zip(prompts, pictures, strict=True))
    nearest = [measures.nearest_subjects(picture) for picture in pictures]
    styles = [measures.nearest_style(picture, p.subject) for p, picture in pairs]
    colours = [measures.nearest_colour(measures.background(picture)) for picture in pictures]
    return {
        "top1": share([found[:1] == [p.subject] for p, found in zip(prompts, nearest, strict=True)]),
        "top5": share([p.subject in found for p, found in zip(prompts, nearest, strict=True)]),
        "background": share([p.colour == colour for p, colour in zip(prompts, colours, strict=True)]),
        "style": share([p.style == style for p, style in zip(prompts, styles, strict=True)]),
    }


def check_prompts(model: Path) -> dict:
    """64 held-in prompts, the other subjects, and what the measure says of true pictures and of the VAE."""
    studio, rng = Studio(model), Random(11)
    prompts, others = held_in_prompts(), every_other_subject()
    pictures = studio.paint([p.text for p in prompts])
    write_sheet(FOLDER / "prompts.png", list(pictures), [p.label for p in prompts])
    rest = studio.paint([p.text for p in others], seed=500)
    write_sheet(FOLDER / "other_subjects.png", list(rest), [p.label for p in others])
    true = np.stack([compose(p.scene(rng, FRAMING)) / 255 for p in prompts])
    shuffled = rng.sample(prompts, len(prompts))
    return {
        "held_in_64": judge(prompts, pictures),
        "other_subjects": judge(others, rest),
        "true_pictures": judge(prompts, true),
        "vae_of_true_pictures": judge(prompts, through_vae(studio.pipe.vae, true)),
        "labels_shuffled": judge(shuffled, pictures),
    }


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Encode and decode pictures in [0, 1]."""
    latents = vae.encode(to_pixels([picture * 255 for picture in pictures])).latent_dist.mode()
    return vae.decode(latents).sample.clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).numpy()


def check_short(model: Path) -> dict:
    """24 prompts as a newcomer types them, with three seeds each."""
    studio = Studio(model)
    names = {subject.name: index for index, subject in enumerate(SUBJECTS)}
    found, sheet = {}, []
    for seed in (0, 100, 200):
        pictures = studio.paint([text for text, _ in SHORT_PROMPTS], seed=seed)
        nearest = [measures.nearest_subjects(picture, 1) for picture in pictures]
        wanted = [{names[name] for name in accepted} for _, accepted in SHORT_PROMPTS]
        found[f"seed_{seed}"] = share([bool(set(n) & w) for n, w in zip(nearest, wanted, strict=True)])
        sheet += list(pictures)
    write_sheet(FOLDER / "short_prompts.png", sheet, [text for text, _ in SHORT_PROMPTS] * 3)
    return found


def check_seeds(model: Path) -> dict:
    """Eight seeds of each of eight prompts: how much the pictures differ, and how many are still right."""
    prompts = held_in_prompts()[:8]
    names = [plain_prompt(SUBJECTS[prompt.subject].name) for prompt in prompts]
    studio = Studio(model)
    return {
        "full_prompts": eight_seeds(studio, prompts, [prompt.text for prompt in prompts], "seeds.png"),
        "names_alone": eight_seeds(studio, prompts, names, "seeds_of_names.png"),
    }


def eight_seeds(studio: Studio, prompts: list[Prompt], texts: list[str], sheet_name: str) -> dict[str, float]:
    """Deviation over eight seeds of each text, and the share of pictures that show the prompt's subject."""
    deviations, hits, sheet = [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        pictures = studio.paint([text] * 8, seed=1000)
        deviations.append(measures.seed_deviation(pictures))
        hits += [measures.nearest_subjects(picture, 1) == [prompt.subject] for picture in pictures]
        sheet += list(pictures)
    write_sheet(FOLDER / sheet_name, sheet, [text for text in texts for _ in range(8)])
    mean = statistics.mean(deviations)
    return {"mean_deviation": round(mean, 4), "smallest": round(min(deviations), 4), "top1": share(hits)}


def check_control(model: Path) -> dict:
    """Edge F1 without and with control, for prompts that name the object and that name another."""
    rng, rows = Random(77), subject_rows()
    scenes = [random_scene(rng, rows, STYLES, CONTROL_FRAMING) for _ in range(32)]
    pictures = [compose(scene) for scene in scenes]
    edges = [canny(picture) for picture in pictures]
    named = [Prompt(rows.index(s.row), s.style, s.colour).text for s in scenes]
    other = [Prompt(rng.randrange(len(rows)), s.style, rng.choice(COLOUR_NAMES)) for s in scenes]
    base, controlled = Studio(model), Studio(model, STARTER / "controlnet-canny")
    made = {
        "without": base.paint(named),
        "with": controlled.paint(named, edges=edges),
        "with_another_object_named": controlled.paint([p.text for p in other], edges=edges),
        "ceiling_vae": through_vae(base.pipe.vae, np.stack(pictures) / 255),
    }
    edge_pictures = np.repeat(np.stack(edges)[..., None] / 255, 3, axis=-1)
    columns = [edge_pictures, made["without"], made["with"], made["with_another_object_named"]]
    lines = [("edges", "without", n[2:], p.text[2:]) for n, p in zip(named, other, strict=True)]
    sheet = [column[index] for index in range(24) for column in columns]
    write_sheet(FOLDER / "control.png", sheet, [line for row in lines[:24] for line in row])
    return {
        name: round(statistics.mean(measures.edge_f1(e, p) for e, p in zip(edges, column, strict=True)), 3)
        for name, column in made.items()
    }


def check_lora(model: Path) -> dict:
    """Distance to the cyanotype line at scale 0, 0.5 and 1; the kohya file; what removal leaves."""
    studio, prompts = Studio(model), [p.text for p in held_in_prompts()[:8]]
    folder, name = STARTER / "lora-cyanotype", "pytorch_lora_weights.safetensors"
    made = {"base": studio.paint(prompts)}
    studio.pipe.load_lora_weights(folder, weight_name=name, adapter_name="style")
    made["one"] = studio.paint(prompts)
    studio.pipe.set_adapters(["style"], [0.5])
    made["half"] = studio.paint(prompts)
    studio.pipe.unload_lora_weights()
    restored = studio.paint(prompts)
    studio.pipe.load_lora_weights(folder, weight_name="kohya.safetensors", adapter_name="kohya")
    kohya = studio.paint(prompts)
    sheet = [*made["base"], *made["half"], *made["one"]]
    write_sheet(FOLDER / "lora.png", sheet, [text[2:] for text in prompts] * 3)
    result = {n: round(statistics.mean(map(measures.cyanotype_distance, p)), 4) for n, p in made.items()}
    result["removal_differs_by"] = float(np.abs(restored - made["base"]).max())
    result["kohya_differs_by"] = float(np.abs(kohya - made["one"]).max())
    return result


def check_inversion(model: Path) -> dict:
    """Background's distance to the taught colour, for the new word and for the nearest old ones."""
    studio = Studio(model)
    studio.pipe.load_textual_inversion(STARTER / "embeddings" / "mint.safetensors", token=TOKEN)
    result, sheet, lines = {}, [], []
    for word in (TOKEN, "green", "teal", "mint"):
        prompts = [plain_prompt(SUBJECTS[p.subject].name, p.style, word) for p in held_in_prompts()[:8]]
        pictures = studio.paint(prompts)
        offs = [np.abs(measures.background(picture) - np.array(COLOUR) / 255).mean() for picture in pictures]
        result[word] = round(float(np.mean(offs)), 4)
        sheet, lines = sheet + list(pictures), lines + [word] * 8
    write_sheet(FOLDER / "inversion.png", sheet, lines)
    return result


def check_vae(model: Path) -> dict:
    """PSNR of the VAE, and the saturation that the second one adds to the same latents."""
    studio, prompts = Studio(model), [p.text for p in held_in_prompts()[:8]]
    rng = Random(11)
    true = np.stack([compose(p.scene(rng, FRAMING)) / 255 for p in held_in_prompts()])
    error = np.square(through_vae(studio.pipe.vae, true) - true).mean((1, 2, 3))
    plain = studio.paint(prompts)
    studio.pipe.vae = AutoencoderKL.from_pretrained(STARTER / "vae-vivid")
    rich = studio.paint(prompts)
    write_sheet(FOLDER / "vae.png", [*plain, *rich], ["plain"] * 8 + ["vivid"] * 8)
    means = [round(statistics.mean(map(measures.saturation, made)), 4) for made in (plain, rich)]
    psnr_db = round(float((-10 * np.log10(error)).mean()), 2)
    return {"psnr_db": psnr_db, "saturation": {"plain": means[0], "vivid": means[1]}}


def check_speed(model: Path) -> dict:
    """Seconds for one picture, 20 steps with guidance: median of five."""
    studio = Studio(model)
    seconds = []
    for seed in range(6):
        start = time.perf_counter()
        studio.paint(["a red apple on a blue background"], seed=seed)
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
