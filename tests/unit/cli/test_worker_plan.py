"""How many workers of each stage `fanlight up` runs."""

import pytest

from fanlight.errors import InvalidInput
from fanlight.machine import Machine
from fanlight.worker_plan import ProcessCount, Warm, choose, environ_of_further, environ_of_one, parse_workers

MB, GB = 10**6, 10**9
STARTER = Warm(cores=1.0, memory_bytes=250 * MB)


def machine(cores: float, *, available_bytes: int = 256 * GB) -> Machine:
    return Machine(cores=cores, memory_bytes=512 * GB, available_bytes=available_bytes)


@pytest.mark.parametrize(("cores", "count"), [(0.5, 1), (1, 1), (1.5, 1), (2, 2), (8, 8), (64, 64), (128, 64)])
def test_work_of_one_core_gets_a_worker_for_each_core(cores, count):
    assert choose("diffusion", STARTER, machine(cores)).count == count


@pytest.mark.parametrize(
    ("used", "cores", "count"), [(0.6, 2, 2), (1.2, 2, 2), (1.4, 2, 1), (1.9, 2, 1), (4.1, 16, 4), (7.8, 8, 1)]
)
def test_work_that_uses_several_cores_gets_fewer(used, cores, count):
    assert choose("diffusion", Warm(cores=used, memory_bytes=MB), machine(cores)).count == count


def test_memory_for_no_more_is_said():
    choice = choose("diffusion", Warm(cores=1.0, memory_bytes=2 * GB), machine(64, available_bytes=9 * GB))

    assert choice == ProcessCount(3, "memory for no more, at 2,000 MB each")


def test_a_machine_without_memory_has_one_worker():
    assert choose("diffusion", STARTER, machine(64, available_bytes=0)).count == 1


def test_a_worker_that_measured_no_memory_is_not_taken_for_free():
    choice = choose("diffusion", Warm(cores=1.0, memory_bytes=0), machine(64, available_bytes=GB))

    assert choice.count == 4


@pytest.mark.parametrize(("cards", "count"), [(1, 1), (2, 2)])
def test_a_card_has_one_worker(cards, count):
    assert choose("diffusion", Warm(cores=1.0, memory_bytes=MB, cards=cards), machine(64)) == ProcessCount(
        count, "one a card"
    )


@pytest.mark.parametrize(("cores", "count"), [(0.5, 1), (2, 1), (4, 1), (8, 2), (64, 2)])
def test_preprocessors_are_few(cores, count):
    assert choose("preprocessor", Warm(cores=1.0, memory_bytes=MB), machine(cores)).count == count


def test_counts_are_by_stage_and_what_is_not_named_is_found_out():
    counts = parse_workers(" diffusion=3, preprocess=auto ")

    assert (counts.at_start("diffusion"), counts.is_auto("diffusion")) == (3, False)
    assert (counts.at_start("preprocessor"), counts.is_auto("preprocessor")) == (1, True)
    assert parse_workers("").is_auto("diffusion")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "'2' must be STAGE=COUNT, with a stage of diffusion, preprocess"),
        ("painting=2", "'painting=2' must be STAGE=COUNT"),
        ("diffusion=0", "diffusion must be auto or 1 to 64, not '0'"),
        ("diffusion=65", "diffusion must be auto or 1 to 64, not '65'"),
        ("diffusion=-1", "not '-1'"),
        ("diffusion=²", "not '²'"),
        ("diffusion=1,diffusion=2", "diffusion is there twice"),
    ],
)
def test_a_wrong_count_is_named(text, message):
    with pytest.raises(InvalidInput, match="--workers: ") as raised:
        parse_workers(text)
    assert message in raised.value.message


@pytest.mark.parametrize("text", ["cores=1", "cores=x memory_bytes=1 cards=0", "memory_bytes=1.5 cores=1 cards=0"])
def test_a_line_that_says_too_little_is_no_measurement(text):
    assert Warm.parse(dict(pair.split("=") for pair in text.split())) is None


def test_the_first_worker_measures_only_where_that_decides():
    def of(count, **how):
        return environ_of_one("diffusion", count, machine=machine(4), environ={}, **how)

    assert of(1, is_auto=True) == {"FANLIGHT_WORKER_MEASURE": "true"}
    assert of(1, is_auto=False) == {}


def test_several_workers_share_memory_and_cores_unless_a_setting_says_otherwise():
    here = machine(4, available_bytes=8 * GB)
    own = {"FANLIGHT_DIFFUSION_RAM_BYTES": "1"}

    shares = environ_of_one("diffusion", 2, is_auto=False, machine=here, environ={})

    assert shares == {"FANLIGHT_DIFFUSION_RAM_BYTES": str(2 * GB), "OMP_NUM_THREADS": "2"}
    assert environ_of_further("diffusion", 2, ProcessCount(2, ""), STARTER, here, {}) == shares
    assert environ_of_further("diffusion", 2, ProcessCount(2, ""), STARTER, here, own) == {"OMP_NUM_THREADS": "2"}
    assert environ_of_one("preprocessor", 2, is_auto=False, machine=here, environ={}) == {}


def test_each_further_worker_has_a_card_of_its_own():
    cards = Warm(cores=1.0, memory_bytes=MB, cards=3)

    given = [environ_of_further("diffusion", n, ProcessCount(3, ""), cards, machine(64), {}) for n in (2, 3)]

    assert given == [{"FANLIGHT_DIFFUSION_DEVICE": "cuda:1"}, {"FANLIGHT_DIFFUSION_DEVICE": "cuda:2"}]
