"""What each form adds, in numbers worked out by hand or by another way than the code's; no library is needed for them.

Sources: kohya-ss/sd-scripts networks/oft.py, KohakuBlueleaf/LyCORIS lycoris/modules, huggingface/peft.
"""

import pytest
import torch

from services.diffusion.models.lora_forms import LoraLayer, add_bias, add_delta
from services.diffusion.models.peft_config import PeftScale


def delta(weight, *, strength=1.0, peft=None, **tensors):
    total = weight.clone()
    add_delta(total, weight, LoraLayer(name="x", tensors=tensors, peft=peft), strength)
    return total - weight


def numbers(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * 0.3


def close(one, other):
    return torch.allclose(one, torch.as_tensor(other), atol=1e-5)


ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
QUARTER_TURN = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])


def test_oft_turns_the_rows_of_a_block():
    """Q = B - B^T = [[0, 1], [-1, 0]]; (I + Q)(I - Q)^-1 = Q: a quarter turn. Its transpose is applied to the rows."""
    assert close(delta(ROWS, oft_blocks=QUARTER_TURN[None]), torch.tensor([[-3.0, -4.0], [1.0, 2.0]]) - ROWS)


def test_a_constraint_shortens_what_turns():
    """|Q| = sqrt(2); alpha 0.25 of 2 outputs is 0.5, so Q is 0.5 / sqrt(2) = t as long: tan of half the angle."""
    t = 0.5 / 2**0.5
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    turned = torch.tensor([[cos, -sin], [sin, cos]]) @ ROWS
    assert close(delta(ROWS, oft_blocks=QUARTER_TURN[None], alpha=torch.tensor(0.25)), turned - ROWS)
    whole = delta(ROWS, oft_blocks=QUARTER_TURN[None])
    assert close(delta(ROWS, oft_blocks=QUARTER_TURN[None], alpha=torch.tensor(0.0)), whole)


def test_oft_of_old_lycoris_stores_the_rotations_and_rescales_rows():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    rescale = torch.tensor([[2.0], [1.0]])
    wanted = torch.tensor([[-6.0, -8.0], [1.0, 2.0]])
    assert close(delta(ROWS, oft_rotations=turn[None], rescale=rescale), wanted - ROWS)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 3, 3)])
def test_boft_turns_neighbors_and_then_farther_rows(shape):
    """Two ways of 4 blocks of 2 rows: first rows 0 1, 2 3, ...; then those 2 apart in groups of 4: 0 2, 1 3, ..."""
    weight, blocks = numbers(*shape), numbers(2, 4, 2, 2)
    skew = blocks - blocks.transpose(-1, -2)
    rotations = torch.linalg.solve(torch.eye(2) - skew, torch.eye(2) + skew)
    rows = weight.flatten(1)
    for way, pairs in enumerate([[(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3), (4, 6), (5, 7)]]):
        turned = torch.zeros_like(rows)
        for block, pair in enumerate(pairs):
            turned[list(pair)] = rotations[way, block] @ rows[list(pair)]
        rows = turned
    assert close(delta(weight, oft_blocks=blocks), rows.reshape(shape) - weight)


