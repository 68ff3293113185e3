"""CLIP (Radford et al. 2021) with transformers' names of tensors: text encoder, vision encoder, safety checker.

Written here because importing transformers for these 300 lines takes longer than importing torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}

# The end token's id in old configs, where it means the highest id.
_OLD_END = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """The config of either encoder, with transformers' defaults for the text encoder."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    # The text encoder's.
    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    eos_token_id: int = 49_407
    # The vision encoder's.
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"CLIP has no activation {self.hidden_act}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("CLIP's width is no multiple of its heads")

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """`saved`: a config.json of transformers."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known and value is not None})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextStates:
    """`hidden_states`: the first layer's input and each layer's output, (B, L, C); `last_hidden_state`: normalized."""

    hidden_states: tuple[Tensor, ...]
    last_hidden_state: Tensor
    # (B, P), of the end token; None where the encoder has no projection.
    text_embeds: Tensor | None = None


class ClipText(nn.Module):
    """CLIP's text encoder. `eos_token_id`: of the token that ends a prompt."""

    def __init__(self, config: ClipConfig, *, projects: bool = False) -> None:
        super().__init__()
        self.config = config
        self.eos_token_id = config.eos_token_id
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projects else None

    @classmethod
    def from_config(cls, saved: Mapping[str, Any]) -> Self:
        return cls(ClipConfig.of(saved), projects="CLIPTextModelWithProjection" in saved.get("architectures", ()))

    def forward(self, ids: Tensor) -> TextStates:
        """Token ids (B, L), 0 to vocab_size - 1, to their states (B, L, C)."""
        states = self.encoder(self.embeddings(ids), is_causal=True)
        last = self.final_layer_norm(states[-1])
        if self.text_projection is None:
            return TextStates(hidden_states=states, last_hidden_state=last)
        marks = ids if self.eos_token_id == _OLD_END else (ids == self.eos_token_id).int()
        ends = marks.argmax(dim=-1)
        pooled = last[torch.arange(len(ids), device=last.device), ends]
        return TextStates(hidden_states=states, last_hidden_state=last, text_embeds=self.text_projection(pooled))


class ClipVision(nn.Module):
    """CLIP's vision encoder."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = _PatchEmbeddings(config)
        # OpenAI's typing error, which all files have.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalized to mean 0 and deviation 1, to one vector (B, C) each."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(images)), is_causal=False)
        seen: Tensor = self.post_layernorm(states[-1][:, 0])
        return seen


class _TextEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        words: Tensor = self.token_embedding(ids)
        return words + self.position_embedding.weight[: ids.shape[-1]]


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Encoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, states: Tensor, *, is_causal: bool) -> tuple[Tensor, ...]:
        """(B, L, C) to the states before the first layer and after each."""
        after = [states]
        for layer in self.layers:
            after.append(layer(after[-1], is_causal=is_causal))
        return tuple(after)


class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, *, is_causal: bool) -> Tensor:
        states = states + self.self_attn(self.layer_norm1(states), is_causal=is_causal)
        after: Tensor = states + self.mlp(self.layer_norm2(states))
        return after


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self._heads = config.num_attention_heads
        width = config.hidden_size
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor, *, is_causal: bool) -> Tensor:
        query, key, value = (
            project(states).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self._activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.fc2(self._activation(self.fc1(states)))
        return out


CONCEPTS, SPECIAL_CONCEPTS = 17, 3

# How much a special concept lowers the thresholds.
_ADJUSTMENT = 0.01
_DIGITS = 3


class SafetyNet(nn.Module):
    """Stable Diffusion's safety checker: whether an image is near to what it knows as unsafe.

    As diffusers' StableDiffusionSafetyChecker, from the same files.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.projection_dim
        self.vision_model = ClipVision(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.zeros(CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.zeros(SPECIAL_CONCEPTS, width))
        self.concept_embeds_weights = nn.Parameter(torch.zeros(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.zeros(SPECIAL_CONCEPTS))

    @torch.inference_mode()
    def forward(self, image: Tensor) -> bool:
        """Whether an image (1, 3, H, W), normalized as CLIP takes it, is unsafe."""
        seen = normalize(self.visual_projection(self.vision_model(image)))
        adjustment = 0.0
        for score in _scores(seen, self.special_care_embeds, self.special_care_embeds_weights):
            adjustment = _ADJUSTMENT if round(score + adjustment, _DIGITS) > 0 else adjustment
        scores = _scores(seen, self.concept_embeds, self.concept_embeds_weights)
        return any(round(score + adjustment, _DIGITS) > 0 for score in scores)


def _scores(seen: Tensor, concepts: Tensor, thresholds: Tensor) -> list[float]:
    """How much nearer than its threshold the image (1, P) is to each concept (n, P)."""
    near = (seen @ normalize(concepts).t()).float()[0]
    scores: list[float] = (near - thresholds.float()).tolist()
    return scores
