"""diffusers' model classes. The classes are diffusers' own; how they come without the rest of it says `lean`."""

import logging

from services.diffusion.lean import ROOT, lean_module

# Of configs that were written for a newer class of the same kind, it warns of what it leaves out.
logging.getLogger(f"{ROOT}.configuration_utils").setLevel(logging.ERROR)

AutoencoderKL = lean_module("models.autoencoders.autoencoder_kl").AutoencoderKL
AutoencoderTiny = lean_module("models.autoencoders.autoencoder_tiny").AutoencoderTiny
ControlNetModel = lean_module("models.controlnets.controlnet").ControlNetModel
UNet2DConditionModel = lean_module("models.unets.unet_2d_condition").UNet2DConditionModel
