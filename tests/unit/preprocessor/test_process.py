"""The preprocessor's own process: light, ready with one line, gone on SIGTERM."""

import os
import re
import signal
import subprocess
import sys

import pytest

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from tests.fakes.synthetic_pictures import decoded, encoded, scene

END_LIMIT_S = 60

CANNY_WITHOUT_TORCH = """
import sys
import numpy
import services.preprocessor.__main__
from services.preprocessor.registry import core
canny = core().get("canny")
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
def process():
    command = [sys.executable, "-m", "services.preprocessor"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


async def test_it_says_when_it_is_ready_annotates_and_ends_on_sigterm(process):
    ready = re.fullmatch(r"ready grpc=(127\.0\.0\.1:\d+)\n", process.stdout.readline())
    assert ready
    async with open_channel(ready[1]) as channel:
        picture = common_pb2.Picture(data=encoded(scene()))
        answer = await preprocessor_pb2_grpc.PreprocessorServiceStub(channel).Annotate(
            preprocessor_pb2.AnnotateRequest(annotator="canny", picture=picture), timeout=END_LIMIT_S
        )
    assert decoded(answer.image).shape == scene().shape
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=END_LIMIT_S)
    assert (process.returncode, rest) == (0, "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"FANLIGHT_PREPROCESSOR_SLOTTS": "2"}, "FANLIGHT_PREPROCESSOR_SLOTTS"),
        ({"FANLIGHT_PREPROCESSOR_SLOTS": "0"}, "FANLIGHT_PREPROCESSOR_SLOTS"),
        ({"FANLIGHT_PREPROCESSOR_MAX_PICTURE_SIDE_PX": "40000"}, "FANLIGHT_PREPROCESSOR_MAX_PICTURE_SIDE_PX"),
        ({"FANLIGHT_PREPROCESSOR_GRPC": "0.0.0.0:0"}, "FANLIGHT_CLIENT_TOKEN"),
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
