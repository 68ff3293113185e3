"""Counts the files of ours that one request enters: `python scripts/walk.py [--root DIR] [--json] [--files]`.

Three walks: a plain POST /v1/jobs until its answer, a LeaseTasks that leases that job's task, and the diffusion stage's
run of it with one step on the warm starter model. The gateway and the diffusion worker run as processes of their own
under a profiler, and are met only through HTTP, gRPC and settings, so that older and newer commits are measured alike.
A file counts if every one of the rounds enters it, which leaves out what happens to run beside. Stubs do not count, nor
does the worker's lease loop in the stage's run: it polls meanwhile. The gateway keeps its records in SQLite; a second
figure leaves out its adapters and `__main__`, as a gateway that is composed by a test with another store has others.
"""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, cast

LIMIT_S = 120.0
# How long a worker's poll waits here; also the longest pause between a task's lease and its run.
POLL_S = 0.5
WARM_UP, ROUNDS = 2, 3
STAGE = "DiffusionStage"
LEASE_LOOP = "services/worker/"
JOBS_ROUTE = "/v1/jobs"


class Tracer:
    """Which source files are entered while it is on. It must be installed before other threads start."""

    def __init__(self, root: Path) -> None:
        self._prefixes = tuple(f"{root / room}{os.sep}" for room in ("fanlight", "services"))
        self._entered: set[str] = set()
        self._is_on = False
        self.root = root
        # One list of files for each call of a watched method.
        self.walks: list[list[str]] = []

    def install(self) -> None:
        threading.setprofile(self._event)
        sys.setprofile(self._event)

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        if self._is_on and event == "call":
            self._entered.add(frame.f_code.co_filename)

    def start(self) -> None:
        self._entered = set()
        self._is_on = True

    def stop(self) -> list[str]:
        self._is_on = False
        ours = [path for path in self._entered if path.startswith(self._prefixes) and "_pb2" not in path]
        return sorted(str(Path(path).relative_to(self.root)) for path in ours)

    def watch(self, class_name: str, method: str) -> None:
        """Each call of this coroutine method becomes one of the walks. The class is found wherever it is defined."""
        [found] = {
            kind
            for module in list(sys.modules.values())
            if isinstance(kind := getattr(module, class_name, None), type) and kind.__module__.startswith("services.")
        }
        original = getattr(found, method)

        @wraps(original)
        async def watched(*given: Any, **named: Any) -> Any:
            self.start()
            try:
                return await original(*given, **named)
            finally:
                self.walks.append(self.stop())

        setattr(found, method, watched)


