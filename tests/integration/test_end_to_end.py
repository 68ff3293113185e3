"""The main job through real processes: gateway, preprocessor, diffusion, told apart only by their addresses."""

import asyncio
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.fakes.running import until

ENDED = {"STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"}


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def blob(http: str, data: bytes) -> dict:
    return httpx.post(f"{http}/v1/blobs", content=data, timeout=60).raise_for_status().json()


def job(prompt: str = "a red apple", *, control: dict | None = None, **fields) -> dict:
    generation = {"prompt": prompt, "steps": 4, **fields}
    if control:
        generation["controls"] = [{"annotator": "canny", "image": {"blob": {"digest": control["digest"]}}}]
    return {"generation": generation}


def create(http: str, body: dict, **query) -> dict:
    return httpx.post(f"{http}/v1/jobs", json=body, params=query, timeout=60).raise_for_status().json()


def finished(http: str, name: str) -> dict:
    def ended():
        found = httpx.get(f"{http}/v1/{name}", params={"wait": 20}, timeout=60).raise_for_status().json()
        return found if found["state"] in ENDED else None

    return until(ended)


def test_an_image_and_a_prompt_become_controlled_images(running):
    source = blob(running.http, picture(size=(96, 80)))

    created = create(running.http, job(control=source, count=3, seed=7))
    done = finished(running.http, created["name"])

    assert done["state"] == "STATE_SUCCEEDED", done
    assert [image["seed"] for image in done["images"]] == ["7", "8", "9"]
    assert len({image["blob"]["digest"] for image in done["images"]}) == 3
    assert [task["stage"] for task in done["tasks"]] == ["preprocess", "diffusion", "diffusion", "diffusion"]
    first = httpx.get(f"{running.http}/v1/blobs/{done['images'][0]['blob']['digest']}").raise_for_status()
    assert first.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(first.content)).size == (64, 64)


def test_the_same_image_is_annotated_once(running):
    source = blob(running.http, picture(seed=1))
    first = finished(running.http, create(running.http, job(control=source))["name"])
    again = finished(running.http, create(running.http, job("another prompt", control=source))["name"])

    assert [task["stage"] for task in first["tasks"]] == ["preprocess", "diffusion"]
    assert [task["stage"] for task in again["tasks"]] == ["diffusion"]
    assert again["control_images"][0]["cached"] is True
    assert again["control_images"][0]["blob"]["digest"] == first["control_images"][0]["blob"]["digest"]


def test_the_same_seed_gives_the_same_image(running):
    digests = {
        finished(running.http, create(running.http, job("a cat", seed=3))["name"])["images"][0]["blob"]["digest"]
        for _ in range(2)
    }

    assert len(digests) == 1


def test_the_events_of_a_job_end_with_its_end(running):
    name = create(running.http, job(count=2))["name"]
    states = []
    with httpx.stream("GET", f"{running.http}/v1/{name}/events", timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and '"state"' in line:
                found = json.loads(line.removeprefix("data:"))
                states.append((found.get("job") or found)["state"])

    assert states[-1] == "STATE_SUCCEEDED"


def test_fifty_jobs_at_once_all_end_well(running):
    sources = [blob(running.http, picture(seed)) for seed in range(3)]
    bodies = [job(f"job {n}", seed=n, control=sources[n % 3] if n % 2 else None, steps=2) for n in range(50)]
    with ThreadPoolExecutor(10) as pool:
        created = list(pool.map(lambda body: create(running.http, body), bodies))
        done = list(pool.map(lambda one: finished(running.http, one["name"]), created))

    assert {one["state"] for one in done} == {"STATE_SUCCEEDED"}
    assert [one["images"][0]["seed"] for one in done] == [str(n) for n in range(50)]


def test_a_raw_image_is_annotated_over_http(running):
    answer = httpx.post(f"{running.http}/v1/annotate/canny", content=picture(size=(120, 72)), timeout=60)

    assert answer.status_code == 200
    assert Image.open(io.BytesIO(answer.content)).size == (120, 72)


def test_a_queued_job_can_be_cancelled(running):
    names = [create(running.http, job(f"cancel {n}", steps=100, count=8))["name"] for n in range(3)]
    answers = [httpx.post(f"{running.http}/v1/{name}:cancel", timeout=60).raise_for_status().json() for name in names]

    assert {answer["state"] for answer in answers} == {"STATE_CANCELLED"}
    assert finished(running.http, create(running.http, job("after"))["name"])["state"] == "STATE_SUCCEEDED"


def test_sending_the_same_request_again_makes_no_second_job(running):
    body = {**job("once"), "request_id": "only-once"}

    assert create(running.http, body)["name"] == create(running.http, body)["name"]
    other = httpx.post(f"{running.http}/v1/jobs", json={**job("twice"), "request_id": "only-once"}, timeout=60)
    assert other.status_code == 409


def fanlight(running, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fanlight.cli.main", *arguments, "--gateway", running.grpc]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_paints_and_says_what_it_made(running, tmp_path):
    (tmp_path / "in.png").write_bytes(picture(seed=5))
    out = fanlight(
        running, "generate", "a cat", "--control", f"canny={tmp_path}/in.png:0.8", "--steps", "3", "--seed", "11",
        "-n", "2", "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip

    assert out.returncode == 0, out.stderr
    said = json.loads(out.stdout)
    assert [image["seed"] for image in said["images"]] == [11, 12]
    assert all(Image.open(image["path"]).size == (64, 64) for image in said["images"])
    assert said["job"].startswith("jobs/")


def test_the_command_line_annotates(running, tmp_path):
    (tmp_path / "in.png").write_bytes(picture())
    made = tmp_path / "edges.png"
    out = fanlight(
        running, "annotate", "canny", str(tmp_path / "in.png"), "--param", "low_threshold=50", "--out", str(made)
    )

    assert out.returncode == 0, out.stderr
    assert Image.open(made).size == (64, 64)


def test_the_command_line_says_in_one_line_what_is_wrong(running, tmp_path):
    out = fanlight(running, "generate", "a cat", "--steps", "0", "--out", str(tmp_path))

    assert out.returncode == 1
    assert "steps" in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["annotators", "models", "workers"])
def test_listings_over_http_and_the_command_line_agree(running, what):
    over_http = httpx.get(f"{running.http}/v1/{what}", timeout=60).raise_for_status().json()
    out = fanlight(running, what, "--json")

    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout)) == len(over_http[what]) > 0


def test_the_queue_is_told_by_stage(running):
    told = httpx.get(f"{running.http}/v1/queue", timeout=60).raise_for_status().json()

    assert isinstance(told, dict)


async def test_a_watch_over_grpc_sees_progress_and_the_end(running):
    from fanlight.client import AsyncClient

    async with AsyncClient(running.grpc) as client:
        created = await asyncio.to_thread(create, running.http, job("watched", steps=30))
        kinds, last = set(), None
        async for event in client.watch_job(created["name"]):
            kinds.add(event.WhichOneof("event"))
            last = event.job if event.HasField("job") else last

    assert "job" in kinds
    assert last.images
