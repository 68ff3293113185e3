"""The preprocessor as a process: it loads little, prints one line when it is ready, and ends on SIGTERM."""

import os
import re
import signal
import subprocess
import sys

import grpc.aio
import numpy as np
import pytest

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from fanlight.queue.v1 import queue_pb2
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.synthetic_images import decoded, encoded, scene
from tests.fakes.worker import task_of

END_LIMIT_S = 60

CANNY_WITHOUT_TORCH = """
import sys
import numpy
import services.preprocessor.__main__
from services.preprocessor.registry import installed
canny = installed().get("canny")
canny(numpy.zeros((8, 8, 3), numpy.uint8), **{p.name: p.default for p in canny.parameters})
heavy = {"torch", "torchvision", "scipy", "diffusers", "transformers", "controlnet_aux", "skimage", "onnxruntime"}
print(sorted(heavy & set(sys.modules)))
"""


def environment(**settings: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
    return plain | {"FANLIGHT_PREPROCESSOR_GRPC": "127.0.0.1:0"} | settings


def test_a_process_that_does_canny_loads_no_torch():
    process = subprocess.run([sys.executable, "-c", CANNY_WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "[]\n", "")


@pytest.fixture
def start():
    """Start the process with settings of its own."""
    started = []

    def start(**settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "services.preprocessor"]
        process = subprocess.Popen(
            command, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_it_says_when_it_is_ready_annotates_and_ends_on_sigterm(start):
    process = start()
    ready = re.fullmatch(r"ready grpc=(127\.0\.0\.1:\d+)\n", process.stdout.readline())
    assert ready
    async with open_channel(ready[1]) as channel:
        image = common_pb2.ImageSource(data=encoded(scene()))
        answer = await preprocessor_pb2_grpc.PreprocessorServiceStub(channel).Annotate(
            preprocessor_pb2.AnnotateRequest(annotator="canny", image=image), timeout=END_LIMIT_S
        )
    assert decoded(answer.image).shape == scene().shape
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=END_LIMIT_S)
    assert (process.returncode, rest) == (0, "")


async def test_unavailable_weights_are_named_with_their_source(start, tmp_path):
    process = start(FANLIGHT_WEIGHTS_DIR=str(tmp_path), FANLIGHT_WEIGHTS_OFFLINE="true")
    address = process.stdout.readline().removeprefix("ready grpc=").strip()
    async with open_channel(address) as channel:
        image = common_pb2.ImageSource(data=encoded(scene()))
        asked = preprocessor_pb2.AnnotateRequest(annotator="mediapipe-face", image=image)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await preprocessor_pb2_grpc.PreprocessorServiceStub(channel).Annotate(asked, timeout=END_LIMIT_S)
    error = from_rpc_error(raised.value)
    assert "face_landmark.tflite from https://" in error.message


async def test_it_does_the_tasks_of_its_gateway(start):
    gateway = FakeGateway(ttl_s=30)
    await gateway.start()
    sound, broken = (_leased(name, gateway.keep(data)) for name, data in (("a", encoded(scene())), ("b", b"no image")))
    await gateway.offer(sound, broken)
    start(FANLIGHT_WORKER_GATEWAY=gateway.address)
    await gateway.until(lambda: gateway.results[sound.name] == 1 and broken.name in gateway.failed)
    (completed,) = gateway.completed.values()
    (output,) = completed.outputs
    assert np.array_equal(decoded(gateway.blobs[output.blob.digest]), 255 - scene())
    assert not output.HasField("seed")
    assert gateway.faults(broken.name) == ["FAULT_REQUEST"]
    assert gateway.failed[broken.name][0].failure.field == "image"
    await gateway.stop()


def _leased(job: str, blob: common_pb2.Blob) -> queue_pb2.LeasedTask:
    asked = preprocessor_pb2.AnnotateRequest(annotator="invert", image=common_pb2.ImageSource(blob=blob))
    return task_of(asked, f"jobs/{job}/tasks/0")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"FANLIGHT_PREPROCESSOR_SLOTTS": "2"}, "FANLIGHT_PREPROCESSOR_SLOTTS"),
        ({"FANLIGHT_PREPROCESSOR_SLOTS": "0"}, "FANLIGHT_PREPROCESSOR_SLOTS"),
        ({"FANLIGHT_PREPROCESSOR_SLOTS": "257"}, "FANLIGHT_PREPROCESSOR_SLOTS: must be at most 256"),
        ({"FANLIGHT_PREPROCESSOR_GRPC": "0.0.0.0:0"}, "FANLIGHT_WORKER_DIRECT_TOKEN"),
    ],
)
def test_a_wrong_setting_ends_it_with_one_line_that_names_it(settings, said):
    command = [sys.executable, "-m", "services.preprocessor"]
    process = subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=END_LIMIT_S, check=False
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert said in process.stderr
    assert "Traceback" not in process.stderr


def test_a_missing_folder_of_models_is_an_error_at_start():
    command = [sys.executable, "-m", "services.preprocessor"]
    done = subprocess.run(
        command,
        env=environment(FANLIGHT_PREPROCESSOR_MODELS_DIR="/nope"),
        capture_output=True,
        text=True,
        timeout=END_LIMIT_S,
    )
    assert (done.returncode, done.stderr) == (2, "error: FANLIGHT_PREPROCESSOR_MODELS_DIR: /nope is not a folder\n")
