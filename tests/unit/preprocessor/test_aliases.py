"""Other services' names stand for existing annotators."""

import pytest

from fanlight.contract.names import ANNOTATOR_ALIASES
from fanlight.errors import NotFound
from services.preprocessor.registry import CORE, NEURAL, Registry, aliases_of

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
# The names of other services' preprocessors, without those that have no counterpart here.
A1111 = """
    none invert canny blur_gaussian scribble_xdog shuffle threshold depth_midas depth depth_leres depth_leres++
    depth_zoe depth_anything depth_anything_v2 normal_bae normal_midas normal_map openpose openpose_face
    openpose_faceonly openpose_hand openpose_full dw_openpose_full mlsd mediapipe_face lineart_realistic lineart
    lineart_coarse lineart_anime lineart_standard scribble_hed scribble_pidinet pidinet_scribble softedge_hed
    hed softedge_hedsafe hed_safe softedge_pidinet pidinet softedge_pidisafe pidinet_safe softedge_teed
    softedge_anyline seg_ufade20k segmentation seg_ofade20k oneformer_ade20k seg_ofcoco oneformer_coco
    tile_resample inpaint inpaint_only inpaint_global_harmonious
"""
CIVITAI = """
    canny mlsd depthZoe depthAnything depthAnythingV2 zoeDepth midasDepth leresDepth softedgePidinet hed teed
    midasNormal baeNormal lineartRealistic lineartStandard lineartAnime anyline scribble scribbleXdog
    scribblePidinet fakeScribble openpose dwpose oneformerCoco oneformerAde20k uniformer shuffle tile rembg
    inpaint depth-anything depth-anything-v2 zoe-depth midas-depth midas-normal leres-depth bae-normal
    lineart-realistic lineart-standard lineart-anime pidinet fake-scribble scribble-pidinet scribble-xdog binary
    oneformer-coco oneformer-ade20k mediapipe-face Canny DepthZoe SoftedgePidinet Rembg
"""
RUNWARE = """
    canny depth mlsd normalbae openpose tile seg lineart lineart_anime shuffle scribble softedge depth_leres
    depth_midas depth_zoe inpaint_global_harmonious lineart_coarse lineart_realistic lineart_standard normal_bae
    scribble_hed scribble_pidinet seg_ofade20k seg_ofcoco seg_ufade20k softedge_hed softedge_hedsafe
    softedge_pidinet softedge_pidisafe tile_gaussian openpose_face openpose_faceonly openpose_full openpose_hand
"""
ALL = Registry((*CORE, *NEURAL))


@pytest.mark.parametrize("annotator_id", REPLACED + ADDED)
def test_every_promised_id_is_there(annotator_id):
    assert ALL.get(annotator_id).id == annotator_id


def test_the_replaced_service_had_26():
    assert len(REPLACED) == 26


@pytest.mark.parametrize("name", sorted({*A1111.split(), *CIVITAI.split(), *RUNWARE.split()}))
def test_the_names_of_others_are_known(name):
    assert ALL.get(name)


@pytest.mark.parametrize(("alias", "annotator_id"), ANNOTATOR_ALIASES.items())
def test_every_alias_means_an_annotator_and_hides_none(alias, annotator_id):
    assert ALL.get(alias).id == annotator_id
    assert alias in aliases_of(annotator_id)
    assert alias not in {annotator.id for annotator in ALL}


@pytest.mark.parametrize(("name", "annotator_id"), [("CANNY", "canny"), ("Depthzoe", "depth_zoe"), ("MLSD", "mlsd")])
def test_case_does_not_matter(name, annotator_id):
    assert ALL.get(name).id == annotator_id


def test_an_annotator_whose_packages_are_absent_says_what_to_install():
    partial = Registry(CORE, missing=[ALL.get("sam")])
    with pytest.raises(NotFound, match=r"fanlight\[annotators\]"):
        partial.get("sam")


@pytest.mark.parametrize("annotator", list(ALL), ids=lambda annotator: annotator.id)
def test_every_parameter_has_a_description_and_a_default_within_its_range(annotator):
    for parameter in annotator.all_parameters:
        assert parameter.description
        assert parameter.parse(parameter.default, field=parameter.name) == parameter.default
