"""Run every stage in order, each in a process of its own, as `make` would: only what is missing or out of date.

A stage is out of date when a stage that it builds on has a newer result; its checkpoint is then set aside, because
going on from it would mix two models. An interrupted stage goes on from its checkpoint.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.parallel import OUT

CHECKPOINTS = OUT / "checkpoints"
WORDS = Path(__file__).parent / "vocabulary.toml"
Changed = Callable[[Path], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStage:
    """A stage's module, the last file that it writes, the stages that it builds on, and other files that it reads."""

    module: str
    result: Path
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINTS / f"{self.module}.pt"


STAGES = (
    TrainingStage(module="emoji", result=OUT.parent / "data" / "sprites.npz"),
    TrainingStage(module="vae", result=OUT / "vae" / "diffusion_pytorch_model.safetensors", needs=("emoji",)),
    TrainingStage(module="tokenizer", result=OUT / "tokenizer" / "tokenizer_config.json", reads=(WORDS,)),
    TrainingStage(module="latents", result=OUT / "latents_1.pt", needs=("emoji", "vae"), reads=(WORDS,)),
    TrainingStage(module="unet", result=OUT / "model" / "model_index.json", needs=("latents", "tokenizer")),
    TrainingStage(
        module="controlnet",
        result=OUT / "controlnet-canny" / "diffusion_pytorch_model.safetensors",
        needs=("unet",),
    ),
    TrainingStage(module="lora", result=OUT / "lora-cyanotype" / "kohya.safetensors", needs=("unet",)),
    TrainingStage(module="inversion", result=OUT / "embeddings" / "mint.a1111.safetensors", needs=("unet",)),
    TrainingStage(module="vivid_vae", result=OUT / "vae-vivid" / "diffusion_pytorch_model.safetensors", needs=("vae",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStep:
    """What is to be done about a stage. `is_due` without `resumes` starts it from nothing."""

    stage: TrainingStage
    is_due: bool
    resumes: bool = False
    why: str = ""


def plan(stages: Sequence[TrainingStage], changed_s: Changed) -> list[StageStep]:
    """One step for each stage, in order; `changed_s` says when a file was last written, None where it is not there."""
    steps: dict[str, StageStep] = {}
    for stage in stages:
        inputs = [steps[need] for need in stage.needs]
        steps[stage.module] = _step(stage, inputs, changed_s)
    return list(steps.values())


def _step(stage: TrainingStage, inputs: Sequence[StageStep], changed_s: Changed) -> StageStep:
    due = [step.stage.module for step in inputs if step.is_due]
    read = [*(step.stage.result for step in inputs), *stage.reads]
    newest_s = max((changed_s(path) or 0.0 for path in read), default=0.0)
    result_s, checkpoint_s = changed_s(stage.result), changed_s(stage.checkpoint)
    if due:
        return StageStep(stage=stage, is_due=True, why=f"{due[0]} is to run")
    if result_s is None:
        resumes = checkpoint_s is not None and checkpoint_s >= newest_s
        return StageStep(stage=stage, is_due=True, resumes=resumes, why="no result yet")
    if result_s < newest_s:
        return StageStep(stage=stage, is_due=True, why="what it builds on is newer")
    return StageStep(stage=stage, is_due=False)


def changed_s(path: Path) -> float | None:
    """When a file was last written."""
    return path.stat().st_mtime if path.exists() else None


def run(module: str, *options: str) -> None:
    """Run one stage's command."""
    print(f"== {module}", flush=True)
    subprocess.run([sys.executable, "-m", f"training.{module}", *options], check=True)


def carry_out(step: StageStep) -> None:
    """Run a stage, from its checkpoint only where that still fits."""
    if not step.resumes and step.stage.checkpoint.exists():
        os.replace(step.stage.checkpoint, step.stage.checkpoint.with_suffix(".old"))
    run(step.stage.module)


def step_line(step: StageStep) -> str:
    """One line about a step."""
    if not step.is_due:
        return f"{step.stage.module:<12} done"
    return f"{step.stage.module:<12} {'goes on' if step.resumes else 'runs'}: {step.why}"


def main() -> None:
    """Train what is missing or out of date, then export, evaluate, and bring the model card up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="only say what would run, and why")
    is_list = parser.parse_args().list
    for step in plan(STAGES, changed_s):
        print(step_line(step), flush=True)
        if step.is_due and not is_list:
            carry_out(step)
    if not is_list:
        run("export")
        run("export_single")
        run("evaluate", "all")
        run("sheets")
        run("figures")


if __name__ == "__main__":
    main()
