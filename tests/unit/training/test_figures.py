"""The model card's table comes from the measurements, and says which target is missed."""

import pytest

from training.figures import BEGIN, END, put_into, rows, table


@pytest.fixture
def results() -> dict[str, dict]:
    judged = {"top1": 0.96, "top5": 1.0, "background": 0.98, "style": 0.9}
    kinds = ("held_in_64", "other_subjects", "true_images", "vae_of_true_images", "labels_shuffled")
    deviation = {"mean_deviation": 0.07, "smallest": 0.04, "top1": 0.9}
    return {
        "prompts": dict.fromkeys(kinds, judged),
        "short": {"seed_0": 0.9, "seed_100": 0.9, "seed_200": 0.9},
        "seeds": {"full_prompts": deviation, "names_alone": deviation},
        "control": {"without": 0.3, "with": 0.7, "with_another_object_named": 0.6, "ceiling_vae": 0.9},
        "lora": {"base": 0.2, "half": 0.1, "one": 0.05, "removal_differs_by": 0.0, "kohya_differs_by": 0.0},
        "inversion": {"<mint>": 0.1, "green": 0.4},
        "vae": {"psnr_db": 28.0, "saturation": {"plain": 0.3, "vivid": 0.4}},
        "speed": {"seconds": 1.0, "threads": 2},
    }


def missed(results: dict[str, dict]) -> list[str]:
    return [row.what for row in rows(results) if row.is_met is False]


def test_nothing_is_missed_where_all_targets_are_reached(results):
    assert missed(results) == []
    assert "missed" not in table(results)


@pytest.mark.parametrize(
    ("check", "changed", "what"),
    [
        ("seeds", {"full_prompts": {"mean_deviation": 0.059, "smallest": 0.01, "top1": 0.9}}, "deviation"),
        ("control", {"without": 0.5}, "above what it is without"),
        ("inversion", {"<mint>": 0.5}, "mint"),
        ("lora", {"removal_differs_by": 0.001}, "removal"),
        ("speed", {"seconds": 1.6}, "20 steps"),
    ],
)
def test_a_missed_target_is_called_missed(results, check, changed, what):
    results[check] = {**results[check], **changed}
    [found] = missed(results)
    assert what in found
    assert "missed" in table(results)


def test_only_what_is_between_the_marks_is_replaced(results):
    card = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_into(card, table(results)) == f"before\n{table(results)}\nafter\n"
