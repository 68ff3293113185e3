"""LoRAs in every common form are the sum of their deltas, on copies; the weights themselves never change."""

import hashlib
import json
import random

import pytest
import torch
from safetensors.torch import save_file

from fanlight.errors import FailedPrecondition
from services.diffusion.engine.backend import assemble
from services.diffusion.models import patching
from services.diffusion.models.entries import LoraEntry, LoraUse
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.patching import layer_names
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.scan import read_path, scan

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def checkpoint(manager, catalog):
    return manager.checkpoint(catalog.default())


@pytest.fixture
def written(tmp_path):
    """Writes a LoRA and reads its entry."""

    def write(tensors, name="style", metadata=None):
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
        [entry] = scan([tmp_path]).entries
        assert isinstance(entry, LoraEntry)
        return entry

    return write


@pytest.fixture
def patched(manager, asked):
    """The tiny model with LoRAs at these weights."""

    def patch(*uses):
        return assemble(manager, asked(loras=tuple(uses)))

    return patch


def numbers(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * 0.1


def weight(checkpoint, path):
    return checkpoint.unet.get_submodule(path).weight


def close(one, other):
    return torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("style", ["kohya", "ldm", "diffusers", "peft", "processor"])
def test_a_linear_layer_gets_the_scaled_product(style, checkpoint, written, patched):
    pristine = weight(checkpoint, LINEAR)
    down, up = numbers(RANK, pristine.shape[1]), numbers(pristine.shape[0], RANK)
    plain = LINEAR.replace(".", "_")
    ldm = "input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    names = {
        "kohya": (f"lora_unet_{plain}.lora_down.weight", f"lora_unet_{plain}.lora_up.weight"),
        "ldm": (f"lora_unet_{ldm}.lora_down.weight", f"lora_unet_{ldm}.lora_up.weight"),
        "diffusers": (f"unet.{LINEAR}.lora.down.weight", f"unet.{LINEAR}.lora.up.weight"),
        "peft": (f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"),
        "processor": tuple(
            f"unet.{LINEAR.replace('.to_k', '.processor.to_k_lora')}.{each}.weight" for each in ("down", "up")
        ),
    }[style]
    tensors = dict(zip(names, (down, up), strict=True))
    scale = 1.0
    if style in ("kohya", "ldm"):
        tensors[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(ALPHA)
        scale = ALPHA / RANK
    entry = written(tensors)
    assert entry.cross_attention_dim == checkpoint.entry.shape.cross_attention_dim
    made = patched(LoraUse(entry=entry, unet_weight=0.7))
    assert close(weight(made, LINEAR), pristine + 0.7 * scale * (up @ down))


def test_pefts_own_alpha_is_in_the_metadata(checkpoint, written, patched):
    pristine = weight(checkpoint, LINEAR)
    down, up = numbers(RANK, pristine.shape[1]), numbers(pristine.shape[0], RANK)
    tensors = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    config = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 6})}
    made = patched(LoraUse(entry=written(tensors, metadata=config)))
    assert close(weight(made, LINEAR), pristine + 6 / RANK * (up @ down))


def test_a_convolution_with_and_without_a_middle(checkpoint, written, patched):
    pristine = weight(checkpoint, CONV)
    out, into = pristine.shape[:2]
    name = f"lora_unet_{CONV.replace('.', '_')}"
    down, up = numbers(RANK, into, 3, 3), numbers(out, RANK, 1, 1)
    entry = written({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, "plain")
    wanted = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    assert close(weight(patched(LoraUse(entry=entry)), CONV), pristine + wanted)
    entry.path.unlink()
    flat, mid = numbers(RANK, into, 1, 1), numbers(RANK, RANK, 3, 3)
    parts = {"lora_down.weight": flat, "lora_up.weight": up, "lora_mid.weight": mid}
    entry = written({f"{name}.{part}": tensor for part, tensor in parts.items()}, "middle")
    wanted = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, flat[:, :, 0, 0])
    assert close(weight(patched(LoraUse(entry=entry)), CONV), pristine + wanted)


