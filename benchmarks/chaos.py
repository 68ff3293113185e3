"""Three NATS servers, two gateways, six workers; processes are killed and links cut while clients send jobs.

usage: python -m benchmarks.chaos [--minutes N] [--seed N]; `make chaos` runs 10 minutes. At the end everything is left
alone until all jobs have ended. Fails when a job is lost or does not end, when its watch does not report its end, and
when an image was delivered twice or cannot be fetched. With `--liars` four of the workers lie: one hands in garbage,
one speaks nonsense, one claims everything, one vanishes; then a job that fails is a failure too.
"""

import asyncio
import contextlib
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos_house import House, Member
from benchmarks.chaos_liars import CHECKED_SHARE, LIARS, LeftOut, judge_liars
from benchmarks.chaos_worker import SIDE_PX, png
from benchmarks.figures import Report, arguments
from fanlight.client import AsyncClient, requests
from fanlight.client.requests import Control
from fanlight.errors import FanlightError
from fanlight.gateway.v1.gateway_pb2 import Job
from services.kernel.image_headers import size_in

GATEWAYS, WORKERS = 2, 6
# A client has at most so many open jobs, so that a run drains whatever the machine manages.
CLIENTS, OPEN_JOBS = 4, 5
KILL_EVERY_S = (2.0, 6.0)
DOWN_S = (0.5, 3.0)
CUT_EVERY_S = (3.0, 8.0)
CUT_S = (0.5, 4.0)
# A gateway looks for a new key after 30 s at the earliest.
ROTATE_EVERY_S, AWAY_S = 45.0, 3.0
SETTLE_S = 480.0
# Less than until the first kill: a smoke run shows that the house stands and that jobs end.
SMOKE_MINUTES = 0.03
SEND_EVERY_S = (0.5, 2.0)
# A header of 256 x 192 pixels, which is all of an image that the gateway reads.
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\0\0\0\0\xc0\x08\x02\0\0\0"
OPEN = (Job.STATE_QUEUED, Job.STATE_RUNNING)


@dataclass
class Seen:
    """What clients received."""

    accepted: dict[str, int] = field(default_factory=dict)
    # Job name and task to the digests that were ever reported for it.
    images: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    refusals: Counter[str] = field(default_factory=Counter)
    ended: dict[str, Job] = field(default_factory=dict)
    # By job, the digest of the control image that follows from its photo.
    truths: dict[str, str] = field(default_factory=dict)
    # Jobs whose watch has reported their end.
    watched: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    # Delivered images of a wrong format or size.
    wrong: int = 0

    def note(self, job: Job) -> None:
        for image in job.images:
            self.images[job.name, image.task].add(image.blob.digest)
        if job.state not in OPEN:
            self.ended[job.name] = job


async def send_jobs(client: AsyncClient, number: int, seen: Seen, stop: asyncio.Event, chance: random.Random) -> None:
    """One job after the other, each watched to its end while the next ones are sent."""
    sent, places = 0, asyncio.Semaphore(OPEN_JOBS)
    async with asyncio.TaskGroup() as group:
        while True:
            await places.acquire()
            if stop.is_set():
                return
            sent += 1
            count, photo = chance.randint(1, 4), PNG + chance.randbytes(500)
            control = Control(image=photo, annotator="cheap", controlnet="cheap")
            work = requests.generation("chaos", count=count, controls=[control] if chance.random() < 0.7 else [])
            name = await insist(client, work, f"c{number}-{sent}", seen)
            seen.accepted[name] = count
            seen.truths[name] = f"sha256:{hashlib.sha256(png(photo)).hexdigest()}"
            group.create_task(follow(client, name, seen)).add_done_callback(lambda _: places.release())
            await asyncio.sleep(chance.uniform(*SEND_EVERY_S))


async def insist(client: AsyncClient, work: object, request_id: str, seen: Seen) -> str:
    """Send it until it is accepted, as a client does that cares."""
    while True:
        try:
            return (await client.create_job(work, request_id=request_id)).name  # type: ignore[arg-type]
        except FanlightError as error:
            seen.refusals[error.code] += 1
            await asyncio.sleep(0.5)


async def follow(client: AsyncClient, name: str, seen: Seen) -> None:
    while name not in seen.watched:
        with contextlib.suppress(FanlightError):
            async for event in client.watch_job(name):
                if event.HasField("job"):
                    seen.note(event.job)
                    if event.job.state not in OPEN:
                        seen.watched.add(name)
        await asyncio.sleep(0.2)


async def revive(house: House, stop: asyncio.Event) -> None:
    """Start those again that ended by themselves, as a platform does."""
    while not await waited(stop, 1.0):
        for number, member in enumerate(house.workers):
            if LIARS.get(number) == "vanishes" and not member.lives:
                await member.start_again()


async def kill(house: House, stop: asyncio.Event, chance: random.Random) -> None:
    """A random process every few seconds; of the store only a minority at a time, as Raft needs."""
    async with asyncio.TaskGroup() as group:
        while not await waited(stop, chance.uniform(*KILL_EVERY_S)):
            member = chance.choice(house.members)
            beside = house.servers if member in house.servers else house.gateways if member in house.gateways else []
            if member.lives and all(each.lives for each in beside):
                await member.kill()
                group.create_task(return_later(member, chance.uniform(*DOWN_S)))


async def return_later(member: Member, after_s: float) -> None:
    await asyncio.sleep(after_s)
    await member.start_again()


async def cut(house: House, stop: asyncio.Event, chance: random.Random) -> None:
    while not await waited(stop, chance.uniform(*CUT_EVERY_S)):
        await chance.choice(house.links).cut(chance.uniform(*CUT_S))


