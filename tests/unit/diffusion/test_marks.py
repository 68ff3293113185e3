"""What a checkpoint's file says beside its weights is honored, or the file is left out by name."""

import struct

import pytest
import torch

from services.diffusion.models.marks import EDM_MEAN, EDM_STD, EDM_V_MAX, EDM_V_MIN
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.single_files import read_file
from tests.fakes.checkpoint_files import as_rows, ldm, write_header

SD1, SD2, SDXL, REFINER = (320, 768), (320, 1024), (320, 2048), (384, 1280)
MARK = ("F32", (0,))
SD2_LAYER = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def read(tmp_path, shapes, marks=None, *, metadata=None, yaml=None, name="model", channels=4):
    rows = {**as_rows(ldm(*shapes, channels)), **(marks or {})}
    file = write_header(tmp_path / f"{name}.safetensors", rows, metadata=metadata)
    if yaml is not None:
        file.with_suffix(".yaml").write_text(yaml)
    return read_file(file)


def scheduler(entry, *names):
    return tuple(entry.recipe.scheduler.get(name) for name in names)


def floats(*values, shape=None, dtype="F32"):
    code = {"F32": "f", "F16": "e", "F64": "d"}[dtype]
    return dtype, shape or (len(values),), struct.pack(f"<{len(values)}{code}", *values)


@pytest.mark.parametrize("shapes", [SD1, SD2, SDXL])
@pytest.mark.parametrize(
    ("marks", "prediction", "rescales", "spacing"),
    [
        ({"v_pred": MARK}, "v_prediction", None, False),
        ({"v_pred": MARK, "ztsnr": MARK}, "v_prediction", True, True),
        # Nothing but velocity can be learned without signal.
        ({"ztsnr": MARK}, "v_prediction", True, True),
        ({"ztsnr": ("BF16", (1,)), "v_pred": ("F64", ())}, "v_prediction", True, True),
    ],
    ids=["v_pred", "both", "ztsnr", "other types"],
)
def test_marks_of_velocity_and_of_zero_terminal_snr(shapes, marks, prediction, rescales, spacing, tmp_path):
    entry = read(tmp_path, shapes, marks)
    told = scheduler(entry, "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    assert told[:2] == (prediction, rescales)
    assert (told[2] == "trailing") is spacing


def test_zero_terminal_snr_of_a_model_that_says_noise_is_left_out_by_name(tmp_path):
    with pytest.raises(UnfitFolder, match=r"ztsnr.*predicts noise"):
        read(tmp_path, SDXL, {"ztsnr": MARK}, metadata={"modelspec.prediction_type": "epsilon"})


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "V_Prediction"}, "v_prediction"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"note": '"__metadata__": {"modelspec.prediction_type": "v"}'}, "epsilon"),
    ],
)
def test_metadata_says_what_is_predicted(metadata, prediction, tmp_path):
    assert scheduler(read(tmp_path, SDXL, metadata=metadata), "prediction_type") == (prediction,)


def test_a_mark_is_believed_before_metadata(tmp_path):
    entry = read(tmp_path, SDXL, {"v_pred": MARK}, metadata={"modelspec.prediction_type": "epsilon"})
    assert scheduler(entry, "prediction_type") == ("v_prediction",)


def test_metadata_that_says_what_nothing_here_predicts_leaves_the_file_out(tmp_path):
    with pytest.raises(UnfitFolder, match=r"modelspec.prediction_type 'flow'"):
        read(tmp_path, SDXL, metadata={"modelspec.prediction_type": "flow"})


