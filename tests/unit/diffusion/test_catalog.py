"""What lies in the folders of models is told from their JSON alone."""

import json
import os
import subprocess
import sys

import pytest

from fanlight.errors import FailedPrecondition, NotFound
from services.diffusion.config import DiffusionSettings
from services.diffusion.engine.generation import Pipeline
from services.diffusion.models.entries import controlnet_id
from services.diffusion.models.scan import scan
from services.diffusion.wire import models_to_proto
from services.kernel.config import SettingsError


def test_a_folder_of_models_is_listed_with_their_own_sizes(catalog):
    checkpoint, *controlnets = models_to_proto(catalog)
    assert (checkpoint.id, checkpoint.kind, checkpoint.is_default) == ("tiny", "checkpoint", True)
    assert (checkpoint.width_px, checkpoint.height_px, checkpoint.size_step_px) == (64, 64, 4)
    assert list(checkpoint.pipelines) == list(Pipeline)
    assert checkpoint.size_bytes > 100_000
    assert [(each.id, each.kind) for each in controlnets] == [("canny", "controlnet"), ("depth", "controlnet")]
    assert {each.family for each in (checkpoint, *controlnets)} == {"tiny"}


def test_the_license_is_the_manifests(models, tmp_path):
    (tmp_path / "model").symlink_to(models / "model")
    files = [{"path": "model/unet/x.safetensors", "license": "MIT"}, {"path": "lora/x.safetensors", "license": "other"}]
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"files": files}))
    [model] = models_to_proto(scan([tmp_path]))
    assert model.license == "MIT"


def test_a_checkpoint_alone_offers_no_controlnet(models):
    [checkpoint] = models_to_proto(scan([models / "model"]))
    assert list(checkpoint.pipelines) == ["text2img", "img2img", "inpaint"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("controlnet-canny", "canny"),
        ("sd-controlnet-openpose", "openpose"),
        ("control_v11p_sd15_canny", "canny"),
        ("control_v11f1p_sd15_depth", "depth"),
        ("control_v11e_sd15_ip2p", "ip2p"),
        ("qr-monster", "qr-monster"),
    ],
)
def test_controlnets_go_by_short_names(name, short):
    assert controlnet_id(name) == short


def test_a_controlnet_of_another_family_is_refused_by_name(models, tmp_path):
    (tmp_path / "model").symlink_to(models / "model")
    other = tmp_path / "controlnet-canny"
    other.mkdir()
    config = json.loads((models / "controlnet-canny" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 768}))
    (other / "net.safetensors").symlink_to(models / "controlnet-canny" / "diffusion_pytorch_model.safetensors")
    catalog = scan([tmp_path])
    with pytest.raises(FailedPrecondition, match="canny is for unknown"):
        catalog.controlnet("canny", catalog.default())


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"_class_name": "FluxPipeline"}'])
def test_an_unfit_folder_is_left_out_and_the_rest_is_served(content, models, tmp_path):
    (tmp_path / "good").symlink_to(models / "model")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_bytes(content)
    assert [entry.id for entry in scan([tmp_path]).entries] == ["good"]


def test_without_any_checkpoint_nothing_can_be_asked_for(tmp_path):
    with pytest.raises(NotFound):
        scan([tmp_path]).default()


def test_a_model_folder_that_is_not_there_is_a_settings_error(tmp_path):
    settings = DiffusionSettings(models=os.pathsep.join([str(tmp_path), str(tmp_path / "nothing")]))
    with pytest.raises(SettingsError, match="nothing"):
        settings.folders()


def test_listing_models_and_starting_loads_no_torch(models):
    code = (
        "import sys; from pathlib import Path; import services.diffusion.__main__ as main;"
        f"main.scan([Path({str(models)!r})]).default();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