def test_loha_lokr_and_whole_differences(checkpoint, written, patched):
    pristine = weight(checkpoint, LINEAR)
    out, into = pristine.shape
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    a, b, c, d = numbers(out, RANK), numbers(RANK, into), numbers(out, RANK) + 0.1, numbers(RANK, into) - 0.1
    one, two = numbers(2, 4), numbers(out // 2, into // 4)
    cases = {
        "loha": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(ALPHA)},
            (a @ b) * (c @ d) * ALPHA / RANK,
        ),
        # alpha means nothing where both factors are whole.
        "lokr": ({"lokr_w1": one, "lokr_w2": two, "alpha": torch.tensor(ALPHA)}, torch.kron(one, two)),
        "whole": ({"diff": numbers(out, into)}, numbers(out, into)),
    }
    for form, (parts, wanted) in cases.items():
        entry = written({f"{name}.{part}": tensor for part, tensor in parts.items()}, form)
        made = patched(LoraUse(entry=entry, unet_weight=0.5))
        assert close(weight(made, LINEAR), pristine + 0.5 * wanted), form
        entry.path.unlink()


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_keeps_its_own_lengths(axis, checkpoint, written, patched):
    pristine = weight(checkpoint, LINEAR)
    down, up = numbers(RANK, pristine.shape[1]), numbers(pristine.shape[0], RANK)
    lengths = 1 + torch.rand(pristine.shape[1 - axis] if axis == 0 else pristine.shape[0])
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    stored = lengths[None] if axis == 0 else lengths
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": stored}
    merged = pristine + up @ down
    wanted = merged / merged.norm(dim=axis, keepdim=True) * (lengths[None] if axis == 0 else lengths[:, None])
    assert close(weight(patched(LoraUse(entry=written(tensors))), LINEAR), wanted)


def test_text_encoder_and_unet_have_weights_of_their_own(checkpoint, written, patched):
    unet, text = weight(checkpoint, LINEAR), checkpoint.texts[0].encoder.get_submodule(TEXT).weight
    name = f"lora_te_text_model_{TEXT.replace('.', '_')}"
    parts = {f"{name}.lora_down.weight": numbers(RANK, 16), f"{name}.lora_up.weight": numbers(16, RANK)}
    entry = written(
        {
            **parts,
            f"unet.{LINEAR}.lora_A.weight": numbers(1, 16),
            f"unet.{LINEAR}.lora_B.weight": numbers(unet.shape[0], 1),
        }
    )
    made = patched(LoraUse(entry=entry, unet_weight=0.0, text_weight=2.0))
    assert weight(made, LINEAR) is unet
    wanted = text + 2 * numbers(16, RANK) @ numbers(RANK, 16)
    assert close(made.texts[0].encoder.get_submodule(TEXT).weight, wanted)


def test_two_loras_add_up_and_what_neither_touches_is_shared(checkpoint, written, patched):
    pristine = weight(checkpoint, LINEAR)
    down, up = numbers(RANK, pristine.shape[1]), numbers(pristine.shape[0], RANK)
    entry = written({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up})
    made = patched(LoraUse(entry=entry, unet_weight=0.5), LoraUse(entry=entry, unet_weight=0.25))
    assert close(weight(made, LINEAR), pristine + 0.75 * (up @ down))
    assert weight(made, CONV).data_ptr() == weight(checkpoint, CONV).data_ptr()


def test_a_lora_of_another_base_is_an_error_that_names_it(catalog, written, patched):
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    wide = written(
        {f"{name}.lora_down.weight": numbers(1, 768), f"{name}.lora_up.weight": numbers(320, 1)}, "sd15style"
    )
    with pytest.raises(FailedPrecondition, match="sd15style is for sd1, the checkpoint tiny"):
        scan([wide.path.parent]).lora("sd15style", catalog.default())
    with pytest.raises(FailedPrecondition, match="sd15style"):
        patched(LoraUse(entry=wide))
    wide.path.unlink()
    unknown = f"lora_unet_{LINEAR.replace('.', '_').replace('blocks_0', 'blocks_9', 1)}"
    far = written({f"{unknown}.lora_down.weight": numbers(1, 16), f"{unknown}.lora_up.weight": numbers(16, 1)}, "far")
    with pytest.raises(FailedPrecondition, match="far is of another base than tiny"):
        patched(LoraUse(entry=far))


FORMS = {"an OFT of PEFT, which is not supported": "oft_R.weight", "of an unknown form": "what"}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_that_is_not_known_is_refused_by_name(form, tmp_path):
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": numbers(1, 16), f"{name}.{FORMS[form]}": numbers(2, 2)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UnfitFolder, match=f"it is {form}"):
        read_path(tmp_path / "odd.safetensors")
    with pytest.raises(UnusableModel, match=f"odd is {form}"):
        read_lora(unread(tmp_path / "odd.safetensors"))


