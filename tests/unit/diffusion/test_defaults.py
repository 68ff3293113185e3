"""A checkpoint's defaults come from its configs, its card, the files beside it and its name, as far as they fit."""

import json
import struct
from dataclasses import replace

import pytest

from fanlight.contract.defaults import NO_DEFAULTS, Defaults
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.defaults import defaults_of
from services.diffusion.models.recipes import shipped
from services.diffusion.parse.parser import Parser
from services.diffusion.wire import models_to_proto
from services.kernel.images import ImageLimits
from tests.unit.diffusion.conftest import ABILITIES


@pytest.fixture
def entry(catalog, tmp_path):
    """An entry of a file or folder of that name, which has the tiny model's configs."""

    def make(name="plain.safetensors", *, base="", scheduler=None, **recipe):
        tiny = catalog.default()
        own = replace(shipped(base) if base else tiny.recipe, **recipe)
        if scheduler:
            own = replace(own, scheduler={**own.scheduler, "_class_name": scheduler})
        return replace(tiny, id=name.removesuffix(".safetensors"), path=tmp_path / name, recipe=own)

    return make


def header(path, **metadata):
    data = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)


def test_an_ordinary_checkpoint_of_its_own_family_has_none(entry):
    assert defaults_of(entry()) == NO_DEFAULTS


@pytest.mark.parametrize(
    ("base", "guidance", "scheduler"), [("sd1", 7.0, ""), ("sd2", 7.0, ""), ("sdxl", 5.0, "euler")]
)
def test_a_family_has_its_defaults(entry, base, guidance, scheduler):
    found = defaults_of(entry(base=base))
    assert (found.guidance_scale, found.scheduler, found.sources) == (guidance, scheduler, (f"family {base}",))


@pytest.mark.parametrize(
    ("name", "base", "variant", "steps"),
    [
        ("LCM_Dreamshaper_v7", "sd1", "lcm", 4),
        ("photonLCM_v10.safetensors", "sd1", "lcm", 4),
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl", "turbo", 4),
        ("dreamshaperXL_turboDPMSDE.safetensors", "sdxl", "turbo", 4),
        ("TurboVisionXL.safetensors", "sdxl", "turbo", 4),
        ("sd-turbo", "sd2", "turbo", 4),
        ("sdxl_lightning_4step.safetensors", "sdxl", "lightning", 4),
        ("sdxl_lightning_8step_unet.safetensors", "sdxl", "lightning", 8),
        ("juggernautXL_v9Lightning.safetensors", "sdxl", "lightning", 4),
        ("Hyper-SDXL-1step-Unet.safetensors", "sdxl", "hyper", 1),
        ("hyper-sd15-8steps.safetensors", "sd1", "hyper", 8),
        ("realvisXL_Hyper.safetensors", "sdxl", "hyper", 8),
        ("tiny_lightning_2steps.safetensors", "", "lightning", 2),
    ],
)
def test_a_name_tells_the_variant(entry, name, base, variant, steps):
    found = defaults_of(entry(name, base=base))
    assert (found.variant, found.steps, found.sources[-1]) == (variant, steps, f"{variant} by name")
    assert found.guidance_scale <= 1.5


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("hyperrealism_v3.safetensors", "sd1"),
        ("Hyper_Realistic_SD.safetensors", "sd1"),
        ("xl_hyper_real.safetensors", "sdxl"),
        ("turbocharged.safetensors", "sdxl"),
        ("lightning_bolts.safetensors", "sd1"),
        ("enlightningment.safetensors", "sdxl"),
        ("calcmodel.safetensors", "sd1"),
    ],
)
def test_a_word_within_a_word_tells_nothing(entry, name, base):
    assert defaults_of(entry(name, base=base)).variant == ""


def test_only_stabilitys_own_turbo_is_small(entry):
    own, merged = (defaults_of(entry(name, base="sdxl")) for name in ("sd_xl_turbo_1.0.safetensors", "my_turbo"))
    assert ((own.width_px, own.height_px), (merged.width_px, merged.height_px)) == ((512, 512), (0, 0))


@pytest.mark.parametrize(
    ("scheduler", "wanted"), [("LCMScheduler", "lcm"), ("TCDScheduler", "tcd"), ("EDMEulerScheduler", "edm_euler")]
)
def test_the_scheduler_config_tells(entry, scheduler, wanted):
    assert defaults_of(entry(scheduler=scheduler)).scheduler == wanted


def test_a_unet_that_takes_the_guidance_wants_more_of_it(entry):
    unet = {**shipped("sd1").unet, "time_cond_proj_dim": 256}
    found = defaults_of(entry(base="sd1", unet=unet))
    assert (found.variant, found.guidance_scale, found.scheduler) == ("lcm", 8.5, "lcm")


@pytest.mark.parametrize("ending", [".civitai.info", ".metadata.json", ".cm-info.json", ".json"])
@pytest.mark.parametrize(
    ("said", "variant"),
    [("SDXL Turbo", "turbo"), ("SDXL Lightning", "lightning"), ("SDXL Hyper", "hyper"), ("SDXL 1.0 LCM", "lcm")],
)
def test_civitais_name_of_the_base_tells(entry, tmp_path, ending, said, variant):
    (tmp_path / f"plain{ending}").write_text(json.dumps({"baseModel": said}))
    found = defaults_of(entry(base="sdxl"))
    assert (found.variant, found.sources[-1]) == (variant, f"{variant} by plain{ending}")


