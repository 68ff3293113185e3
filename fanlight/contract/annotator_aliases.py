"""Other services' names for the annotators here. One table; decides nothing.

A1111: the modules of sd-webui-controlnet. Civitai: its orchestration's ImageTransformer and preprocessImage kinds.
Runware: its ControlNet preprocessors. Horde: AI Horde's control types.
"""

from collections.abc import Mapping

_A1111 = {
    "depth": "depth_midas",
    "depth_leres_boost": "depth_leres++",
    "normal_map": "normal_midas",
    "lineart": "lineart_realistic",
    "lineart_standard (from white bg & black line)": "lineart_standard",
    "hed": "softedge_hed",
    "hed_safe": "softedge_hedsafe",
    "pidinet": "softedge_pidinet",
    "pidinet_safe": "softedge_pidsafe",
    "softedge_pidisafe": "softedge_pidsafe",
    "pidinet_scribble": "scribble_pidinet",
    "softedge_teed": "teed",
    "softedge_anyline": "anyline",
    "segmentation": "seg_ufade20k",
    "oneformer_ade20k": "seg_ofade20k",
    "oneformer_coco": "seg_ofcoco",
    "dw_openpose_full": "dwpose",
    "tile_resample": "tile",
    "inpaint_only": "inpaint",
    "inpaint_global_harmonious": "inpaint",
    "none": "ip2p",
    "depth_anything": "depth_anything_v2",
    "invert (from white bg & black line)": "invert",
}
_CIVITAI = {
    "depthZoe": "depth_zoe",
    "zoeDepth": "depth_zoe",
    "zoe-depth": "depth_zoe",
    "depthAnything": "depth_anything_v2",
    "depth-anything": "depth_anything_v2",
    "depthAnythingV2": "depth_anything_v2",
    "depth-anything-v2": "depth_anything_v2",
    "midasDepth": "depth_midas",
    "midas-depth": "depth_midas",
    "leresDepth": "depth_leres",
    "leres-depth": "depth_leres",
    "softedgePidinet": "softedge_pidinet",
    "midasNormal": "normal_midas",
    "midas-normal": "normal_midas",
    "baeNormal": "normal_bae",
    "bae-normal": "normal_bae",
    "lineartRealistic": "lineart_realistic",
    "lineart-realistic": "lineart_realistic",
    "lineartStandard": "lineart_standard",
    "lineart-standard": "lineart_standard",
    "lineartAnime": "lineart_anime",
    "lineart-anime": "lineart_anime",
    "scribble": "scribble_pidinet",
    "scribbleXdog": "scribble_xdog",
    "scribble-xdog": "scribble_xdog",
    "scribblePidinet": "scribble_pidinet",
    "scribble-pidinet": "scribble_pidinet",
    "fakeScribble": "scribble_hed",
    "fake-scribble": "scribble_hed",
    "oneformerCoco": "seg_ofcoco",
    "oneformer-coco": "seg_ofcoco",
    "oneformerAde20k": "seg_ofade20k",
    "oneformer-ade20k": "seg_ofade20k",
    "uniformer": "seg_ufade20k",
    "rembg": "remove_background",
    "binary": "threshold",
    "mediapipe-face": "mediapipe_face",
    # Of its older SDKs.
    "Canny": "canny",
    "DepthZoe": "depth_zoe",
    "SoftedgePidinet": "softedge_pidinet",
    "Rembg": "remove_background",
}
_RUNWARE = {
    "canny_edge": "canny",
    "lineart_fine": "lineart_realistic",
    "openpose_body": "openpose",
    "seg": "seg_ofade20k",
    "normalbae": "normal_bae",
    "softedge": "softedge_hed",
    "tile_gaussian": "blur_gaussian",
}
_HORDE = {
    "normal": "normal_bae",
    "fakescribbles": "scribble_hed",
    "hough": "mlsd",
}

ALIASES: Mapping[str, str] = {**_HORDE, **_RUNWARE, **_CIVITAI, **_A1111}
