"""The tiny model, and what the tests of the engine generate with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.diffusion.engine.generation import ControlInput, Generation
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.scan import scan
from services.diffusion.parse.abilities import Abilities
from services.diffusion.parse.parser import Parser
from services.kernel.images import ImageLimits

SIZE_PX = 64
ABILITIES = Abilities(pixels_limit=256 * 256, has_safety_checker=False, precision_of_device=lambda: "float32")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model `tiny` and its ControlNets `canny` and `depth`."""
    from tests.fakes.models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def catalog(models: Path) -> ModelCatalog:
    return scan([models])


@pytest.fixture(scope="session")
def parser(catalog: ModelCatalog) -> Parser:
    return Parser(catalog=catalog, abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 42)


@pytest.fixture(scope="session")
def manager():
    from services.diffusion.models.model_manager import ModelManager

    return ModelManager(device="cpu")


@pytest.fixture(scope="session")
def backend(manager):
    from services.diffusion.engine.backend import TorchBackend

    return TorchBackend(manager, threads=1)


@pytest.fixture(scope="session")
def asked(catalog: ModelCatalog) -> Callable[..., Generation]:
    """A Generation for the tiny model with what the test leaves open filled in."""

    def ask(**fields) -> Generation:
        defaults = {
            "prompt": "a cat",
            "negative_prompt": "blurry",
            "width_px": SIZE_PX,
            "height_px": SIZE_PX,
            "steps": 5,
            "guidance_scale": 5.0,
            "scheduler": "ddim",
            "seed": 7,
        }
        return Generation(checkpoint=catalog.default(), **{**defaults, **fields})

    return ask


@pytest.fixture(scope="session")
def control(catalog: ModelCatalog) -> Callable[..., ControlInput]:
    def make(name: str, *, size_px: tuple[int, int] = (SIZE_PX, SIZE_PX), **fields) -> ControlInput:
        pixels = np.random.RandomState(len(name)).randint(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
        entry = catalog.controlnet(name, catalog.default())
        return ControlInput(controlnet=entry, image=Image.fromarray(pixels), **fields)

    return make


@pytest.fixture(scope="session")
def generated(backend):
    """Generates generations in one batch; each joins after so many evaluations. The rows at their ends, in order."""

    def generate(*generations: Generation, joins: tuple[int, ...] = ()):
        joins = joins or (0,) * len(generations)
        rows = [backend.begin(generation) for generation in generations]
        for turn in range(max(joins) + max(row.evaluations for row in rows)):
            batch = [row for row, join in zip(rows, joins, strict=True) if join <= turn and not row.is_finished]
            for advance in backend.advance(batch) if batch else []:
                assert advance.error is None
        assert all(row.is_finished for row in rows)
        return rows

    return generate
