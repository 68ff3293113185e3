"""When a worker would finish a task, downloads counted. The one sum that placing, stealing and explaining share."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.gateway.ordering.posts import Post
from services.gateway.ordering.tasks import Kind, Waiting

# From disk to RAM and from RAM to VRAM, in bytes a second: a consumer's NVMe and PCIe.
DISK_BYTES_PER_S = 2e9
BUS_BYTES_PER_S = 10e9
# To patch in one LoRA of 150 MB, which is rank 128 for SD 1.5's attention and text encoder: 0.075 s to read it (nobody
# tells whether a file is in RAM), 0.015 s on the bus, 0.03 s on a consumer's card (90 GFLOP, and 7 GB of copies to
# float32, sums and back), 0.035 s for the calls. Nothing where the task before it had the same combination: the engine
# has its copies still.
PATCH_S = 0.155
# A load costs others too: it pushes out of RAM what they will have to load again, and they wait for it meanwhile.
LOAD_WEIGHT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds from now; what is fetched while the worker is busy costs nothing more."""

    # Until the worker has done what comes before.
    slot_s: float
    # Until the models are on its disk.
    fetch_s: float
    fetch_bytes: int
    load_s: float
    patch_s: float
    run_s: float

    @property
    def start_s(self) -> float:
        return max(self.slot_s, self.fetch_s)

    @property
    def finish_s(self) -> float:
        return self.start_s + self.load_s + self.patch_s + self.run_s

    @property
    def cost_s(self) -> float:
        """What workers are compared by."""
        return self.finish_s + (LOAD_WEIGHT - 1) * self.load_s


def estimate(post: Post, task: Waiting, now_s: float, *, ahead_s: float | None = None) -> Estimate:
    """`ahead_s`: the work before it, where the task has its place already; else it comes behind all that is planned."""
    kind = task.kind
    fetch_s, fetch_bytes = 0.0, 0
    if not kind.models <= post.view.held:
        fetch_s, fetch_bytes = fetching(post, kind, now_s)
    return Estimate(
        slot_s=post.wait_s(now_s) if ahead_s is None else ahead_s,
        fetch_s=fetch_s,
        fetch_bytes=fetch_bytes,
        load_s=_next_load_s(post, task),
        patch_s=_patch_s(post, task, is_next=ahead_s == 0.0),
        run_s=post.run_s(task),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Of some workers: who does a task at the least cost, and what the least would be, were small models everywhere."""

    post: Post
    cost_s: float
    plain_s: float


def best_of(posts: Iterable[Post], task: Waiting, now_s: float) -> Best | None:
    """The least `estimate(...).cost_s` of all posts, in a hurry; of two alike the one with the lesser id."""
    kind, steps = task.kind, task.steps
    checkpoint, models = kind.checkpoint, kind.models
    which = kind.family, kind.size_class
    patch_s, combination = PATCH_S * len(kind.loras), kind.combination
    best: Post | None = None
    best_s = plain_best_s = float("inf")
    for post in posts:
        view = post.view
        wait_s = post.wait_s(now_s)
        work_s = view.task_s
        if steps:
            step_s = post.step_times.get(which)
            work_s += steps * (post.step_s_of(which) if step_s is None else step_s)
        if checkpoint and checkpoint not in view.vram and checkpoint not in post.lined:
            work_s += LOAD_WEIGHT * load_s(post, checkpoint)
        cost_s = wait_s + work_s
        if cost_s < plain_best_s:
            plain_best_s = cost_s
        if cost_s > best_s:
            continue
        if patch_s and (post.planned or post.combination != combination):
            work_s += patch_s
            cost_s = wait_s + work_s
        if not models <= view.held:
            cost_s = max(wait_s, fetching(post, kind, now_s)[0]) + work_s
        if best is None or cost_s < best_s or (cost_s == best_s and view.id < best.view.id):
            best, best_s = post, cost_s
    return Best(post=best, cost_s=best_s, plain_s=plain_best_s) if best else None


def fetching(post: Post, kind: Kind, now_s: float) -> tuple[float, int]:
    """Seconds until the lacking models are there, and how many bytes of them are still to come."""
    ready_s, new_bytes, coming_bytes, is_sticky = now_s, 0, 0.0, False
    for model in post.view.lacks(kind.models):
        fetch = post.fetches.get(model)
        if fetch is not None:
            ready_s = max(ready_s, fetch.ready_s)
            coming_bytes += fetch.left_bytes(now_s)
            continue
        new_bytes += post.view.size_of(model)
        is_sticky = is_sticky or model == kind.checkpoint
    if new_bytes:
        free_s = post.link_free_s(now_s, sticky=is_sticky)
        ready_s = max(ready_s, free_s + new_bytes * 8 / post.view.link_bps)
    return ready_s - now_s, new_bytes + int(coming_bytes)


def load_s(post: Post, checkpoint: str) -> float:
    """From where it is, or will be, to the device."""
    view = post.view
    if not checkpoint or checkpoint in view.vram:
        return 0.0
    size_bytes = view.size_of(checkpoint)
    bus_s = size_bytes / BUS_BYTES_PER_S
    return bus_s if checkpoint in view.ram else bus_s + size_bytes / DISK_BYTES_PER_S


def _next_load_s(post: Post, task: Waiting) -> float:
    """Nothing where others of its checkpoint are planned: it is done with them."""
    alike = post.lined.get(task.kind.checkpoint, 0) - (task.key in post.planned)
    return 0.0 if alike > 0 else load_s(post, task.kind.checkpoint)


def _patch_s(post: Post, task: Waiting, *, is_next: bool) -> float:
    """Nothing where it comes straight after one with the same LoRAs in the same checkpoint."""
    follows = is_next or len(post.planned) == (task.key in post.planned)
    if follows and post.combination == task.kind.combination:
        return 0.0
    return PATCH_S * len(task.kind.loras)
