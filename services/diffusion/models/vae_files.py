"""VAEs of other families, told from the names and shapes of their tensors. Reads nothing, loads no torch.

They have the layers of Stable Diffusion's, and would be listed as VAEs that fit no checkpoint.
"""

from collections.abc import Mapping

from services.diffusion.models.recipes import UnfitFolder

# Of Flux, Stable Diffusion 3 and what uses their latents.
_CHANNELS = 16
_FIRST_LAYERS = ("decoder.conv_in.weight", "decoder.layers.0.weight")
# Between the latents and the decoder, which Flux's and Stable Diffusion 3's have not.
_QUANT = "post_quant_conv.weight"
_CODEBOOK = "quantize.embedding.weight"
# Of a layer for images: out, in, height and width.
_DIMENSIONS = 4


def refuse_other_vae(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UnfitFolder for a VAE that no checkpoint here could use. `shapes`: by tensor's name."""
    first = next((shape for name, shape in shapes.items() if name.endswith(_FIRST_LAYERS)), ())
    if len(first) > _DIMENSIONS:
        raise UnfitFolder("it is a VAE of videos, which is not supported")
    if any(name.endswith(_CODEBOOK) for name in shapes):
        raise UnfitFolder("it is a VQGAN, a VAE with a codebook, which is not supported")
    has_quant = any(name.endswith(_QUANT) for name in shapes)
    if len(first) == _DIMENSIONS and first[1] == _CHANNELS and not has_quant:
        raise UnfitFolder("it is a VAE of Flux, Stable Diffusion 3 or newer, which are not supported")