def test_metadata_of_another_architecture_is_told_and_not_believed(tmp_path):
    entry = read(tmp_path, SD1, metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    assert entry.base == "sd1"
    assert entry.recipe.notes == ("its metadata calls it 'stable-diffusion-xl-v1-base', its tensors are of sd1",)


@pytest.mark.parametrize("architecture", ["stable-diffusion-v1", "stable-diffusion-v1/lora", ""])
def test_metadata_of_its_own_architecture_is_not_worth_a_word(architecture, tmp_path):
    assert read(tmp_path, SD1, metadata={"modelspec.architecture": architecture}).recipe.notes == ()


@pytest.mark.parametrize(
    ("told", "size_px", "notes"),
    [
        ("768x512", (768, 512), 0),
        ("1024", (1024, 1024), 0),
        ("640x960", (640, 960), 0),
        ("1x1", (512, 512), 1),
        ("99999x99999", (512, 512), 1),
        ("large", (512, 512), 1),
        ("-512x512", (512, 512), 1),
    ],
)
def test_the_metadatas_resolution_is_the_default_size_where_it_is_one(told, size_px, notes, tmp_path):
    entry = read(tmp_path, SD1, metadata={"modelspec.resolution": told})
    assert (entry.width_px, entry.height_px) == size_px
    assert len(entry.recipe.notes) == notes


def edm(mean=(-1.6, 1.8, -1.3, 2.5), deviation=(8.4, 5.9, 6.5, 5.2), **options):
    shape = (1, 4, 1, 1)
    return {EDM_MEAN: floats(*mean, shape=shape, **options), EDM_STD: floats(*deviation, shape=shape, **options)}


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_playgrounds_marks_make_its_scheduler_and_its_latents(dtype, tmp_path):
    entry = read(tmp_path, SDXL, edm(dtype=dtype))
    told = scheduler(entry, "_class_name", "prediction_type", "sigma_data", "sigma_max", "sigma_min")
    assert told == ("EDMDPMSolverMultistepScheduler", "epsilon", 0.5, 80.0, 0.002)
    assert entry.recipe.vae["latents_mean"] == pytest.approx([-1.6, 1.8, -1.3, 2.5], rel=1e-3)
    assert entry.recipe.vae["latents_std"] == pytest.approx([8.4, 5.9, 6.5, 5.2], rel=1e-3)
    assert entry.recipe.vae["scaling_factor"] == 0.5


def test_bfloat16_is_read_too(tmp_path):
    half = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    cut = b"".join(half[at + 2 : at + 4] for at in range(0, 16, 4))
    entry = read(tmp_path, SDXL, {EDM_MEAN: ("BF16", (4,), cut), EDM_STD: ("BF16", (4,), cut)})
    assert entry.recipe.vae["latents_std"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("marks", "lowest"),
    [({EDM_V_MAX: floats(120.0, shape=())}, 0.002), ({EDM_V_MAX: floats(120.0), EDM_V_MIN: floats(0.01)}, 0.01)],
)
def test_cosxls_marks_make_its_scheduler(marks, lowest, tmp_path):
    entry = read(tmp_path, SDXL, {**marks, "v_pred": MARK})
    assert scheduler(entry, "_class_name", "prediction_type", "sigma_data", "sigma_max") == (
        "EDMEulerScheduler",
        "v_prediction",
        1.0,
        120.0,
    )
    assert entry.recipe.scheduler["sigma_min"] == pytest.approx(lowest)


@pytest.mark.parametrize(
    ("shapes", "marks", "why"),
    [
        (SDXL, {EDM_MEAN: floats(1, 2, 3, 4)}, "one of edm_mean and edm_std"),
        (SDXL, edm(deviation=(1, 2, 3, 0)), "edm_std is not above 0"),
        (SDXL, edm(mean=(1, 2, 3, float("nan"))), "edm_mean is not 4 finite numbers"),
        (SDXL, {EDM_MEAN: floats(1, 2), EDM_STD: floats(1, 2)}, "edm_mean is not 4"),
        (SDXL, {EDM_MEAN: ("I64", (4,)), EDM_STD: ("I64", (4,))}, "edm_mean is not 4"),
        (SDXL, {EDM_MEAN: ("F32", (100_000,)), EDM_STD: ("F32", (4,))}, "edm_mean is not 4"),
        (SDXL, {EDM_V_MIN: floats(0.1)}, "without edm_vpred.sigma_max"),
        (SDXL, {EDM_V_MAX: floats(0.0)}, "no range of noise"),
        (SDXL, {EDM_V_MAX: floats(1.0), EDM_V_MIN: floats(2.0)}, "no range of noise"),
        (SDXL, {EDM_V_MAX: floats(float("inf"))}, "sigma_max is not 1 finite"),
        (SDXL, {**edm(), EDM_V_MAX: floats(80.0)}, "exclude each other"),
        (SDXL, {**edm(), "v_pred": MARK}, "exclude each other"),
        (SD1, edm(), "known of SDXL only, and it is sd1"),
        (REFINER, {EDM_V_MAX: floats(80.0)}, "known of SDXL only, and it is refiner"),
    ],
)
def test_marks_that_make_no_sense_leave_the_file_out_by_name(shapes, marks, why, tmp_path):
    with pytest.raises(UnfitFolder, match=why):
        read(tmp_path, shapes, marks)


def layer(deviation):
    half = [deviation, -deviation] * 160
    return {SD2_LAYER: floats(*half, dtype="F16")}


@pytest.mark.parametrize(
    ("name", "marks", "metadata", "prediction", "size_px"),
    [
        # ComfyUI's measure, whatever the file is called.
        ("wd-512-base", layer(0.12), {}, "v_prediction", 768),
        ("v2-1_768-v", layer(0.05), {}, "epsilon", 512),
        ("wd-512-base", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 768),
        ("any", layer(0.12), {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 512),
        ("any", layer(0.12), {"modelspec.prediction_type": "epsilon"}, "epsilon", 512),
        # A layer of zeros or without numbers says nothing, so the name does.
        ("any", {}, {}, "v_prediction", 768),
        ("any_512", layer(0.0), {}, "epsilon", 512),
        ("any", layer(float("nan")), {}, "v_prediction", 768),
    ],
)
def test_sd2s_kinds_are_told_by_more_than_a_name(name, marks, metadata, prediction, size_px, tmp_path):
    entry = read(tmp_path, SD2, marks, metadata=metadata, name=name)
    assert (*scheduler(entry, "prediction_type"), entry.width_px) == (prediction, size_px)


def test_the_layer_is_read_in_eight_bits_too(tmp_path):
    # 0.125 and -0.125 in E4M3.
    entry = read(tmp_path, SD2, {SD2_LAYER: ("F8_E4M3", (320,), bytes([0x20, 0xA0] * 160))}, name="512")
    assert scheduler(entry, "prediction_type") == ("v_prediction",)


def test_eight_bits_are_read_as_torch_reads_them():
    from services.diffusion.models.headers import _DECODERS

    every = bytes(range(256))
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        expected = torch.frombuffer(bytearray(every), dtype=torch.uint8).view(dtype).float()
        assert torch.equal(torch.tensor(_DECODERS[name](every)).nan_to_num(7), expected.nan_to_num(7))


def test_inpainting_models_of_sd2_predict_noise(tmp_path):
    assert scheduler(read(tmp_path, SD2, layer(0.12), channels=9), "prediction_type") == ("epsilon",)