def unread(path):
    """As if the file had been replaced since the scan."""
    return LoraEntry(id=path.stem, path=path, size_bytes=0, cross_attention_dim=0)


def test_a_layer_without_a_bias_gets_one(checkpoint, written, patched):
    assert checkpoint.unet.get_submodule(LINEAR).bias is None
    entry = written({f"lora_unet_{LINEAR.replace('.', '_')}.diff_b": numbers(16)})
    made = patched(LoraUse(entry=entry, unet_weight=0.5))
    assert close(made.unet.get_submodule(LINEAR).bias, 0.5 * numbers(16))
    assert weight(made, LINEAR) is weight(checkpoint, LINEAR)
    assert checkpoint.unet.get_submodule(LINEAR).bias is None


def test_a_device_that_fails_while_a_lora_is_applied_is_not_the_loras_fault(written, patched, checkpoint, monkeypatch):
    def dead(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    shape = weight(checkpoint, LINEAR).shape
    entry = written({f"lora_unet_{LINEAR.replace('.', '_')}.diff": numbers(*shape)})
    monkeypatch.setattr(patching, "add_delta", dead)
    with pytest.raises(torch.AcceleratorError):
        patched(LoraUse(entry=entry))


@pytest.mark.parametrize("config", ["[1]", '{"unet.lora_alpha": "six"}', '{"unet.alpha_pattern": [1]}', "{"])
def test_metadata_that_is_damaged_is_a_typed_error(config, tmp_path):
    tensors = {f"unet.{LINEAR}.lora_A.weight": numbers(RANK, 16), f"unet.{LINEAR}.lora_B.weight": numbers(16, RANK)}
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": config})
    assert not scan([tmp_path]).entries
    with pytest.raises(UnusableModel, match="LoRA style cannot be loaded: its"):
        read_lora(unread(file))


def test_a_damaged_lora_is_a_typed_error_and_the_next_image_is_generated(catalog, written, patched, asked, manager):
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    entry = written({f"{name}.lora_down.weight": numbers(1, 16), f"{name}.lora_up.weight": numbers(16, 1)})
    entry.path.write_bytes(entry.path.read_bytes()[:-3])
    with pytest.raises(UnusableModel, match="LoRA style"):
        patched(LoraUse(entry=entry))
    assert assemble(manager, asked()).unet is manager.checkpoint(catalog.default()).unet


@pytest.mark.parametrize("layers", [1, 2])
def test_every_layer_of_the_unet_has_its_ldm_name(layers):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from services.diffusion.models.patching import ldm_names

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=layers,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    paths = list(dict.fromkeys(layer_names(unet).values()))
    ends = ("weight", "bias")
    named = [(name, path, end) for path in paths for name in ldm_names(path, layers) for end in ends]
    marks = {f"model.diffusion_model.{name}.{end}": torch.tensor(at) for at, (name, _, end) in enumerate(named)}
    converted = convert_ldm_unet_checkpoint(marks, unet.config)
    for key, mark in converted.items():
        _, path, end = named[int(mark)]
        assert key == f"{path}.{end}"
    assert set(unet.state_dict()) <= set(converted)


def test_after_500_random_loras_the_weights_are_the_same_bits_and_memory_is_flat(catalog, asked, written):
    """In both parts, at random weights, in a memory with room for few of the combinations."""
    tensors = {}
    for name in (f"unet.{LINEAR}", f"text_encoder.text_model.{TEXT}"):
        tensors |= {f"{name}.lora_A.weight": numbers(RANK, 16), f"{name}.lora_B.weight": numbers(16, RANK)}
    entry = written(tensors)
    manager = ModelManager(device="cpu")
    before = digest(manager.checkpoint(catalog.default()))
    limit_bytes = manager.used_bytes + 20_000
    manager = ModelManager(device="cpu", ram_bytes=limit_bytes)
    draw = random.Random(5)
    for _ in range(500):
        strengths = draw.uniform(-2, 2), draw.uniform(-2, 2)
        uses = (LoraUse(entry=entry, unet_weight=strengths[0], text_weight=strengths[1]),)
        assemble(manager, asked(loras=uses, width_px=4, height_px=4))
        assert manager.used_bytes <= limit_bytes
    assert digest(manager.checkpoint(catalog.default())) == before


def digest(checkpoint) -> str:
    out = hashlib.sha256()
    for module in (checkpoint.unet, checkpoint.texts[0].encoder):
        for name, tensor in sorted(module.state_dict().items()):
            out.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
