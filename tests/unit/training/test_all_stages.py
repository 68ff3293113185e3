"""What `python -m training.all` would run, from what lies there and how old it is."""

from pathlib import Path

import pytest

from training.all import STAGES, WORDS, TrainingStage, plan, step_line


@pytest.fixture
def finished() -> dict[Path, float]:
    """Every result, each a second newer than the one before; the words are the oldest."""
    return {WORDS: 0.5, **{stage.result: float(number) for number, stage in enumerate(STAGES, start=1)}}


def due(files: dict[Path, float]) -> dict[str, bool]:
    """The modules that are to run, and whether each goes on from its checkpoint."""
    return {step.stage.module: step.resumes for step in plan(STAGES, files.get) if step.is_due}


def stage(module: str) -> TrainingStage:
    return next(stage for stage in STAGES if stage.module == module)


def test_a_fresh_checkout_runs_everything_in_order(finished):
    assert list(due({WORDS: 1.0})) == [stage.module for stage in STAGES]


def test_nothing_runs_twice(finished):
    assert due(finished) == {}


def test_an_interrupted_stage_goes_on_and_takes_along_what_builds_on_it(finished):
    for module in ("unet", "controlnet", "lora", "inversion"):
        del finished[stage(module).result]
    finished[stage("unet").checkpoint] = 50.0
    assert due(finished) == {"unet": True, "controlnet": False, "lora": False, "inversion": False}


def test_a_checkpoint_older_than_what_it_was_trained_on_is_not_gone_on_from(finished):
    del finished[stage("unet").result]
    finished[stage("unet").checkpoint] = finished[stage("latents").result] - 0.5
    assert due(finished)["unet"] is False


def test_a_newer_vae_makes_all_but_the_images_and_the_words_anew(finished):
    finished[stage("vae").result] = 99.0
    assert list(due(finished)) == ["latents", "unet", "controlnet", "lora", "inversion", "vivid_vae"]


def test_another_vocabulary_reaches_the_tokenizer_and_the_latents(finished):
    finished[WORDS] = 99.0
    assert list(due(finished)) == ["tokenizer", "latents", "unet", "controlnet", "lora", "inversion"]


def test_each_line_says_what_happens_and_why(finished):
    finished.pop(stage("lora").result)
    lines = [step_line(step) for step in plan(STAGES, finished.get)]
    assert lines[5:7] == ["controlnet   done", "lora         runs: no result yet"]


def test_stages_build_only_on_stages_before_them():
    for number, each in enumerate(STAGES):
        assert set(each.needs) <= {before.module for before in STAGES[:number]}
