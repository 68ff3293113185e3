"""What previews cost: a 40-step image with a preview asked for after every step, beside one without any.

Gateway and diffusion worker are processes of their own with their own defaults; the starter model on the CPU. A client
creates one job after another and watches each to its end. Images with and without previews take turns, and so does
which of them goes first. Run: `python -m benchmarks.previews [--rounds 5] [--images 6]`.
"""

import sys
import tempfile
import time
from collections.abc import Sequence

import grpc

from benchmarks.figures import Report, arguments
from benchmarks.serving import cpu_s, served
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc

STEPS = 40
CALL_LIMIT_S = 300.0
JOIN_LIMIT_S = 120.0
ENDED = (gateway_pb2.Job.STATE_SUCCEEDED, gateway_pb2.Job.STATE_FAILED, gateway_pb2.Job.STATE_CANCELLED)


class Client:
    """Creates jobs and watches them, as a page that shows an image while it is made."""

    def __init__(self, channel: grpc.Channel, worker_pid: int, *, steps: int) -> None:
        self._jobs = gateway_pb2_grpc.JobServiceStub(channel)
        self._worker_pid = worker_pid
        self._steps = steps
        self._seed = 0

    def wait_for_worker(self) -> None:
        """Until a worker has loaded the model: an image was made."""
        end_s = time.monotonic() + JOIN_LIMIT_S
        while True:
            try:
                self.image(0)
                return
            except grpc.RpcError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.2)

    def image(self, every: int) -> tuple[float, float, int]:
        """Seconds until the image is there, the worker's CPU seconds for it, and how many previews came."""
        self._seed += 1
        request = diffusion_pb2.GenerateRequest(
            prompt=f"a red apple number {self._seed}", seed=self._seed, steps=self._steps, preview_every_steps=every
        )
        before_s, begin_s = cpu_s(self._worker_pid), time.perf_counter()
        job = self._jobs.CreateJob(gateway_pb2.CreateJobRequest(generation=request), timeout=CALL_LIMIT_S)
        previews, state = 0, job.state
        for event in self._jobs.WatchJob(gateway_pb2.WatchJobRequest(name=job.name), timeout=CALL_LIMIT_S):
            previews += bool(event.progress.preview)
            if event.HasField("job"):
                state = event.job.state
                if state in ENDED:
                    break
        assert state == gateway_pb2.Job.STATE_SUCCEEDED
        return time.perf_counter() - begin_s, cpu_s(self._worker_pid) - before_s, previews


def measure(rounds: int, images: int, report: Report, *, steps: int) -> None:
    gateway = {"FANLIGHT_GATEWAY_GRPC": "127.0.0.1:0", "FANLIGHT_GATEWAY_HTTP": "127.0.0.1:0"}
    with (
        tempfile.TemporaryDirectory() as folder,
        served("-m", "services.gateway", FANLIGHT_GATEWAY_DATA_DIR=folder, **gateway) as (_, address),
        served("-m", "services.diffusion", FANLIGHT_DIFFUSION_GRPC="127.0.0.1:0", FANLIGHT_WORKER_GATEWAY=address) as (
            worker_pid,
            _,
        ),
        grpc.insecure_channel(address) as channel,
    ):
        client = Client(channel, worker_pid, steps=steps)
        client.wait_for_worker()
        taken = [turn(client, images, first=number % 2) for number in range(rounds)]
    against = f"one of {steps} steps without previews"
    (waits, plain_waits), (cpus, plain_cpus) = (
        [[each[side][of] for each in taken] for side in (1, 0)] for of in (0, 1)
    )
    what = f"a {steps}-step image with a preview asked for after every step"
    report.ratio(f"{what}, until it is there", waits, plain_waits, against=against, goal=1.05)
    report.ratio(f"{what}, the worker's CPU", cpus, plain_cpus, against=against)
    report.add("an image without previews, until it is there", [each / images for each in plain_waits], "s")
    report.add("previews of an image that came", [each[1][2] / images for each in taken], "")


def turn(client: Client, images: int, *, first: int) -> Sequence[tuple[float, float, float]]:
    """Without previews, then with: the sums of a round's images, which take turns."""
    sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    for number in range(images):
        for side in (0, 1) if (number + first) % 2 else (1, 0):
            for place, value in enumerate(client.image(side)):
                sums[side][place] += value
    return [(wait_s, cpu, previews) for wait_s, cpu, previews in sums]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=6, help="images of each side in a round")
    asked = parser.parse_args(argv)
    report = Report()
    if asked.smoke:
        measure(1, 1, report, steps=2)
    else:
        measure(asked.rounds, asked.images, report, steps=STEPS)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
