"""The tensors that a checkpoint in the LDM layout must have, by the configs of its parts. Pure; names only.

As the original implementations name them (CompVis, Stability AI, OpenCLIP).
"""

from collections.abc import Iterable, Iterator, Sequence

from services.diffusion.models.recipes import Config, TextRecipe

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# By the names' beginning, in the order in which they are looked for; `True`: OpenCLIP's names behind it.
TEXT_PREFIXES = {
    "text_encoder": (
        ("cond_stage_model.transformer.", False),
        ("conditioner.embedders.0.transformer.", False),
        ("cond_stage_model.model.", True),
        ("conditioner.embedders.0.model.", True),
    ),
    "text_encoder_2": (
        ("cond_stage_model.model.", True),
        ("conditioner.embedders.1.model.", True),
        ("conditioner.embedders.0.model.", True),
    ),
}
TEXT_MODEL = "text_model."
_NORMS = ("norm1", "norm2", "norm3")


def _pairs(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield f"{name}.weight"
        yield f"{name}.bias"


def unet_names(config: Config) -> Iterator[str]:
    """Without the prefix; for configs of the known families, which have one head of attention for each block."""
    widths, layers = config["block_out_channels"], int(config["layers_per_block"])
    depths = _depths(config)
    yield from _pairs(("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"))
    if config.get("addition_embed_type"):
        yield from _pairs(("label_emb.0.0", "label_emb.0.2"))
    before = widths[0]
    for block, width in enumerate(widths):
        depth = depths[block] if "CrossAttn" in config["down_block_types"][block] else 0
        start = block * (layers + 1)
        for layer in range(layers):
            place = f"input_blocks.{1 + start + layer}"
            yield from _resnet(f"{place}.0", is_skipped=before != width)
            yield from _transformer(f"{place}.1", depth)
            before = width
        if block < len(widths) - 1:
            yield from _pairs((f"input_blocks.{start + layers + 1}.0.op",))
    yield from _resnet("middle_block.0", is_skipped=False)
    yield from _transformer("middle_block.1", depths[-1])
    yield from _resnet("middle_block.2", is_skipped=False)
    for block in range(len(widths)):
        depth = depths[-1 - block] if "CrossAttn" in config["up_block_types"][block] else 0
        start = block * (layers + 1)
        for layer in range(layers + 1):
            yield from _resnet(f"output_blocks.{start + layer}.0", is_skipped=True)
            yield from _transformer(f"output_blocks.{start + layer}.1", depth)
        if block < len(widths) - 1:
            yield from _pairs((f"output_blocks.{start + layers}.{2 if depth else 1}.conv",))


def _depths(config: Config) -> Sequence[int]:
    told = config.get("transformer_layers_per_block", 1)
    return [told] * len(config["block_out_channels"]) if isinstance(told, int) else list(told)


def _resnet(place: str, *, is_skipped: bool) -> Iterator[str]:
    parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    yield from _pairs(f"{place}.{part}" for part in parts)
    if is_skipped:
        yield from _pairs((f"{place}.skip_connection",))


def _transformer(place: str, depth: int) -> Iterator[str]:
    if depth:
        yield from _pairs(f"{place}.{part}" for part in ("norm", "proj_in", "proj_out"))
    for number in range(depth):
        block = f"{place}.transformer_blocks.{number}"
        yield from _pairs(f"{block}.{part}" for part in (*_NORMS, "ff.net.0.proj", "ff.net.2"))
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.to_{each}.weight" for each in "qkv")
            yield from _pairs((f"{block}.{attention}.to_out.0",))


def vae_names(config: Config, *, is_encoder: bool) -> Iterator[str]:
    """Of one half of an AutoencoderKL, without the prefix."""
    half, layers = ("encoder" if is_encoder else "decoder"), int(config["layers_per_block"])
    widths: Sequence[int] = config["block_out_channels"]
    middle = ("mid.block_1", "mid.block_2")
    yield from _pairs(("quant_conv" if is_encoder else "post_quant_conv",))
    yield from _pairs(f"{half}.{part}" for part in ("conv_in", "norm_out", "conv_out"))
    yield from _pairs(f"{half}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out"))
    for place in middle:
        yield from _vae_resnet(f"{half}.{place}", is_skipped=False)
    # The decoder's blocks count from the finest, and are run from the coarsest, one layer more in each.
    order = range(len(widths)) if is_encoder else range(len(widths) - 1, -1, -1)
    kind, scaling, last = ("down", "downsample", len(widths) - 1) if is_encoder else ("up", "upsample", 0)
    before = widths[0] if is_encoder else widths[-1]
    for block in order:
        for layer in range(layers if is_encoder else layers + 1):
            yield from _vae_resnet(f"{half}.{kind}.{block}.block.{layer}", is_skipped=before != widths[block])
            before = widths[block]
        if block != last:
            yield from _pairs((f"{half}.{kind}.{block}.{scaling}.conv",))


def _vae_resnet(place: str, *, is_skipped: bool) -> Iterator[str]:
    yield from _pairs(f"{place}.{part}" for part in ("norm1", "conv1", "norm2", "conv2"))
    if is_skipped:
        yield from _pairs((f"{place}.nin_shortcut",))


def text_names(recipe: TextRecipe, *, is_open_clip: bool) -> Iterator[str]:
    """Without the prefix, and of CLIP's own names without `text_model.`."""
    projects = "CLIPTextModelWithProjection" in recipe.config.get("architectures", ())
    if is_open_clip:
        yield from ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias")
        yield from ("text_projection",) if projects else ()
        for layer in range(recipe.layers):
            block = f"transformer.resblocks.{layer}"
            yield from (f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias")
            yield from _pairs(f"{block}.{part}" for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"))
        return
    yield from ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    yield from ("final_layer_norm.weight", "final_layer_norm.bias")
    yield from ("text_projection.weight",) if projects else ()
    for layer in range(recipe.layers):
        block = f"encoder.layers.{layer}"
        yield from _pairs(f"{block}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        yield from _pairs(f"{block}.{part}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"))
