"""How the texts of options are read."""

from pathlib import Path

import pytest
import typer

from fanlight.cli.options import job_name, parse_control, parse_parameter, parse_sides, parse_size


@pytest.mark.parametrize(
    ("text", "annotator", "controlnet", "path", "scale"),
    [
        ("canny=photo.jpg", "canny", "", "photo.jpg", None),
        ("canny=photo.jpg:0.8", "canny", "", "photo.jpg", 0.8),
        ("canny/sketch=a b.png:1", "canny", "sketch", "a b.png", 1.0),
        ("none/canny=edges.png", "", "canny", "edges.png", None),
        ("canny=odd:name", "canny", "", "odd:name", None),
        ("canny=a=b.png:0.5", "canny", "", "a=b.png", 0.5),
    ],
)
def test_a_control_names_annotator_controlnet_image_and_scale(text, annotator, controlnet, path, scale):
    control = parse_control(text)

    assert (control.annotator, control.controlnet) == (annotator, controlnet)
    assert (control.image, control.scale) == (Path(path), scale)


@pytest.mark.parametrize(
    ("text", "resize", "mode", "path"),
    [
        ("canny,resize=pad=photo.jpg", "pad", "", "photo.jpg"),
        ("none/canny,mode=prompt,resize=stretch=a,mode=b=c.png", "stretch", "prompt", "a,mode=b=c.png"),
        ("canny=a,mode=control=b.png", "", "", "a,mode=control=b.png"),
    ],
)
def test_a_control_may_name_its_resize_and_mode(text, resize, mode, path):
    control = parse_control(text)
    assert (control.resize, control.mode, control.image) == (resize, mode, Path(path))


def test_sides_are_named_with_their_pixels():
    assert parse_sides("left=64, top=8") == {"outpaint_left_px": 64, "outpaint_top_px": 8}
    assert parse_sides(None) == {}


@pytest.mark.parametrize("text", ["left", "left=", "left=-1", "up=5", "left=1e3", "left=1,,", "left=1234567"])
def test_what_is_no_side_is_refused(text):
    with pytest.raises(typer.BadParameter, match="SIDE=PIXELS"):
        parse_sides(text)


def test_what_names_a_file_is_no_scale(tmp_path):
    (tmp_path / "photo:2").touch()

    assert parse_control(f"canny={tmp_path}/photo:2").image == tmp_path / "photo:2"


@pytest.mark.parametrize("text", ["canny", "=photo.jpg", "canny=", ""])
def test_a_control_without_its_parts_is_refused(text):
    with pytest.raises(typer.BadParameter, match="ANNOTATOR=IMAGE"):
        parse_control(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=1.5", 1.5), ("a=true", True), ("a=blue", "blue"), ("a=", ""), ("a=b=c", "b=c"), ("a=[1]", "[1]")],
)
def test_a_parameter_is_a_number_a_truth_or_a_text(text, value):
    assert parse_parameter(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1"])
def test_a_parameter_without_name_or_value_is_refused(text):
    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        parse_parameter(text)


def test_a_size_is_two_numbers():
    assert parse_size("512x768") == (512, 768)
    assert parse_size(None) == (0, 0)


@pytest.mark.parametrize("text", ["512", "x", "512x", "-1x5", "512X512", "5x5x5"])
def test_anything_else_is_no_size(text):
    with pytest.raises(typer.BadParameter, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_a_job_may_be_named_by_its_id_alone():
    assert job_name("abc") == job_name("jobs/abc") == "jobs/abc"
