"""Of a LoRA that fits in part, what fits is applied and the rest is told; one rule for layers and for parts."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.diffusion.v1.diffusion_pb2 import LoraUse as AskedLora
from services.diffusion.engine.backend import assemble
from services.diffusion.models.entries import LoraUse
from services.diffusion.models.faults import UnusableModel
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.patching import LoraStrength, patch_loras
from services.diffusion.models.scan import read_path, scan
from services.diffusion.parse.parser import Parser
from services.diffusion.wire import models_to_proto
from services.kernel.images import ImageLimits
from tests.unit.diffusion.conftest import ABILITIES

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
QUERY = KEY.replace("attn2.to_k", "attn1.to_q")
TEXT = "encoder.layers.0.self_attn.q_proj"


def numbers(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * 0.1


def layer(name, rows, columns, rank=2):
    return {f"{name}.lora_down.weight": numbers(rank, columns), f"{name}.lora_up.weight": numbers(rows, rank)}


def unet(path, rows=16, columns=16):
    return layer(f"lora_unet_{path.replace('.', '_')}", rows, columns)


def text(part, width):
    return layer(f"lora_{part}_text_model_{TEXT.replace('.', '_')}", width, width)


@pytest.fixture
def written(tmp_path):
    def write(tensors, name="style", metadata=None):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata)
        return read_path(tmp_path / f"{name}.safetensors")

    return write


@pytest.fixture
def made(manager, asked):
    def make(entry, **weights):
        return assemble(manager, asked(loras=(LoraUse(entry=entry, **weights),)))

    return make


def changed(one, other):
    own = dict(one.named_parameters())
    return sorted(name for name, tensor in other.named_parameters() if not torch.equal(own[name], tensor))


LACKING = {
    "a layer that the model lacks": unet(KEY.replace("blocks.0", "blocks.9", 1)),
    "a layer of another shape": unet(QUERY, rows=24),
    "a layer without its other half": {f"unet.{QUERY}.lora_A.weight": numbers(2, 16)},
    "a part that the model lacks": text("te2", 24),
}


@pytest.mark.parametrize("what", list(LACKING))
def test_what_fits_is_applied_and_the_rest_is_told(what, manager, catalog, written, made):
    pristine = manager.checkpoint(catalog.default())
    for _ in range(2):
        # The second time the patched module is in memory.
        image = made(written({**unet(KEY), **text("te", 16), **LACKING[what]}))
        assert changed(image.unet, pristine.unet) == [f"{KEY}.weight"]
        assert changed(image.texts[0].encoder, pristine.texts[0].encoder) == [f"{TEXT}.weight"]
        [told] = image.warnings
        assert re.match(
            r"LoRA style was applied without 1 of its 3 layers, for which tiny has no place, such as \w", told
        )


def test_what_is_not_asked_for_is_not_told(written, made):
    entry = written({**unet(KEY), **text("te2", 24)})
    assert not made(entry, text_weight=0.0).warnings
    assert made(written(unet(KEY))).warnings == ()


@pytest.mark.parametrize("weights", [{}, {"unet_weight": 0.0}, {"text_weight": 0.0}])
def test_a_lora_of_which_nothing_fits_is_an_error(weights, written, made):
    entry = written({**unet(KEY.replace("blocks.0", "blocks.9", 1)), **text("te2", 24)})
    with pytest.raises(
        UnusableModel, match=r"style is of another base than tiny: none of its \d layers fits"
    ) as caught:
        made(entry, **weights)
    assert caught.value.part == "lora:style"


def test_one_lora_that_does_not_fit_leaves_the_other_as_it_is(manager, catalog, asked, written):
    pristine = manager.checkpoint(catalog.default()).unet.get_submodule(KEY).weight
    good, half = written(unet(KEY), "good"), written({**unet(KEY, rows=24), **unet(QUERY)}, "half")
    image = assemble(manager, asked(loras=(LoraUse(entry=half), LoraUse(entry=good))))
    assert torch.allclose(image.unet.get_submodule(KEY).weight, pristine + numbers(16, 2) @ numbers(2, 16), atol=1e-6)
    assert [told.partition(" was")[0] for told in image.warnings] == ["LoRA half"]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    from tests.fakes.families import make_tiny_sdxl

    return scan([make_tiny_sdxl(tmp_path_factory.mktemp("families") / "xl")])


def test_both_text_encoders_of_sdxl_have_their_own_layers(families, written):
    checkpoint, manager = families.default(), ModelManager(device="cpu")
    pristine = manager.checkpoint(checkpoint)
    entry = written({**text("te1", 16), **text("te2", 24)})
    assert entry.cross_attention_dim == checkpoint.shape.cross_attention_dim
    image = manager.checkpoint(checkpoint, loras=[LoraUse(entry=entry)])
    for own, other in zip(image.texts, pristine.texts, strict=True):
        assert changed(own.encoder, other.encoder) == [f"{TEXT}.weight"]
    assert image.warnings == ()
    half = written({f"text_encoder_2.text_model.{TEXT}.lora_A.weight": numbers(2, 24)}, "half")
    assert half.cross_attention_dim == 0


@pytest.mark.parametrize(
    ("tensors", "metadata", "width"),
    [
        (unet(KEY, columns=768), {}, 768),
        (unet(KEY.replace("to_k", "to_v"), columns=2048), {}, 2048),
        ({f"diffusion_model.{KEY}.lora_A.default.weight": numbers(2, 768)}, {}, 768),
        ({f"lora_unet_{KEY.replace('.', '_')}.diff": numbers(16, 32)}, {}, 32),
        (
            {
                f"lora_unet_{KEY.replace('.', '_')}.{name}": numbers(*shape)
                for name, shape in {"lokr_w1": (4, 8), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 96)}.items()
            },
            {},
            768,
        ),
        (unet(QUERY), {}, 0),
        (unet(QUERY), {"ss_base_model_version": "sdxl_base_v1-0"}, 2048),
        (unet(QUERY), {"modelspec.architecture": "stable-diffusion-v1/lora"}, 768),
        (text("te", 768), {}, 768),
        (text("te1", 768), {}, 0),
        (text("te1", 768), {"ss_base_model_version": "sdxl_base_v1-0"}, 2048),
        ({**text("te1", 768), **text("te2", 1280)}, {}, 2048),
        ({f"text_encoder.text_model.{TEXT}.lora_linear_layer.down.weight": numbers(2, 768)}, {}, 0),
    ],
)
def test_the_base_of_a_lora_is_told_from_what_it_has(tensors, metadata, width, written):
    assert written(tensors, metadata=metadata or None).cross_attention_dim == width


def test_a_locon_for_ordinary_checkpoints_fits_one_for_inpainting(written):
    torch.manual_seed(0)
    nine = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    first = {"lora_unet_conv_in.lora_down.weight": numbers(2, 4, 3, 3)}
    first["lora_unet_conv_in.lora_up.weight"] = numbers(16, 2, 1, 1)
    lora = read_lora(written({**first, **unet(KEY)}))
    patched = patch_loras(nine, "unet", [LoraStrength(lora=lora, strength=1.0)])
    assert not patched.left_out
    assert changed(patched.module, nine) == ["conv_in.weight", f"{KEY}.weight"]
    assert torch.equal(patched.module.conv_in.weight[:, 4:], nine.conv_in.weight[:, 4:])


@pytest.fixture
def parsed(models, tmp_path):
    """The Generation of a request, with the LoRAs in the test's folder."""

    def parse(**fields):
        catalog = scan([models, tmp_path])
        parser = Parser(catalog=catalog, abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 1)
        return parser.parse(GenerateRequest(**fields))

    return parse


