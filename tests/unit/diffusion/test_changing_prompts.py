"""Prompts that change from step to step, and prompts composed by AND: alone, beside strangers, and by hand."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fanlight.contract.prompt import FORGIVING
from services.diffusion.engine.batching import batch_key
from services.diffusion.engine.conditioning import ConditioningCache, encode_pair
from services.diffusion.engine.memory import vram_estimate_bytes
from services.diffusion.engine.row import latent_shape
from services.diffusion.engine.unet_step import Evaluation, _by_row
from services.diffusion.schedulers import make_scheduler
from tests.fakes.diffusers_reference import Reference

LATENTS_LIMIT = 1e-4


@pytest.fixture(scope="module")
def reference(models) -> Reference:
    return Reference(models)


@pytest.fixture(scope="module")
def checkpoint(manager, catalog):
    return manager.checkpoint(catalog.default())


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def with_turns(reference: Reference, generation, texts: list[str]) -> torch.Tensor:
    """Latents (1, C, h, w) of diffusers' pipeline, whose embeds are exchanged behind each step. `texts`: by step."""
    pipeline = reference.pipeline(generation)
    both = {
        text: torch.cat(pipeline.encode_prompt(text, "cpu", 1, True, generation.negative_prompt)[::-1])
        for text in texts
    }

    def exchange(_, step: int, timestep: int, tensors: dict) -> dict:
        return {"prompt_embeds": both[texts[min(step + 1, len(texts) - 1)]]}

    arguments = {"callback_on_step_end": exchange, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    return reference.latents(replace(generation, prompt=texts[0]), **arguments)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a [cat:dog:2]", ["a cat"] * 2 + ["a dog"] * 3),
        ("a [cat:dog:0.6]", ["a cat"] * 3 + ["a dog"] * 2),
        ("a [cat|dog]", ["a cat", "a dog", "a cat", "a dog", "a cat"]),
        ("a [cat::4]b", ["a catb"] * 4 + ["a b"]),
        ("a [cat:[dog|owl]:2]", ["a cat"] * 2 + ["a dog", "a owl", "a dog"]),
        ("a [cat:dog:9]", ["a cat"] * 5),
        ("a [cat:dog:0]", ["a dog"] * 5),
    ],
)
def test_a_changing_prompt_equals_the_pipeline_with_exchanged_embeds(
    prompt, texts, scheduler, reference, asked, generated
):
    generation = asked(prompt=prompt, scheduler=scheduler, steps=5)
    [row] = generated(generation)
    assert difference(row.latents, with_turns(reference, generation, texts)) <= LATENTS_LIMIT


def test_both_evaluations_of_a_second_order_step_have_its_text(reference, asked, generated):
    generation = asked(prompt="a [cat:dog:2]", scheduler="heun", steps=4)
    [row] = generated(generation)
    texts = ["a cat"] * 4 + ["a dog"] * 3
    assert difference(row.latents, with_turns(reference, generation, texts)) <= LATENTS_LIMIT


def test_a_negative_prompt_changes_too(asked, generated):
    one, other, changing = generated(
        asked(negative_prompt="cat", steps=2),
        asked(negative_prompt="dog", steps=2),
        asked(negative_prompt="[cat:dog:1]", steps=2),
    )
    assert difference(one.latents, changing.latents) > LATENTS_LIMIT
    assert difference(other.latents, changing.latents) > LATENTS_LIMIT


