"""A1111's .yaml beside a checkpoint is read as YAML, whatever its quotes, and never harms."""

import time

import pytest

from services.diffusion.models.a1111_yaml import DEPTH_LIMIT, YAML_LIMIT_BYTES, read_yaml
from services.diffusion.models.recipes import UnfitFolder
from tests.unit.diffusion.test_marks import SD1, SD2, SDXL, read, scheduler

LDM = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {line}
    linear_start: 0.00085
    linear_end: 0.0120
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {{in_channels: 4, context_dim: {width}}}
"""
SGM = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        scaling_config:
          target: {target}
    network_config:
      params:
        context_dim: [2048]
"""


@pytest.mark.parametrize(
    ("line", "prediction"),
    [
        ('parameterization: "v"', "v_prediction"),
        ("parameterization: 'v'", "v_prediction"),
        ("parameterization: v", "v_prediction"),
        ("parameterization:    v   # velocity", "v_prediction"),
        ('"parameterization": "v"', "v_prediction"),
        ("? parameterization\n    : v", "v_prediction"),
        ("parameterization: !!str v", "v_prediction"),
        ("parameterization: >-\n      v", "v_prediction"),
        ("parameterization: V", "v_prediction"),
        ("parameterization: eps", "epsilon"),
        ("parameterization: x0", "sample"),
        ("# parameterization: v", "epsilon"),
        ('note: "parameterization: v"', "epsilon"),
    ],
)
@pytest.mark.parametrize(("shapes", "width"), [(SD1, 768), (SD2, 1024)])
def test_every_spelling_of_the_parameterization(line, prediction, shapes, width, tmp_path):
    entry = read(tmp_path, shapes, yaml=LDM.format(line=line, width=width))
    assert scheduler(entry, "prediction_type") == (prediction,)
    assert entry.recipe.notes == ()


@pytest.mark.parametrize(
    ("target", "prediction"),
    [
        ("sgm.modules.diffusionmodules.denoiser_scaling.VScaling", "v_prediction"),
        ('"sgm.modules.diffusionmodules.denoiser_scaling.VScaling"', "v_prediction"),
        ("other.fork.denoiser_scaling.VScaling", "v_prediction"),
        ("sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", "epsilon"),
    ],
)
def test_sdxls_configs_say_it_by_a_class(target, prediction, tmp_path):
    assert scheduler(read(tmp_path, SDXL, yaml=SGM.format(target=target)), "prediction_type") == (prediction,)


@pytest.mark.parametrize("target", ["a.VScalingWithEDMcNoise", "a.EDMScaling"])
def test_edm_without_the_marks_that_tell_its_noise_leaves_the_file_out(target, tmp_path):
    with pytest.raises(UnfitFolder, match=r"says EDM.*edm_vpred.sigma_max"):
        read(tmp_path, SDXL, yaml=SGM.format(target=target))


@pytest.mark.parametrize(
    ("yaml", "why"),
    [(LDM.format(line="parameterization: flow", width=1024), "'flow'"), (SGM.format(target="a.OddScaling"), "'OddSca")],
)
def test_what_nothing_here_can_do_leaves_the_file_out_by_name(yaml, why, tmp_path):
    with pytest.raises(UnfitFolder, match=rf"model.yaml beside it says .*{why}"):
        read(tmp_path, SDXL, yaml=yaml.replace("1024", "2048"))


def test_a_yaml_of_another_family_is_passed_over_with_a_word(tmp_path):
    entry = read(tmp_path, SD1, yaml=LDM.format(line="parameterization: v", width=1024))
    assert scheduler(entry, "prediction_type") == ("epsilon",)
    assert "model.yaml beside it is passed over" in entry.recipe.notes[0]


def test_a_yaml_may_say_zero_terminal_snr(tmp_path):
    yaml = LDM.format(line="parameterization: v\n    zero_terminal_snr: True", width=768)
    told = scheduler(read(tmp_path, SD1, yaml=yaml), "rescale_betas_zero_snr", "timestep_spacing")
    assert told == (True, "trailing")


@pytest.mark.parametrize(
    ("start", "end", "betas"),
    [("0.001", "0.02", (0.001, 0.02)), ("0.02", "0.001", (0.00085, 0.012)), ("x", "nan", (0.00085, 0.012))],
)
def test_other_noise_is_taken_where_it_is_some(start, end, betas, tmp_path):
    yaml = f"model: {{params: {{linear_start: {start}, linear_end: {end}, parameterization: eps}}}}"
    assert scheduler(read(tmp_path, SD1, yaml=yaml), "beta_start", "beta_end") == betas


@pytest.mark.parametrize("yaml", ["", "# nothing", "words", "- a\n- b", "5", "name: Dream\ntags: [a]", "model: SD 2.1"])
def test_a_yaml_that_is_no_models_config_says_nothing(yaml, tmp_path):
    """SD 2 without a word predicts velocity; LDM's default, noise, counts for configs alone."""
    assert scheduler(read(tmp_path, SD2, yaml=yaml), "prediction_type") == ("v_prediction",)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "a: &a [*a]",
        "<<: &m {a: 1}\nb: {<<: *m}",
        "[" * (DEPTH_LIMIT + 5),
        "{a: " * 10_000,
        "- " * 20_000,
        "x" * (YAML_LIMIT_BYTES + 1),
        "a: [",
        "\x00\x01",
        "--- a\n--- b\n",
        "? [a]\n: b\n",
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_bomb_and_other_strange_files_leave_the_file_out_soon(content, tmp_path):
    began = time.process_time()
    with pytest.raises(UnfitFolder, match=r"model.yaml beside it cannot be read"):
        read(tmp_path, SD1, yaml=content)
    assert time.process_time() - began < 30


def test_tags_make_no_objects(tmp_path):
    yaml = 'parameterization: !!python/object/apply:os.system ["true"]\nother: !!python/name:os.system\n'
    assert scheduler(read(tmp_path, SD1, yaml=yaml), "prediction_type") == ("epsilon",)


def test_a_config_that_does_not_say_it_means_what_ldm_takes_by_default(tmp_path):
    yaml = LDM.format(line="timesteps: 1000", width=1024)
    assert scheduler(read(tmp_path, SD2, yaml=yaml), "prediction_type") == ("epsilon",)


def test_no_file_says_nothing(tmp_path):
    assert read_yaml(tmp_path / "none.yaml") is None
    (tmp_path / "folder.yaml").mkdir()
    assert read_yaml(tmp_path / "folder.yaml") is None
