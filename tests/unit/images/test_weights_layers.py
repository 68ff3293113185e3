import importlib.util
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[3] / "docker"


@pytest.fixture(scope="module")
def layers():
    spec = importlib.util.spec_from_file_location("docker_weights_layers", DOCKER / "weights_layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_object_of_the_store_is_a_layer_and_the_largest_comes_first(layers, tmp_path):
    store, context = tmp_path / "store", tmp_path / "context"
    context.mkdir()
    for name, size in (("aa11", 10), ("bb22", 3000), ("cc33", 200)):
        (store / "objects" / name[:2]).mkdir(parents=True)
        (store / "objects" / name[:2] / name).write_bytes(b"x" * size)
    (store / "models" / "author" / "name").mkdir(parents=True)
    (store / "models" / "author" / "name" / "unet").symlink_to("../../../objects/bb/bb22")
    (store / "index.sqlite").write_bytes(b"index")
    lines = list(layers.store_layers(store, context))
    assert [line.split()[-1] for line in lines] == [
        "/weights/objects/bb/bb22",
        "/weights/objects/cc/cc33",
        "/weights/objects/aa/aa11",
        "/weights",
    ]
    assert (context / "names" / "models" / "author" / "name" / "unet").is_symlink()
    assert (context / "bb22").stat().st_size == 3000


def test_a_model_of_our_own_package_goes_where_the_package_has_it(layers, tmp_path):
    planned = {
        "files": [
            {"path": "unet/config.json", "source": "package:starter/model/unet/config.json"},
            {"path": "x.safetensors", "source": "hf:org/repo@main/x.safetensors"},
        ]
    }
    (line,) = layers.packaged_layers(planned, tmp_path)
    assert line.endswith(" /opt/fanlight/lib/fanlight/starter/model/unet/config.json")
    assert (tmp_path / line.split()[1]).read_bytes()


def test_the_plan_is_that_of_the_weights_room(layers):
    planned = layers.plan(["starter"], "")
    paths = {row["path"] for row in planned["files"]}
    assert "unet/diffusion_pytorch_model.safetensors" in paths


def test_a_reference_that_means_nothing_ends_the_build_with_a_line(layers):
    with pytest.raises(SystemExit, match="error"):
        layers.plan(["no-such-thing-at-all"], "")


def test_a_file_that_nobody_else_can_name_is_refused_rather_than_left_out(layers, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(SystemExit, match="file of this machine"):
        layers.bake("base", "name", [str(tmp_path / "mine.safetensors")])
