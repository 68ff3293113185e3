"""Other services' names mean annotators there are."""

import pytest

from services.kernel.errors import NotFound
from services.preprocessor.aliases import ALIASES
from services.preprocessor.registry import NEURAL, PLAIN, Registry, aliases_of

# The replaced service's processors, by their ids.
REPLACED = [
    "scribble_hed",
    "softedge_hed",
    "scribble_hedsafe",
    "softedge_hedsafe",
    "depth_midas",
    "mlsd",
    "openpose",
    "openpose_face",
    "openpose_faceonly",
    "openpose_full",
    "openpose_hand",
    "scribble_pidinet",
    "softedge_pidinet",
    "scribble_pidsafe",
    "softedge_pidsafe",
    "normal_bae",
    "lineart_realistic",
    "lineart_coarse",
    "lineart_anime",
    "canny",
    "shuffle",
    "depth_leres",
    "depth_leres++",
    "mediapipe_face",
    "sam",
    "remove_background",
]
ADDED = [
    "depth_zoe",
    "depth_anything_v2",
    "seg_ofade20k",
    "seg_ofcoco",
    "seg_ufade20k",
    "dwpose",
    "teed",
    "anyline",
    "lineart_standard",
    "scribble_xdog",
    "normal_midas",
    "tile",
    "inpaint",
    "ip2p",
    "invert",
    "threshold",
    "blur_gaussian",
    "mediapipe_pose",
    "lsd",
]
ALL = Registry((*PLAIN, *NEURAL))


@pytest.mark.parametrize("annotator_id", REPLACED + ADDED)
def test_every_promised_id_is_there(annotator_id):
    assert ALL.get(annotator_id).id == annotator_id


def test_there_are_26_of_the_replaced_service():
    assert len(REPLACED) == 26


@pytest.mark.parametrize(("alias", "annotator_id"), ALIASES.items())
def test_every_alias_means_an_annotator_and_hides_none(alias, annotator_id):
    assert ALL.get(alias).id == annotator_id
    assert alias in aliases_of(annotator_id)
    assert alias not in {annotator.id for annotator in ALL}


def test_an_annotator_whose_packages_are_absent_says_what_to_install():
    partial = Registry(PLAIN, missing=[ALL.get("sam")])
    with pytest.raises(NotFound, match=r"fanlight\[annotators\]"):
        partial.get("sam")


@pytest.mark.parametrize("annotator", list(ALL), ids=lambda annotator: annotator.id)
def test_every_parameter_has_a_description_and_a_default_within_its_range(annotator):
    for parameter in annotator.all_parameters:
        assert parameter.description
        assert parameter.parse(parameter.default, field=parameter.name) == parameter.default
