"""docs/annotators.md says of each network whether it met real weights; this keeps it true."""

from pathlib import Path

from services.preprocessor.registry import NEURAL
from tests.fakes.annotator_weights import IN_PACKAGES, LOOKED_AT, WRITERS
from tests.golden.annotator_maps import ANNOTATORS

DOCS = Path(__file__).parents[3] / "docs" / "annotators.md"
RANDOM = "| random weights only | no |"


def rows() -> list[str]:
    """A line for each network, in the order of the annotators."""
    users: dict[str, list[str]] = {}
    for annotator in NEURAL:
        for network in annotator.models:
            users.setdefault(network.name, []).append(f"`{annotator.id}`")
    return [f"| `{name}` | {', '.join(ids)} {proof(name)}" for name, ids in users.items()]


def proof(network: str) -> str:
    if network not in WRITERS:
        return "| none: only its smaller sibling was run | no |"
    if network in IN_PACKAGES:
        return "| real weights, out of a package | yes |"
    return "| real weights where they are given, else random ones | yes |" if network in LOOKED_AT else RANDOM


def test_the_documentation_lists_what_each_network_was_run_with():
    text = DOCS.read_text()
    table = text[text.index("| network | annotators |") :].split("\n\n")[0].splitlines()[2:]
    assert table == rows()


def test_networks_called_real_are_written_from_a_package_and_others_are_not():
    real = {name for name, write in WRITERS.items() if getattr(write, "__name__", "").startswith("real_")}
    assert real == set(IN_PACKAGES)


def test_each_annotator_with_a_reviewed_map_has_a_real_network():
    networks = {each.id: {model.name for model in each.models} for each in NEURAL}
    assert all(networks[annotator_id] & set(IN_PACKAGES) for annotator_id in ANNOTATORS)


def test_each_network_looked_at_has_assertions_about_its_maps():
    tests = (Path(__file__).parents[2] / "annotators" / "test_given_weights.py").read_text()
    assert all(f'@needs("{network}")' in tests for network in LOOKED_AT)