async def rotate(house: House, stop: asyncio.Event) -> None:
    """The issuer's keys, and now and then the issuer is away just then."""
    while not await waited(stop, ROTATE_EVERY_S):
        house.rotate_keys()
        house.issuer.is_away = house.issuer.rotations % 2 == 0
        await waited(stop, AWAY_S)
        house.issuer.is_away = False


async def waited(stop: asyncio.Event, for_s: float) -> bool:
    """Whether it stopped meanwhile."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            await stop.wait()
    return stop.is_set()


async def rage(house: House, minutes: float, seed: int, left_out: LeftOut) -> Seen:
    seen, stop = Seen(), asyncio.Event()
    async with house.client() as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(minutes * 60 + SETTLE_S), asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(send_jobs(client, number, seen, stop, random.Random(seed * 100 + number)))
                group.create_task(kill(house, stop, random.Random(seed)))
                group.create_task(cut(house, stop, random.Random(seed + 1)))
                group.create_task(revive(house, stop))
                group.create_task(rotate(house, stop))
                group.create_task(left_out.watch(client, stop))
                await asyncio.sleep(minutes * 60)
                stop.set()
                print(f"{len(seen.accepted)} jobs accepted, {len(seen.ended)} ended; now left alone", flush=True)
        for name in seen.accepted:
            with contextlib.suppress(FanlightError):
                seen.note(await client.get_job(name))
        await left_out.look(client)
        seen.unreadable = [name for name in seen.ended if not await all_come(client, seen.ended[name], seen)]
    return seen


async def all_come(client: AsyncClient, job: Job, seen: Seen) -> bool:
    """Whether every image of the job is there, with the bytes that it was reported to have. Counts wrong ones."""
    try:
        for image in job.images:
            size = size_in(await client.read_blob(image.blob))
            seen.wrong += size is None or (size.width_px, size.height_px) != (SIDE_PX, SIDE_PX)
    except FanlightError:
        return False
    return True


def judge(seen: Seen, house: House, report: Report, row: str, *, has_liars: bool) -> None:
    states = Counter(Job.State.Name(seen.ended[name].state) for name in seen.accepted if name in seen.ended)
    lost = [name for name in seen.accepted if name not in seen.ended]
    twice = [where for where, digests in seen.images.items() if len(digests) > 1]
    short = [
        name
        for name, count in seen.accepted.items()
        if name in seen.ended
        and seen.ended[name].state == Job.STATE_SUCCEEDED
        and len(seen.ended[name].images) != count
    ]
    unwatched = [name for name in seen.accepted if name not in seen.watched]
    attempts = sum(task.attempts for job in seen.ended.values() for task in job.tasks)
    tasks = sum(len(job.tasks) for job in seen.ended.values())
    kills = Counter(member.name.split("-")[0] for member in house.members for _ in range(member.kills))
    failed = [name for name, job in seen.ended.items() if job.state == Job.STATE_FAILED]
    report.add(row, len(seen.accepted), "", column="jobs accepted", goal=1, at_least=True)
    report.add(row, len(lost), "", column="not ended or lost", goal=0)
    report.add(row, len(seen.images), "", column="images")
    report.add(row, len(twice), "", column="images delivered twice", goal=0)
    report.add(row, len(short), "", column="jobs short of images", goal=0)
    report.add(row, len(unwatched), "", column="watches without an end", goal=0)
    report.add(row, len(seen.unreadable), "", column="jobs with images that do not come", goal=0)
    report.add(row, seen.wrong, "", column="images of a wrong format or size", goal=0)
    if has_liars:
        report.add(row, len(failed), "", column="jobs failed", goal=0)
    for name in ("nats", "gateway", "worker"):
        report.add(row, kills[name], "", column=f"kills of a {name}")
    report.add(row, house.issuer.rotations, "", column="keys of the issuer")
    report.add(row, house.certificates.issued, "", column="certificates of gateways")
    report.add(row, attempts / max(1, tasks), "", column="leases for a task")
    print(f"ended {dict(states)}, refused or broken calls {dict(seen.refusals)}")


async def run(
    minutes: float, seed: int, report: Report, *, gateways: int, workers: int, keep: bool, has_liars: bool
) -> int:
    folder, left_out = Path(tempfile.mkdtemp(prefix="chaos-")), LeftOut()
    house = House(folder, gateways=gateways, workers=range(workers))
    if has_liars:
        house = House(folder, gateways=gateways, workers=range(workers), liars=LIARS, checked_share=CHECKED_SHARE)
    row = f"seed {seed}, liars" if has_liars else f"seed {seed}"
    begin_s = time.monotonic()
    try:
        async with asyncio.timeout(240):
            await house.start()
        print(f"started in {time.monotonic() - begin_s:.0f} s, seed {seed}", flush=True)
        seen = await rage(house, minutes, seed, left_out)
        judge(seen, house, report, row, has_liars=has_liars)
        if has_liars and minutes > SMOKE_MINUTES:
            annotating = sum(number % 3 == 0 for number in range(workers))
            judge_liars(seen.ended.values(), seen.truths, left_out, report, row, annotating=annotating)
        return 1 if any(figure.met is False for figure in report.figures) else 0
    finally:
        await house.end()
        if keep:
            print(f"logs in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--liars", action="store_true", help="five of seven workers lie")
    parser.add_argument("--keep", action="store_true", help="leave the logs")
    asked = parser.parse_args(argv)
    # Liars need honest workers beside them.
    workers = max(LIARS) + 1 if asked.liars else 2 if asked.smoke else WORKERS
    minutes, gateways = (SMOKE_MINUTES, 1) if asked.smoke else (asked.minutes, GATEWAYS)
    report = Report()
    chaos = run(minutes, asked.seed, report, gateways=gateways, workers=workers, keep=asked.keep, has_liars=asked.liars)
    code = asyncio.run(chaos)
    report.save(asked.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
