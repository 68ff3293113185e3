"""Where PEFT or LyCORIS are installed: what they save is applied here as they merge it themselves."""

import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.lora_files import read_lora
from services.diffusion.models.lora_forms import LoraLayer, add_delta
from services.diffusion.models.patching import LoraStrength, patch_loras
from services.diffusion.models.peft_config import CONFIG_NAME

WIDTH = 16


class Block(nn.Module):
    """Layers of every kind that is trained, with names as a UNet's."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(WIDTH, 2 * WIDTH)
        self.conv1 = nn.Conv2d(WIDTH, 2 * WIDTH, 3)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 1)
        self.tokens = nn.Embedding(10, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class Model(nn.Module):
    config: ClassVar = {}

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.eval()


def randomized(model, *, only=lambda name: True):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if only(name):
            parameter.data = torch.randn_like(parameter) * 0.3 + 0.5 * ("magnitude" in name)
    return model


LINEAR, CONV = ["to_q", "to_k"], ["to_q", "to_k", "conv1", "conv2"]
PEFT = {
    "plain": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": CONV}),
    "rank stabilized": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": CONV}),
    "patterns": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": LINEAR,
            "rank_pattern": {r"blocks\.1\.to_.": 2},
            "alpha_pattern": {"to_k": 3, r"^blocks\.0.*": 9, ".*": 5},
            "use_rslora": True,
        },
    ),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": CONV}),
    "its bias": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_k", "conv1"]}),
    "trained biases": ("LoraConfig", {"r": 4, "bias": "lora_only", "target_modules": LINEAR}),
    "all biases": ("LoraConfig", {"r": 4, "bias": "all", "target_modules": LINEAR}),
    "tokens": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ["tokens"]}),
    "whole layers": ("LoraConfig", {"r": 4, "target_modules": ["to_q"], "modules_to_save": ["conv1"]}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 6, "target_modules": CONV}),
    "LoHa in three": (
        "LoHaConfig",
        {"r": 4, "alpha": 6, "target_modules": CONV, "use_effective_conv2d": True, "alpha_pattern": {"conv1": 3}},
    ),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 6, "target_modules": CONV}),
    "LoKr of whole factors": ("LoKrConfig", {"r": 64, "alpha": 6, "target_modules": CONV}),
    "LoKr of four": (
        "LoKrConfig",
        {"r": 2, "alpha": 6, "target_modules": CONV, "decompose_both": True, "use_effective_conv2d": True},
    ),
    "IA3": ("IA3Config", {"target_modules": CONV, "feedforward_modules": ["to_q", "conv2"]}),
}


@pytest.mark.parametrize("spelling", ["saved", "dumped"])
@pytest.mark.parametrize("form", list(PEFT))
def test_what_peft_saves_is_applied_as_peft_merges_it(form, spelling, tmp_path):
    peft = pytest.importorskip("peft")
    kind, options = PEFT[form]
    made = peft.get_peft_model(Model(), getattr(peft, kind)(**options))
    own = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    randomized(made, only=own.__contains__)
    made.save_pretrained(tmp_path)
    # Read again: the file's configuration has the patterns in another order.
    merged = peft.PeftModel.from_pretrained(Model(), tmp_path).eval().merge_and_unload().state_dict()
    file = tmp_path / "adapter_model.safetensors"
    if spelling == "dumped":
        # With the adapter's name, as those save it who do not know of `save_pretrained`.
        file.unlink()
        save_file({n: t.contiguous() for n, t in made.state_dict().items() if n in own}, file)
    assert (tmp_path / CONFIG_NAME).is_file()
    lora = read_lora(LoraEntry(id="x", path=file, size_bytes=0, cross_attention_dim=0))
    patched = patch_loras(Model(), "unet", [LoraStrength(lora=lora, strength=1.0)])
    assert not patched.left_out
    _check(patched.module, merged)


def test_pefts_metadata_of_diffusers_says_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEAR, alpha_pattern={"to_k": 3})
    made = randomized(peft.get_peft_model(Model(), config), only=lambda name: "lora_" in name)
    tensors = {
        f"unet.{name.removeprefix('base_model.model.')}": tensor.contiguous()
        for name, tensor in peft.get_peft_model_state_dict(made).items()
    }
    said = {f"unet.{name}": value for name, value in config.to_dict().items() if not isinstance(value, set)}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(said, default=str)})
    lora = read_lora(LoraEntry(id="x", path=file, size_bytes=0, cross_attention_dim=0))
    patched = patch_loras(Model(), "unet", [LoraStrength(lora=lora, strength=1.0)])
    _check(patched.module, made.merge_and_unload().state_dict())


LYCORIS = {
    "locon": ("LoConModule", {"lora_dim": 4, "alpha": 2}),
    "locon in three": ("LoConModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "locon with lengths": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "locon with lengths of outputs": ("LoConModule", {"lora_dim": 4, "weight_decompose": True, "wd_on_out": True}),
    "rank stabilized": ("LoConModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "loha": ("LohaModule", {"lora_dim": 4, "alpha": 2}),
    "loha in three": ("LohaModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "lokr": ("LokrModule", {"lora_dim": 2, "alpha": 1}),
    "lokr in three": ("LokrModule", {"lora_dim": 2, "alpha": 1, "use_tucker": True, "decompose_both": True}),
    "lokr of whole factors": ("LokrModule", {"lora_dim": 100, "alpha": 1}),
    "full": ("FullModule", {}),
    "glora": ("GLoRAModule", {"lora_dim": 4, "alpha": 2}),
    "ia3": ("IA3Module", {}),
    "ia3 on inputs": ("IA3Module", {"train_on_input": True}),
    "oft": ("DiagOFTModule", {"lora_dim": 4}),
    "oft with a constraint": ("DiagOFTModule", {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
    "boft": ("ButterflyOFTModule", {"lora_dim": 4}),
    "boft with a constraint": ("ButterflyOFTModule", {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
}


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("form", list(LYCORIS))
def test_what_lycoris_makes_is_added_as_lycoris_adds_it(form, layer):
    modules = pytest.importorskip("lycoris.modules")
    kind, options = LYCORIS[form]
    of = next(each for each in modules.MODULE_LIST if each.__name__ == kind)
    torch.manual_seed(2)
    own = nn.Linear(WIDTH, 2 * WIDTH) if layer == "linear" else nn.Conv2d(WIDTH, 2 * WIDTH, 3)
    made = of("x", own, **options)
    weight, x = own.weight.detach().clone(), torch.randn(1, WIDTH, *(() if layer == "linear" else (5, 5)))
    made.apply_to()
    randomized(made, only=lambda name: "org_" not in name)
    tensors = {name: tensor.detach() for name, tensor in (made.custom_state_dict() or made.state_dict()).items()}
    read, total = LoraLayer(name="x", tensors=_by_what(tensors)), weight.clone()
    add_delta(total, weight, read, 1.0)
    assert (total - weight).abs().max() > 1e-3
    bias = made.bias if form == "full" else own.bias
    apply = nn.functional.linear if layer == "linear" else nn.functional.conv2d
    assert torch.allclose(apply(x, total, bias), made(x), atol=1e-4)


def _by_what(tensors):
    from services.diffusion.models.lora_names import lora_names

    names = {f"lora_unet_x.{name}": tensor for name, tensor in tensors.items()}
    return {meant.what: names[name] for name, meant in lora_names(names).items()}


def _check(module, merged):
    own = dict(module.named_parameters())
    assert set(merged) <= set(own)
    for name, tensor in merged.items():
        assert torch.allclose(own[name], tensor, atol=1e-5), name
    changed = [name for name, tensor in Model().state_dict().items() if not torch.equal(tensor, own[name])]
    assert changed