def serve_traced(module: str, control_fd: int, root: Path) -> None:
    """Run a service's module as `python -m` does, and obey the measuring process: one JSON list a line."""
    tracer = Tracer(root)

    def obey() -> None:
        with socket.socket(fileno=control_fd).makefile("rw") as control:
            for line in control:
                name, *arguments = json.loads(line)
                answer = tracer.walks if name == "walks" else getattr(tracer, name)(*arguments)
                control.write(json.dumps(answer) + "\n")
                control.flush()

    # Before the profiler, so that its own thread is left out.
    threading.Thread(target=obey, daemon=True).start()
    tracer.install()
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Traced:
    """A service under the profiler, in a process of its own."""

    def __init__(self, module: str, root: Path, log: Path, **settings: str) -> None:
        ours, theirs = socket.socketpair()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
        command = [sys.executable, __file__, "--root", str(root), "--child", module, str(theirs.fileno())]
        self._log = log
        self._process = subprocess.Popen(
            command,
            cwd=root,
            env={**inherited, **settings, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            pass_fds=[theirs.fileno()],
            text=True,
        )
        theirs.close()
        ours.settimeout(LIMIT_S)
        self._control = ours.makefile("rw")

    def addresses(self) -> dict[str, str]:
        """Where it listens, from its `ready grpc=... http=...` line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            sys.exit(f"error: the service did not start: {line}{self._log.read_text()[-3000:]}")
        return dict(part.split("=", 1) for part in line.split()[1:])

    def ask(self, *command: str) -> Any:
        self._control.write(json.dumps(command) + "\n")
        self._control.flush()
        return json.loads(self._control.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def traced(module: str, root: Path, log: Path, **settings: str) -> Iterator[Traced]:
    service = Traced(module, root, log, **settings)
    try:
        yield service
    finally:
        service.end()


class WorkersGateway:
    """What a diffusion worker dials here: it keeps the worker's poll, and hands it the tasks that it is given."""

    def __init__(self) -> None:
        self.polls: queue.Queue[Any] = queue.Queue()
        self.tasks: queue.Queue[Any] = queue.Queue()
        self.done: queue.Queue[str] = queue.Queue()

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        import grpc

        from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
        from fanlight.common.v1 import common_pb2
        from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc

        outer = self

        class Queue(queue_pb2_grpc.QueueServiceServicer):
            def LeaseTasks(self, request: Any, context: Any) -> Any:
                answer = queue_pb2.LeaseTasksResponse()
                if request.HasField("capabilities"):
                    outer.polls.put(request)
                else:
                    answer.wants_capabilities = outer.polls.empty()
                with contextlib.suppress(queue.Empty):
                    if request.max_tasks:
                        answer.tasks.append(outer.tasks.get(timeout=POLL_S))
                return answer

            def RenewLeases(self, request: Any, context: Any) -> Any:
                status = queue_pb2.RenewedLease.STATUS_RENEWED
                return queue_pb2.RenewLeasesResponse(
                    leases=[
                        queue_pb2.RenewedLease(lease_token=each.lease_token, status=status, ttl_s=LIMIT_S)
                        for each in request.renewals
                    ]
                )

            def CompleteTask(self, request: Any, context: Any) -> Any:
                outer.done.put("")
                return queue_pb2.CompleteTaskResponse()

            def FailTask(self, request: Any, context: Any) -> Any:
                outer.done.put(str(request.failure) or "failed")
                return queue_pb2.FailTaskResponse()

        class Blobs(blobs_pb2_grpc.BlobServiceServicer):
            def WriteBlob(self, requests: Any, context: Any) -> Any:
                data = b"".join(part.chunk for part in requests)
                blob = common_pb2.Blob(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
                return blobs_pb2.WriteBlobResponse(blob=blob)

            def PrepareUpload(self, request: Any, context: Any) -> Any:
                return blobs_pb2.PrepareUploadResponse()

        # What they lack answers UNIMPLEMENTED, as stubs have it; only for mypy are they abstract.
        make_queue, make_blobs = cast(Any, Queue), cast(Any, Blobs)
        server = grpc.server(ThreadPoolExecutor(4))
        queue_pb2_grpc.add_QueueServiceServicer_to_server(make_queue(), server)
        blobs_pb2_grpc.add_BlobServiceServicer_to_server(make_blobs(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None)


def post(url: str, body: object = None) -> Any:
    data = json.dumps(body if body is not None else {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return json.load(answer)


@dataclass(frozen=True, slots=True)
class Walks:
    post: list[str]
    lease: list[str]
    run: list[str]


@contextlib.contextmanager
def services(root: Path, folder: Path) -> Iterator[tuple[Traced, Traced, WorkersGateway]]:
    """A gateway and a diffusion worker with the starter model, which does not know the gateway."""
    workers = WorkersGateway()
    gateway_settings = {
        "FANLIGHT_GATEWAY_DATA_DIR": str(folder / "data"),
        "FANLIGHT_GATEWAY_GRPC": "127.0.0.1:0",
        "FANLIGHT_GATEWAY_HTTP": "127.0.0.1:0",
    }
    with workers.listening() as address:
        worker_settings = {
            "FANLIGHT_DIFFUSION_GRPC": "127.0.0.1:0",
            "FANLIGHT_DIFFUSION_DEVICE": "cpu",
            "FANLIGHT_DIFFUSION_FETCH": "off",
            "FANLIGHT_WEIGHTS_DIR": str(folder / "weights"),
            "FANLIGHT_WORKER_GATEWAY": address,
        }
        with (
            traced("services.gateway", root, folder / "gateway.log", **gateway_settings) as gateway,
            traced("services.diffusion", root, folder / "diffusion.log", **worker_settings) as diffusion,
        ):
            yield gateway, diffusion, workers


def measure(root: Path) -> Walks:
    import grpc

    from fanlight.queue.v1 import queue_pb2_grpc

    posts, leases = [], []
    with tempfile.TemporaryDirectory() as name, services(root, Path(name)) as (gateway, diffusion, workers):
        addresses = gateway.addresses()
        diffusion.addresses()
        diffusion.ask("watch", STAGE, "run")
        poll = workers.polls.get(timeout=LIMIT_S)
        poll.wait_s, poll.max_tasks = 0, 0
        jobs = f"http://{addresses['http']}{JOBS_ROUTE}"
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            stub = queue_pb2_grpc.QueueServiceStub(channel)
            stub.LeaseTasks(poll, timeout=LIMIT_S)
            poll.max_tasks = 1
            for number in range(WARM_UP + ROUNDS):
                request = {"generation": {"prompt": f"a red apple, number {number}", "steps": 1, "seed": str(number)}}
                gateway.ask("start")
                job = post(jobs, request)
                posts.append(gateway.ask("stop"))
                gateway.ask("start")
                leased = stub.LeaseTasks(poll, timeout=LIMIT_S)
                leases.append(gateway.ask("stop"))
                [task] = leased.tasks
                workers.tasks.put(task)
                if failure := workers.done.get(timeout=LIMIT_S):
                    sys.exit(f"error: the worker failed the task: {failure}")
                # Else the next poll, which does not name the lease, would bring the task back.
                post(f"{jobs}/{job['name'].rpartition('/')[2]}:cancel")
                # What ends with the job in the gateway is not the next round's.
                time.sleep(0.1)
        runs = diffusion.ask("walks")
    own = [[path for path in run if not path.startswith(LEASE_LOOP)] for run in runs]
    return Walks(post=in_all(posts), lease=in_all(leases), run=in_all(own))


def in_all(walks: Sequence[Sequence[str]]) -> list[str]:
    """The files that every round after the first ones entered."""
    rounds = [set(walk) for walk in walks[WARM_UP:]]
    assert len(rounds) == ROUNDS
    assert all(rounds), "a round entered no file: the tracer or the walk is broken"
    return sorted(set.intersection(*rounds))


def is_composed(path: str) -> bool:
    return "/adapters/" in path or path.endswith("/__main__.py")


def report(walks: Walks, *, with_files: bool) -> str:
    rows = []
    for words, files in (
        ("a plain POST /v1/jobs until its answer", walks.post),
        ("a LeaseTasks that leases one task", walks.lease),
        (f"{STAGE}.run, one step, warm", walks.run),
    ):
        inner = [path for path in files if not is_composed(path)]
        aside = f" ({len(inner)} without adapters and __main__)" if len(inner) < len(files) else ""
        rows.append(f"{len(files):>4}  files entered by {words}{aside}")
        rows += [f"      {path}" for path in files if with_files]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--json", action="store_true", help="print the files of each walk as JSON")
    parser.add_argument("--files", action="store_true", help="print the files of each walk")
    parser.add_argument("--child", nargs=2, metavar=("MODULE", "FD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.root.resolve()
    # The script's own folder comes first on the path, and is no part of the checkout.
    sys.path[0] = str(root)
    if given.child:
        module, control_fd = given.child
        serve_traced(module, int(control_fd), root)
        return
    walks = measure(root)
    if given.json:
        print(json.dumps({"post": walks.post, "lease": walks.lease, "run": walks.run}, indent=2))
    else:
        print(report(walks, with_files=given.files))


if __name__ == "__main__":
    main()
