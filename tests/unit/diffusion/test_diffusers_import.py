"""A process that generates loads nothing that it does not need, and does not change diffusers for later imports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
UNNEEDED = (
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

GENERATED = """
import sys
from services.diffusion import provenance
from services.diffusion.parse.abilities import Abilities
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Generation
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan, starter_folder
from services.diffusion.parse.parser import Parser
from services.kernel.images import ImageLimits
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest

catalog = scan([starter_folder()])
abilities = Abilities(pixels_limit=2**20, has_safety_checker=False)
parser = Parser(catalog=catalog, abilities=abilities, picture_limits=ImageLimits(), random_seed=lambda: 1)
backend = TorchBackend(ModelManager(device="cpu"), threads=1)

def generate(scheduler):
    request = GenerateRequest(prompt="a (red:1.2) apple", steps=2, seed=1, scheduler=scheduler)
    row = backend.begin(parser.parse(request))
    while not row.is_finished:
        backend.advance([row])
    return backend.finish(row).pixels

for scheduler in ("ddim", "DPM++ 2M Karras", "lms", "dpmpp_sde", "unipc", "euler_a"):
    assert generate(scheduler).std() > 0
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generating_with_the_starter_model_loads_nothing_that_it_does_not_need():
    loaded = set(run(GENERATED + "print(*sys.modules)").split())

    assert "diffusers_lean.models.unets.unet_2d_condition" in loaded
    assert loaded & set(UNNEEDED) == set()


def test_conversions_of_single_files_need_no_more_and_what_is_left_out_says_so():
    code = """
import sys
from services.diffusion.diffusers_import import import_diffusers_module
assert callable(import_diffusers_module("loaders.single_file_utils").convert_ldm_unet_checkpoint)
print(*sys.modules)
try:
    import_diffusers_module("models.unets.unet_2d_condition").UNet2DConditionModel.from_pretrained("owner/model")
except RuntimeError as error:
    assert "services.diffusion.models" in str(error)
else:
    raise AssertionError("what is left out says where it is done")
"""
    assert set(run(code).split()) & set(UNNEEDED) == set()


def test_diffusers_and_torchs_compiler_are_as_ever_afterwards():
    code = """
import torch
from services.diffusion.models.loading import UNet2DConditionModel
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
