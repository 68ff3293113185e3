"""A process that paints loads nothing that painting does not need, and spoils nothing for who wants the rest later."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
UNWANTED = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "peft",
    "requests",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers",
)

PAINTED = """
import sys
from services.diffusion import provenance
from services.diffusion.abilities import Abilities
from services.diffusion.engine.studio import TorchStudio
from services.diffusion.generation import Generation
from services.diffusion.models.library import Library
from services.diffusion.models.scan import scan, starter_folder
from services.diffusion.parse.parser import Parser
from services.kernel.pictures import PictureLimits
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest

catalogue = scan([starter_folder()])
abilities = Abilities(pixels_limit=2**20, has_safety_checker=False)
parser = Parser(catalogue=catalogue, abilities=abilities, picture_limits=PictureLimits(), random_seed=lambda: 1)
studio = TorchStudio(Library(device="cpu"), threads=1)

def paint(scheduler):
    request = GenerateRequest(prompt="a (red:1.2) apple", steps=2, seed=1, scheduler=scheduler)
    row = studio.begin(parser.parse(request))
    while not row.is_finished:
        studio.advance([row])
    return studio.finish(row).pixels

for scheduler in ("ddim", "DPM++ 2M Karras", "lms", "dpmpp_sde", "unipc", "euler_a"):
    assert paint(scheduler).std() > 0
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_painting_with_the_starter_model_loads_nothing_that_it_does_not_need():
    loaded = set(run(PAINTED + "print(*sys.modules)").split())

    assert "diffusers_lean.models.unets.unet_2d_condition" in loaded
    assert loaded & set(UNWANTED) == set()


def test_conversions_of_single_files_need_no_more_and_what_is_left_out_says_so():
    code = """
import sys
from services.diffusion.lean import lean_module
assert callable(lean_module("loaders.single_file_utils").convert_ldm_unet_checkpoint)
print(*sys.modules)
try:
    lean_module("models.unets.unet_2d_condition").UNet2DConditionModel.from_pretrained("somebody/something")
except RuntimeError as error:
    assert "services.diffusion.models" in str(error)
else:
    raise AssertionError("what is left out says where it is done")
"""
    assert set(run(code).split()) & set(UNWANTED) == set()


def test_diffusers_and_torchs_compiler_are_as_ever_afterwards():
    code = """
import torch
from services.diffusion.models.classes import UNet2DConditionModel
from diffusers import StableDiffusionControlNetPipeline, UNet2DConditionModel as Theirs
from diffusers.utils.torch_utils import maybe_allow_in_graph

assert Theirs is not UNet2DConditionModel
assert hasattr(Theirs, "load_lora_adapter") and not hasattr(UNet2DConditionModel, "load_lora_adapter")
assert maybe_allow_in_graph is torch._dynamo.allow_in_graph
doubled = torch.compile(lambda x: x * 2 + 1, backend="eager")
assert doubled(torch.ones(2)).tolist() == [3, 3]
print("fine")
"""
    assert run(code).strip() == "fine"