def composed(generation, checkpoint, weights: dict[str, float]) -> torch.Tensor:
    """By A1111's formula, written out: uncond + scale x sum of weight x (cond - uncond). Latents (1, C, h, w)."""
    pairs = {text: encode_pair(checkpoint, text, generation.negative_prompt) for text in weights}
    shape = latent_shape(generation, checkpoint)
    scheduler = make_scheduler(
        generation.scheduler,
        checkpoint.scheduler_config,
        noise_schedule="",
        steps=generation.steps,
        seed=generation.seed,
        shape=shape,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(generation.seed)) * scheduler.init_noise_sigma

    def predicted(timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        scaled = scheduler.scale_model_input(latents, timestep)
        return checkpoint.unet(scaled, timestep.float().reshape(1), encoder_hidden_states=embeds, return_dict=False)[0]

    for timestep in scheduler.timesteps:
        low = predicted(timestep, next(iter(pairs.values()))[1].embeds)
        steps = [weight * (predicted(timestep, pairs[text][0].embeds) - low) for text, weight in weights.items()]
        latents = scheduler.step(low + generation.guidance_scale * sum(steps), timestep, latents).prev_sample
    return latents


@torch.inference_mode()
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_prompts_are_composed_by_a1111s_formula(scheduler, checkpoint, asked, generated):
    generation = asked(prompt="a cat AND a dog :0.5 AND an owl:-0.25", scheduler=scheduler, steps=3)
    [row] = generated(generation)
    weights = {"a cat": 1.0, " a dog": 0.5, " an owl": -0.25}
    assert difference(row.latents, composed(generation, checkpoint, weights)) <= LATENTS_LIMIT


def test_one_prompt_in_two_halves_is_the_prompt(asked, generated):
    whole, halves = generated(asked(prompt="a cat"), asked(prompt="a cat:0.5 AND a cat:0.5"))
    assert difference(whole.latents, halves.latents) <= LATENTS_LIMIT


def test_without_guidance_prompts_are_composed_around_the_first(asked, generated):
    first, both, second = generated(
        *(asked(prompt=text, guidance_scale=1.0, steps=1) for text in ("a cat", "a cat AND a dog", "a dog"))
    )
    assert difference(both.latents, second.latents) <= LATENTS_LIMIT
    assert difference(first.latents, second.latents) > LATENTS_LIMIT


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_strangers_share_a_batch_with_what_changes_and_is_composed(guidance_scale, asked, control, generated):
    """With ControlNets that condition only some of them, and prompts of other lengths."""
    common = {"guidance_scale": guidance_scale, "controls": (control("canny", end=0.5),)}
    strangers = [
        asked(prompt="a cat", seed=1, **common),
        asked(prompt="a [cat|dog] AND an [owl::2]:0.5", seed=2, steps=4, **common),
        asked(prompt="[a cat:" + "a dog, " * 30 + ":1]", seed=3, scheduler="euler", **common),
        asked(prompt="a AND b AND c AND (d", seed=4, prompt_syntax=FORGIVING, guess_mode=True, **common),
    ]
    assert len({batch_key(each, number=0) for each in strangers}) == 1
    together = generated(*strangers, joins=(0, 1, 0, 2))
    for generation, row in zip(strangers, together, strict=True):
        [alone] = generated(generation)
        assert difference(row.latents, alone.latents) <= LATENTS_LIMIT


def test_a_composed_prompt_counts_by_its_predictions(asked):
    plain, three = asked(prompt="a cat"), asked(prompt="a AND b AND c")
    assert (plain.predictions, plain.rows) == (2, 1)
    assert (three.predictions, three.rows) == (4, 2)
    unguided = asked(prompt="a AND b AND c", guidance_scale=1.0)
    assert (unguided.predictions, unguided.rows) == (3, 3)
    large = {"width_px": 512, "height_px": 512}
    sizes = [vram_estimate_bytes(replace(each, **large), 4) for each in (plain, three)]
    assert math.isclose(sizes[1], 2 * sizes[0]) or sizes[0] == sizes[1]


def test_what_changes_is_encoded_once_for_all_who_say_the_same(checkpoint, asked):
    prompts = ConditioningCache()
    first = prompts.get(asked(prompt="a [b|c]", seed=1), checkpoint)
    assert prompts.get(asked(prompt="a [b|c]", seed=2), checkpoint) is first
    assert prompts.get(asked(prompt="a [b|c]", emphasis="no_norm"), checkpoint) is not first
    [(schedule, _)] = first.prompts
    assert len({id(conditioning) for _, conditioning in schedule}) == 2
    assert prompts.get(asked(prompt="a b", steps=5), checkpoint) is prompts.get(
        asked(prompt="a b", steps=6), checkpoint
    )


def test_guidance_in_float16_is_the_same_beside_composed_prompts():
    """Rounded once, whoever shares the batch."""
    rows = [SimpleNamespace(generation=SimpleNamespace(guidance_scale=7.5))] * 2
    low, other, high, second, third = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    kept = SimpleNamespace(column=lambda _, values, like: torch.tensor(values, dtype=like.dtype).reshape(-1, 1, 1, 1))

    def guided(*of_the_other):
        unconditional = [Evaluation(number, None, None) for number in (0, 1)]
        places = [*unconditional, Evaluation(0, None, 1.0), *(Evaluation(1, None, 0.5) for _ in of_the_other)]
        return _by_row(rows, SimpleNamespace(places=places, batch=kept), torch.stack([low, other, high, *of_the_other]))

    alone, beside = guided(second), guided(second, third)
    assert torch.equal(alone[0], beside[0])
    expected = other.float() + 7.5 * 0.5 * (second.float() - other.float() + third.float() - other.float())
    assert beside[1].dtype == torch.float16
    assert torch.allclose(beside[1][0].float(), expected, rtol=1e-3, atol=1e-3)