def test_the_name_that_a_trainer_wrote_is_another_name_of_the_lora(parsed, written, tmp_path):
    entry = written(unet(KEY), "epoch-000012", {"ss_output_name": "my_style"})
    assert entry.aliases == ("my_style",)
    assert parsed(prompt="a cat <lora:My_Style:0.5>").loras == (LoraUse(entry=entry, unet_weight=0.5, text_weight=0.5),)
    assert [model.aliases for model in models_to_proto(scan([tmp_path]))] == [["epoch-000012", "my_style"]]
    for odd in ("a:b", "a>b", "*", "", "x" * 101, "a\nb", "style"):
        assert written(unet(KEY), "style", {"ss_output_name": odd}).aliases == ()


BUNDLES = {
    "A1111's": {"bundle_emb.blob.string_to_param.*": numbers(3, 16)},
    "OneTrainer's": {"bundle_emb.blob.emb_params": numbers(3, 16)},
    "one vector": {"bundle_emb.blob.emb_params": numbers(16)},
}


@pytest.mark.parametrize("form", list(BUNDLES))
def test_vectors_that_a_lora_brings_along_stand_for_their_word(form, parsed, written, manager):
    written({**unet(KEY), **BUNDLES[form]})
    used = parsed(prompt="a Blob cat <lora:style:1>", seed=1)
    [embedding] = used.embeddings
    [vectors] = BUNDLES[form].values()
    assert (embedding.bundled_in, embedding.widths, embedding.vectors) == ("style", (16,), vectors.numel() // 16)
    rows = assemble(manager, used).texts[0].encoder.embeddings.token_embedding.rows
    assert torch.allclose(rows, vectors.reshape(-1, 16))
    assert not parsed(prompt="a blob cat").embeddings
    assert not parsed(prompt="a cat <lora:style:1>").embeddings
    assert not parsed(prompt="a blob cat <lora:style:0>").embeddings
    assert parsed(prompt="a cat", negative_prompt="blob", loras=[AskedLora(model="style")]).embeddings == (embedding,)


def test_the_effective_request_names_the_lora_and_not_what_it_brings_along(parsed, written):
    from services.diffusion.parse.parser import effective_to_proto

    written({**unet(KEY), **BUNDLES["A1111's"]})
    first = parsed(prompt="a blob cat <lora:style:0.5>", seed=1)
    effective = effective_to_proto(first)
    assert not effective.embeddings
    assert parsed(**{field.name: value for field, value in effective.ListFields()}).embeddings == first.embeddings


def test_vectors_for_another_base_are_told_of_where_the_prompt_has_their_word(parsed, written):
    written({**unet(KEY), "bundle_emb.blob.emb_params": numbers(3, 768)})
    told = parsed(prompt="a blob <lora:style:1>").warnings
    assert told == (
        "LoRA style brings the textual inversion blob along, which is for another base than tiny: it was not used",
    )
    assert not parsed(prompt="a cat <lora:style:1>").warnings


def test_vectors_that_a_lora_brings_along_come_before_others_of_that_name(parsed, written, tmp_path):
    (tmp_path / "embeddings").mkdir()
    save_file({"emb_params": numbers(1, 16)}, tmp_path / "embeddings" / "blob.safetensors")
    written({**unet(KEY), **BUNDLES["A1111's"]})
    assert [each.bundled_in for each in parsed(prompt="a blob <lora:style:1>").embeddings] == ["style"]
    assert [each.bundled_in for each in parsed(prompt="a blob").embeddings] == [""]


@pytest.mark.parametrize(
    "odd",
    [
        {"bundle_emb.blob.a": numbers(2, 16), "bundle_emb.blob.b": numbers(2, 16)},
        {"bundle_emb.blob.emb_params": numbers(2, 2, 16)},
        {"bundle_emb..emb_params": numbers(2, 16)},
        {f"bundle_emb.blob{at}.emb_params": numbers(1, 16) for at in range(101)},
    ],
)
def test_a_lora_with_odd_vectors_is_left_out(odd, tmp_path):
    save_file({**unet(KEY), **odd}, tmp_path / "style.safetensors")
    assert not scan([tmp_path]).entries


def test_vectors_that_are_not_finite_are_told_as_the_loras(parsed, written, manager):
    written({**unet(KEY), "bundle_emb.blob.emb_params": torch.full((1, 16), float("nan"))})
    with pytest.raises(UnusableModel, match="textual inversion blob in LoRA style"):
        assemble(manager, parsed(prompt="a blob <lora:style:1>"))


def test_a_configuration_beside_a_lora_counts_when_it_is_applied(tmp_path, manager, catalog, asked):
    tensors = {f"base_model.model.{KEY}.lora_A.weight": numbers(4, 16)}
    tensors[f"base_model.model.{KEY}.lora_B.weight"] = numbers(16, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    entry = read_path(tmp_path / "adapter_model.safetensors")
    image = assemble(manager, asked(loras=(LoraUse(entry=entry),)))
    pristine = manager.checkpoint(catalog.default()).unet.get_submodule(KEY).weight
    wanted = pristine + 3 * numbers(16, 4) @ numbers(4, 16)
    assert torch.allclose(image.unet.get_submodule(KEY).weight, wanted, atol=1e-6)