def test_glora_multiplies_and_adds():
    weight, a1, a2, b1, b2 = numbers(6, 4), numbers(4, 2), numbers(2, 4), numbers(6, 2), numbers(2, 4)
    wanted = (weight @ a1 @ a2 + b1 @ b2) * 3 / 2
    pieces = {"glora_a1": a1, "glora_a2": a2, "glora_b1": b1, "glora_b2": b2, "alpha": torch.tensor(3.0)}
    assert close(delta(weight, **pieces), wanted)
    # Before LyCORIS 2.0 a1 and b1 were the smaller ones.
    old = {"glora_a1": a2, "glora_a2": a1, "glora_b1": b2, "glora_b2": b1, "alpha": torch.tensor(3.0)}
    assert close(delta(weight, **old), wanted)
    square = numbers(4, 4)
    pieces |= {"glora_b1": numbers(4, 2)}
    assert close(delta(square, **pieces), (square @ a1 @ a2 + numbers(4, 2) @ b2) * 3 / 2)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 3, 3)])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_scales_rows_or_columns(shape, on_input):
    weight = numbers(*shape)
    vector = torch.tensor([0.5, -1.0]) if on_input else torch.tensor([0.5, -1.0, 2.0])
    axes = [1] * len(shape)
    axes[1 if on_input else 0] = -1
    stored = vector if len(shape) == 2 else vector.view(1, -1, 1, 1)
    pieces = {"whole_weight": stored, "on_input": torch.tensor(on_input)}
    assert close(delta(weight, **pieces, strength=0.5), 0.5 * weight * vector.view(axes))
    if len(shape) == 2:
        pefts = (vector + 1).view(1, -1) if on_input else (vector + 1).view(-1, 1)
        assert close(delta(weight, ia3_scale=pefts), weight * vector.view(axes))


def test_ia3_of_peft_scales_the_bias_too_unless_it_is_for_inputs():
    bias, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0], [1.0], [0.0]])
    total = bias.clone()
    add_bias(total, bias, LoraLayer(name="x", tensors={"ia3_scale": scale}), 1.0)
    assert total.tolist() == [2.0, 2.0, 0.0]
    add_bias(total, bias, LoraLayer(name="x", tensors={"ia3_scale": torch.ones(1, 2)}), 1.0)
    assert total.tolist() == [2.0, 2.0, 0.0]


def test_a_trained_bias_takes_the_place_of_the_models_and_a_loras_own_is_scaled():
    bias = torch.tensor([1.0, 2.0])
    total = bias.clone()
    add_bias(total, bias, LoraLayer(name="x", tensors={"whole_bias": torch.tensor([3.0, 3.0])}), 0.5)
    assert total.tolist() == [2.0, 2.5]
    scale = PeftScale(alpha=8, rank=4, is_rank_stabilized=True)
    tensors = {"down": torch.zeros(4, 2), "up": torch.zeros(2, 4), "up_bias": torch.tensor([1.0, -1.0])}
    total = bias.clone()
    add_bias(total, bias, LoraLayer(name="x", tensors=tensors, peft=scale), 1.0)
    assert total.tolist() == [5.0, -2.0]


DOWN, UP = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
PRODUCT = torch.tensor([[1.0, 2.0], [3.0, 6.0]])


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 1.0),
        ({"alpha": torch.tensor(0.5)}, 0.5),
        ({"alpha": torch.tensor([0.5])}, 0.5),
        ({"alpha": torch.tensor(0.5).half()}, 0.5),
        ({"alpha": torch.tensor(2)}, 2.0),
        # As A1111, ComfyUI and diffusers have it.
        ({"alpha": torch.tensor(0.0)}, 0.0),
        # A1111 takes a scale before an alpha; LyCORIS' scalar multiplies.
        ({"alpha": torch.tensor(0.5), "scale": torch.tensor(3.0)}, 3.0),
        ({"scalar": torch.tensor(0.25)}, 0.25),
    ],
)
def test_alpha_may_come_in_any_shape_and_type(more, factor):
    assert close(delta(ROWS, down=DOWN, up=UP, **more), factor * PRODUCT)


def test_pefts_scale_counts_where_there_is_no_alpha():
    scale = PeftScale(alpha=3, rank=1)
    assert close(delta(ROWS, down=DOWN, up=UP, peft=scale), 3 * PRODUCT)
    assert close(delta(ROWS, down=DOWN, up=UP, alpha=torch.tensor(2.0), peft=scale), 2 * PRODUCT)


def test_a_rank_of_0_and_one_above_the_weights_are_sound():
    assert close(delta(ROWS, down=torch.zeros(0, 2), up=torch.zeros(2, 0), alpha=torch.tensor(4.0)), torch.zeros(2, 2))
    down, up = numbers(300, 2), numbers(2, 300)
    assert close(delta(ROWS, down=down, up=up), up @ down)