def test_the_header_tells(entry, tmp_path):
    header(tmp_path / "plain.safetensors", **{"modelspec.title": "My SDXL Turbo"})
    assert defaults_of(entry(base="sdxl")).sources[-1] == "turbo by modelspec.title"


CARD = """---
license: mit
tags:
- text-to-image
- lightning
widget:
- text: a fox
  parameters: {num_inference_steps: 30, guidance_scale: 3}
inference:
  parameters:
    num_inference_steps: 6
    width: 768
    height: 512
    sampler: DPM++ 2M Karras
---
# A model
"""


def test_a_folders_card_tells_and_says_numbers(entry, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text(CARD)
    found = defaults_of(entry("folder", base="sdxl"))
    assert (found.steps, found.guidance_scale, found.width_px, found.height_px) == (6, 3.0, 768, 512)
    assert (found.scheduler, found.noise_schedule, found.variant) == ("dpmpp_2m", "karras", "lightning")
    assert found.sources == ("family sdxl", "lightning by README.md", "README.md", "README.md")


def test_a_file_beside_says_numbers(entry, tmp_path):
    said = {"steps": "28", "cfg scale": 4.5, "Sampler": "Euler a", "Schedule type": "Simple", "notes": "x"}
    (tmp_path / "plain.json").write_text(json.dumps(said))
    found = defaults_of(entry(base="sd1"))
    assert (found.steps, found.guidance_scale, found.scheduler, found.noise_schedule) == (28, 4.5, "euler_a", "simple")


@pytest.mark.parametrize(
    "said",
    [
        '{"steps": 100000, "cfg_scale": 1e9}',
        '{"steps": 0, "guidance_scale": -1}',
        '{"steps": NaN, "cfg": Infinity}',
        '{"steps": true, "cfg": [7]}',
        '{"steps": 4.5, "width": 65, "height": 64}',
        '{"width": 99999, "height": 99999, "sampler": "DPM adaptive"}',
        '{"sampler": "DDIM", "scheduler": 3, "schedule type": "Karras"}',
        '{"parameters": [], "defaults": 3, "inference": "no", "steps": {"a": 1}}',
        f'{{"steps": {"9" * 5000}}}',
        "[" * 100_000,
        '["steps"]',
        "",
        '{"baseModel": {"a": 1}}',
    ],
)
def test_what_no_request_could_have_is_passed_over(entry, tmp_path, said):
    (tmp_path / "plain.json").write_text(said)
    assert defaults_of(entry()) == NO_DEFAULTS


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)


MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 9)}]}}\n" for n in range(12)
)


@pytest.mark.parametrize(
    "front",
    [
        MERGES,
        BOMB + "inference: *m\n",
        "a: [" * 20_000,
        "steps: 2024-99-99",
        "? [a]: b",
        "\t- x",
        "!!python/name:os.system ''",
    ],
)
def test_a_card_that_cannot_be_read_says_nothing(entry, tmp_path, front):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text(f"---\n{front}\n---\n")
    assert defaults_of(entry("folder")) == NO_DEFAULTS


def test_a_pipe_and_a_large_file_are_not_waited_for(entry, tmp_path):
    import os

    os.mkfifo(tmp_path / "plain.json")
    with open(tmp_path / "plain.civitai.info", "wb") as file:
        file.truncate(2 * 1024**3)
    assert defaults_of(entry()) == NO_DEFAULTS


def test_a_card_that_changes_is_read_again(entry, tmp_path):
    import os

    checkpoint = entry()
    (tmp_path / "plain.json").write_text('{"steps": 7}')
    first = defaults_of(checkpoint).steps
    (tmp_path / "plain.json").write_text('{"steps": 9}')
    os.utime(tmp_path / "plain.json", ns=(1, 1))
    assert (first, defaults_of(checkpoint).steps) == (7, 9)


def test_a_worker_announces_them_and_fills_in_what_a_direct_call_leaves_out(entry, tmp_path):
    (tmp_path / "plain.json").write_text('{"steps": 3, "sampler": "Euler", "cfg": 2, "width": 128, "height": 64}')
    catalog = ModelCatalog([entry()], default_id="plain")
    [model] = models_to_proto(catalog)
    parser = Parser(catalog=catalog, abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 1)
    generation = parser.parse(GenerateRequest(prompt="a fox"))
    asked = parser.parse(GenerateRequest(prompt="a fox", steps=5, scheduler="ddim", width_px=64, height_px=64))

    assert (model.defaults.steps, model.defaults.scheduler) == (3, "euler")
    assert (generation.steps, generation.scheduler, generation.guidance_scale) == (3, "euler", 2.0)
    assert (generation.width_px, generation.height_px) == (128, 64)
    assert (asked.steps, asked.scheduler, asked.guidance_scale, asked.width_px) == (5, "ddim", 2.0, 64)


def test_defaults_are_one_value(entry):
    assert defaults_of(entry()) == Defaults()