def test_pefts_lengths_are_of_rows_and_lycoris_of_columns_also_where_their_shapes_are_alike():
    weight, lengths = numbers(4, 4, 3, 3), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    pieces = {"down": numbers(2, 4, 3, 3), "up": numbers(4, 2, 1, 1)}
    merged = weight + torch.einsum("or,rikl->oikl", pieces["up"][:, :, 0, 0], pieces["down"])
    rows = merged / merged.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * lengths.view(-1, 1, 1, 1)
    assert close(delta(weight, **pieces, row_magnitude=lengths), rows - weight)
    columns = merged / merged.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, 1, 1) * lengths
    assert close(delta(weight, **pieces, magnitude=lengths), columns - weight)


def test_a_first_layer_for_four_channels_fits_one_of_nine():
    """An inpainting UNet's latents come first; mask and masked image are left as they are (A1111's networks.py)."""
    weight, down, up = numbers(6, 9, 3, 3), numbers(2, 4, 3, 3), numbers(6, 2, 1, 1)
    added = delta(weight, down=down, up=up, alpha=torch.tensor(1.0))
    assert close(added[:, :4], torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) / 2)
    assert not added[:, 4:].any()
    assert not delta(weight, diff=numbers(6, 4, 3, 3))[:, 4:].any()


BIG = torch.zeros(2_000, 2_000)
UNFIT = {
    "down without up": {"down": DOWN},
    "up without down": {"up": UP},
    "half a loha": {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP},
    "half a lokr": {"lokr_w1": DOWN},
    "lokr of half a factor": {"lokr_w1": DOWN, "lokr_w2_a": UP},
    "half a glora": {"glora_a1": UP, "glora_a2": DOWN},
    "only a rescale": {"rescale": UP},
    "two forms": {"down": DOWN, "up": UP, "diff": ROWS},
    "other outputs": {"down": DOWN, "up": torch.ones(3, 1)},
    "other inputs": {"down": torch.ones(1, 3), "up": UP},
    "other ranks": {"down": torch.ones(3, 2), "up": UP},
    "transposed": {"down": torch.ones(1, 4), "up": torch.ones(1, 1)},
    "no dimensions": {"down": torch.tensor(1.0), "up": torch.tensor(1.0)},
    "a difference of another shape": {"diff": torch.ones(3, 2)},
    "alphas": {"down": DOWN, "up": UP, "alpha": torch.ones(2)},
    "an alpha that is NaN": {"down": DOWN, "up": UP, "alpha": torch.tensor(float("nan"))},
    "blocks of another size": {"oft_blocks": torch.zeros(2, 2, 2)},
    "blocks that are not square": {"oft_blocks": torch.zeros(2, 1, 2)},
    "a butterfly of another size": {"oft_blocks": torch.zeros(3, 1, 2, 2)},
    "a vector of another size": {"ia3_scale": torch.ones(3, 1)},
    "lengths of another number": {"down": DOWN, "up": UP, "magnitude": torch.ones(1, 3)},
    # A small file that asks for terabytes.
    "a product without end": {"lokr_w1": BIG, "lokr_w2": BIG},
    "a loha without end": {
        "hada_w1_a": torch.zeros(10**6, 1),
        "hada_w1_b": torch.zeros(1, 10**6),
        "hada_w2_a": torch.zeros(10**6, 1),
        "hada_w2_b": torch.zeros(1, 10**6),
    },
    "a lora without end": {"down": torch.zeros(1, 10**6), "up": torch.zeros(10**6, 1)},
}


@pytest.mark.parametrize("what", list(UNFIT))
def test_what_does_not_fit_adds_nothing(what):
    total = ROWS.clone()
    with pytest.raises((ValueError, RuntimeError, LookupError)):
        add_delta(total, ROWS, LoraLayer(name="x", tensors=UNFIT[what]), 1.0)
    assert torch.equal(total, ROWS)
