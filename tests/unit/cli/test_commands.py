"""Every command as a person types it, against a gateway of real gRPC on loopback."""

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fanlight.cli.main import run
from fanlight.cli.reports import print_explanation
from fanlight.client import AsyncClient
from fanlight.gateway.v1.gateway_pb2 import Job, JobEstimate, JobExplanation, TaskExplanation, WorkerExplanation
from fanlight.preprocessor.v1.preprocessor_pb2 import Annotator
from fanlight.terminal import printable_json
from tests.fakes.job_service import IMAGE_BYTES, FakeJobService, serving_beside


@pytest.fixture
def service():
    return FakeJobService()


@pytest.fixture(autouse=True)
def address(service, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving_beside(service) as address:
        monkeypatch.setenv("FANLIGHT_GATEWAY", address)
        yield address


@pytest.fixture
def said(capsys):
    """Run a command that must succeed; what it printed, read as JSON where it was asked for."""

    def say(*arguments):
        code = run(arguments)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out) if "--json" in arguments else printed.out

    return say


@pytest.fixture
def refused(capsys):
    """Run a command that must fail; its code and the one line it said."""

    def refuse(*arguments):
        code = run(arguments)
        printed = capsys.readouterr()
        text = printed.out if "--json" in arguments else printed.err
        assert "Traceback" not in text
        return code, text

    return refuse


def test_generate_writes_the_images_and_prints_their_paths(said):
    printed = said("generate", "a cat", "-n", "2", "--seed", "7", "--out", "made")

    assert printed.split() == ["made/j1-7.png", "made/j1-8.png"]
    assert Path("made/j1-7.png").read_bytes() == IMAGE_BYTES


def test_generate_tells_what_it_made_as_json(said):
    printed = said("generate", "a cat", "--json")

    assert printed["job"] == "jobs/j1"
    assert [(image["path"], image["seed"]) for image in printed["images"]] == [("j1-100.png", 100)]
    assert printed["images"][0]["digest"].startswith("sha256:")
    assert printed["timings"]["diffusion"] == {"queue_s": 2.0, "denoise_s": 0.5, "load_s": 0.25}
    assert printed["timings"]["total_s"] >= 0


def test_generate_sends_what_was_asked_for_and_no_more(said, service):
    Path("in.png").write_bytes(b"an image")
    said(
        "generate", "a cat", "--negative", "dogs", "--model", "starter", "--size", "64x96", "--steps", "8",
        "--guidance", "2.5", "--scheduler", "euler", "--control", "canny=in.png:0.5", "--priority", "9",
    )  # fmt: skip

    request = service.requests["CreateJob"][0]
    sent = request.generation
    assert (request.priority, sent.prompt, sent.negative_prompt, sent.model) == (9, "a cat", "dogs", "starter")
    assert (sent.width_px, sent.height_px, sent.steps, sent.guidance_scale, sent.scheduler) == (64, 96, 8, 2.5, "euler")
    assert (sent.controls[0].annotator, sent.controls[0].scale) == ("canny", 0.5)
    assert not sent.HasField("seed")
    assert not sent.HasField("count")


def test_generate_sends_what_is_masked(said, service):
    Path("in.png").write_bytes(b"an image")
    said(
        "generate", "a cat", "--image", "in.png", "--mask", "in.png", "--mask-blur", "0", "--only-masked",
        "--mask-padding", "8", "--mask-fill", "noise", "--mask-invert", "--mask-from-alpha",
        "--outpaint", "left=8,top=16",
    )  # fmt: skip

    sent = service.requests["CreateJob"][0].generation
    assert (sent.mask_blur, sent.HasField("mask_blur"), sent.mask_padding, sent.mask_fill) == (0.0, True, 8, "noise")
    assert (sent.only_masked, sent.mask_invert, sent.mask_from_alpha) == (True, True, True)
    assert (sent.outpaint_left_px, sent.outpaint_top_px, sent.outpaint_right_px) == (8, 16, 0)


def test_generate_sends_a_variation_and_a_precision(said, service):
    said(
        "generate",
        "a cat",
        "--seed",
        "1",
        "--variation-seed",
        "2",
        "--variation-strength",
        "0.25",
        "--precision",
        "float16",
    )

    sent = service.requests["CreateJob"][0].generation
    assert (sent.seed, sent.variation_seed, sent.variation_strength, sent.precision) == (1, 2, 0.25, "float16")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "error: generation.steps: is 0; must be 1 to 150\n"),
        (
            ["--precision", "float8"],
            "error: generation.precision: is 'float8'; must be float32, float16, bfloat16, or empty\n",
        ),
        (["--scheduler", "eulr"], "error: generation.scheduler: there is no scheduler 'eulr'; near it: euler"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_sent(refused, service, arguments, says):
    code, text = refused("generate", "a cat", *arguments)

    assert (code, text[: len(says)]) == (1, says)
    assert "CreateJob" not in service.requests


def test_what_is_wrong_is_named_as_json(refused):
    printed = json.loads(refused("generate", "a cat", "--count", "33", "--json")[1])["error"]

    assert printed == {
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_FIELD",
        "field": "generation.count",
        "message": "generation.count: is 33; must be 1 to 32",
    }


def test_warnings_are_said_once_on_standard_error(service, capsys):
    service.warnings, service.image_warnings = ["')' closes nothing"], ["two layers\x1b[2J", "two layers\x1b[2J"]
    assert run(["generate", "a cat", "-n", "2", "--json"]) == 0

    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["warning: ')' closes nothing", r"warning: two layers\x1b[2J"]
    assert json.loads(printed.out)["warnings"] == ["')' closes nothing", "two layers\x1b[2J"]
    assert run(["jobs", "show", "j1"]) == 0
    assert "warning: ')' closes nothing" in capsys.readouterr().out


def test_annotate_writes_the_control_image_beside_where_it_runs(said, service):
    Path("photo.jpg").write_bytes(b"an image")

    assert said("annotate", "canny", "photo.jpg", "--param", "low_threshold=50") == "photo-canny.png\n"
    assert Path("photo-canny.png").read_bytes() == IMAGE_BYTES
    assert dict(service.requests["CreateJob"][0].annotation.parameters) == {"low_threshold": 50}


def test_annotate_writes_to_the_file_of_out(said):
    Path("photo.jpg").write_bytes(b"an image")
    printed = said("annotate", "canny", "photo.jpg", "--out", "deep/edges.png", "--json")

    assert printed["path"] == "deep/edges.png"
    assert Path("deep/edges.png").read_bytes() == IMAGE_BYTES


def test_jobs_are_listed_the_newest_first(said):
    said("generate", "a cat")
    said("generate", "a dog")

    assert [job["name"] for job in said("jobs", "list", "--json")] == ["jobs/j2", "jobs/j1"]
    assert said("jobs", "list", "--state", "failed").splitlines()[1:] == []
    assert "a dog" in said("jobs", "list").splitlines()[1]


def test_a_job_is_shown_with_its_tasks_and_images(said):
    said("generate", "a cat", "--seed", "7")

    shown = said("jobs", "show", "j1")
    assert "succeeded" in shown
    assert "sha256:" in shown
    assert said("jobs", "show", "jobs/j1", "--json")["images"][0]["seed"] == 7


def test_a_prompt_cannot_control_the_terminal(said, service):
    job = Job(name="jobs/j1", state=Job.STATE_QUEUED)
    job.generation.prompt = "a \x1bc cat \u202e\x07"
    service.jobs["jobs/j1"] = job

    assert r"a \x1bc cat \u202e\x07" in said("jobs", "list")


EVIL = "a \x1b]0;b\x07 \u202e \x9b31m"
HARMLESS = r"a \x1b]0;b\x07 \u202e \x9b31m"


def test_what_a_worker_says_of_a_job_cannot_control_the_terminal(said, service):
    job = Job(name="jobs/j1", state=Job.STATE_FAILED)
    job.failure.message = job.tasks.add(number=1, stage=EVIL, worker=EVIL).failure.message = EVIL
    service.jobs["jobs/j1"] = job

    printed = said("jobs", "show", "j1")
    assert printed.count(HARMLESS) == 3
    assert all(each.isprintable() for line in printed.split("\n") for each in line)


def test_an_explanation_cannot_control_the_terminal(capsys):
    worker = WorkerExplanation(worker=EVIL, verdict=EVIL, why=EVIL)
    task = TaskExplanation(task=1, stage=EVIL, why=EVIL, needs=[EVIL], workers=[worker])
    estimate = JobEstimate(fetch_bytes=1, node=EVIL)
    print_explanation(JobExplanation(name="jobs/j1", summary=EVIL, estimate=estimate, tasks=[task]))

    printed = capsys.readouterr().out
    assert printed.count(HARMLESS) == 8
    assert all(each.isprintable() for line in printed.split("\n") for each in line)


def test_json_says_the_same_with_escapes(said, service):
    job = Job(name="jobs/j1", state=Job.STATE_FAILED)
    job.failure.message = f"{EVIL} 木 \U000e0041"
    service.jobs["jobs/j1"] = job

    assert said("jobs", "show", "j1", "--json")["failure"]["message"] == job.failure.message
    text = printable_json(json.dumps(EVIL, ensure_ascii=False))
    assert text.isprintable()
    assert json.loads(text) == EVIL


def test_a_waiting_job_shows_why_its_last_attempt_failed(said, service):
    job = Job(name="jobs/j1", state=Job.STATE_QUEUED)
    failure = job.tasks.add(number=1, stage="diffusion", attempts=1).failure
    failure.field, failure.message = "generation.model", "the source cannot be reached"
    service.jobs["jobs/j1"] = job

    assert "task 1, last attempt: generation.model: the source cannot be reached" in said("jobs", "show", "j1")


def test_a_watch_prints_a_line_for_each_event(said, capsys, service):
    service.jobs["jobs/j1"] = Job(name="jobs/j1", state=Job.STATE_QUEUED, revision=1)
    assert run(["jobs", "watch", "j1", "--json"]) == 0

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(event)) for event in events] == ["job", "progress", "job"]
    assert events[-1]["job"]["state"] == "STATE_SUCCEEDED"


def test_a_job_is_cancelled(said, service):
    service.jobs["jobs/j1"] = Job(name="jobs/j1", state=Job.STATE_QUEUED, revision=1)

    assert "cancelled" in said("jobs", "cancel", "j1")


def test_a_job_is_explained(said, service):
    service.jobs["jobs/j1"] = Job(name="jobs/j1", state=Job.STATE_QUEUED, revision=1)

    text = said("jobs", "explain", "j1")
    assert "ready in about 7 s, 0 tasks ahead, 150 MB to fetch on home over 100 Mbit/s" in text
    assert "task 1 (diffusion) waits: v should begin it in 2.0 s" in text
    assert "it would finish in 9.0 s" in text
    assert said("jobs", "explain", "j1", "--json")["tasks"][0]["workers"][0]["verdict"] == "slower"


def test_a_model_is_shown_with_its_defaults(said, refused):
    text = said("models", "show", "Starter")
    assert "guidance scale  1.5" in text
    assert "scheduler       lcm" in text
    assert "defaults from   lcm by name" in text
    assert said("models", "show", "starter", "--json")[0]["defaults"]["steps"] == 4
    assert "no worker offers a model 'startr'; near it: starter" in refused("models", "show", "startr")[1]
    assert refused("models", "tell", "starter")[0] == refused("models", "show")[0] == 1


def test_annotators_models_and_workers_are_listed(said):
    assert [annotator["id"] for annotator in said("annotators", "--json")] == ["canny"]
    assert said("models", "--json")[0]["size_bytes"] == 13_000_000
    assert [status["worker"]["stage"] for status in said("workers", "--json")] == ["preprocess", "diffusion"]
    assert "low_threshold=100" in said("annotators")
    assert "starter" in said("models")
    assert said("models", "--left-out").split("\n")[1].split() == ["Lora/old.ckpt", "it", "is", "a", "pickle", "here"]
    assert said("models", "--left-out", "--json")[0]["reason"] == "it is a pickle"
    assert "0/2" in said("workers")
    assert "embedding:oldstyle until 2027-01-15T08:00:00Z: 2 jobs failed there by it" in said("workers")


def test_parameters_of_all_annotators_are_printed_once(said, service):
    service.annotators.append(Annotator(id="invert"))
    for annotator in service.annotators:
        annotator.parameters.add(name="short_side_px")

    text = said("annotators")
    assert "low_threshold=100" in text
    assert text.endswith("\nall annotators also take short_side_px\n")
    assert text.count("short_side_px") == 1


def test_a_failed_job_is_one_line_and_code_1(refused):
    assert refused("generate", "fail") == (1, "error: jobs/j1 failed: generation.prompt: is too odd\n")


def test_an_error_is_json_where_json_was_asked_for(refused):
    code, text = refused("jobs", "show", "none", "--json")

    assert code == 1
    assert json.loads(text)["error"] == {
        "code": "NOT_FOUND", "reason": "NOT_FOUND", "field": "name", "message": "name: there is no jobs/none",
    }  # fmt: skip


def test_an_image_that_does_not_exist_is_named(refused):
    code, text = refused("generate", "a cat", "--control", "canny=none.png")

    assert (code, text) == (1, "error: none.png: cannot be read: No such file or directory\n")


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_sent(refused, service):
    Path("taken").touch()
    Path("in.png").write_bytes(b"an image")

    refusal = (1, "error: taken: cannot be created: File exists\n")
    assert refused("generate", "a cat", "--out", "taken") == refusal
    assert refused("annotate", "canny", "in.png", "--out", "taken/out.png") == refusal
    assert "CreateJob" not in service.requests


def test_a_malformed_address_is_refused_at_once(refused):
    for address in ("gateway", "http://127.0.0.1:8080", ":50051"):
        code, text = refused("models", "--gateway", address)
        assert (code, text.startswith(f"error: {address}: must be HOST:PORT")) == (1, True)


def test_an_http_address_is_reported_as_such(refused, monkeypatch):
    monkeypatch.setitem(AsyncClient.__init__.__kwdefaults__, "connect_s", 0)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, text = refused("models", "--gateway", f"127.0.0.1:{server.server_port}")
        server.shutdown()

    assert (code, "but not with gRPC" in text) == (1, True)


def test_roots_that_cannot_be_read_are_named(refused, monkeypatch):
    monkeypatch.setenv("FANLIGHT_TLS_CA_FILE", "none.pem")

    assert refused("models") == (1, "error: none.pem: cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "a cat", "--size", "big"],
        ["generate", "a cat", "--control", "canny"],
        ["generate", "a cat", "--steps", "many"],
        ["jobs", "list", "--state", "lost"],
        ["annotate", "canny", "in.png", "--param", "x"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(refused, arguments):
    code, text = refused(*arguments)

    assert code == 2
    assert text.count("\n") == 1
    assert text.startswith("error: ")
    assert "--help`" in text


def test_an_unreachable_gateway_is_reported_with_advice(refused, unused_tcp_port, monkeypatch):
    monkeypatch.setitem(AsyncClient.__init__.__kwdefaults__, "connect_s", 0)
    code, text = refused("models", "--gateway", f"127.0.0.1:{unused_tcp_port}")

    assert code == 1
    assert text == (
        f"error: cannot reach the gateway at 127.0.0.1:{unused_tcp_port}: "
        "start one with `fanlight up`, or name another with --gateway\n"
    )


def test_the_token_comes_from_the_environment_or_a_file(said, refused, service, monkeypatch, tmp_path):
    with serving_beside(FakeJobService(), token="secret") as guarded:
        monkeypatch.setenv("FANLIGHT_GATEWAY", guarded)
        assert "FANLIGHT_TOKEN" in refused("models")[1]
        monkeypatch.setenv("FANLIGHT_TOKEN", "secret")
        assert "starter" in said("models")
        monkeypatch.delenv("FANLIGHT_TOKEN")
        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setenv("FANLIGHT_TOKEN_FILE", str(tmp_path / "token"))
        assert "starter" in said("models")


@pytest.mark.parametrize("token", ["two\nlines", "t\u00f6ken"])
def test_a_token_that_no_header_can_carry_is_refused(refused, monkeypatch, token):
    monkeypatch.setenv("FANLIGHT_TOKEN", token)

    code, text = refused("models")
    assert (code, text.startswith("error: the token has characters")) == (1, True)


@pytest.fixture
def heeds_ctrl_c():
    """Whoever starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_while_it_waits_cancels_the_job(refused, service):
    def interrupt():
        while "WatchJob" not in service.requests:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()

    assert refused("generate", "forever")[0] == 130
    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_that_does_not_wake_the_waiting_thread_cancels_the_job_too(refused, service):
    """As one does that arrives just before the wait begins."""
    has_ended = threading.Event()
    was_in_time = []

    def interrupt():
        while "WatchJob" not in service.requests:
            threading.Event().wait(0.01)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        was_in_time.append(has_ended.wait(30))
        if not was_in_time[0]:
            os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()

    assert refused("generate", "forever")[0] == 130
    has_ended.set()
    interrupting.join()
    assert was_in_time == [True]
    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


def test_dead_letters_are_listed_shown_and_redriven(service, said):
    assert "jobs/j1/tasks/2" in said("dead", "list").splitlines()[1]
    assert said("dead", "list", "--json")[0]["tenant"] == "acme"
    shown = said("dead", "show", "jobs/j1/tasks/2")
    assert "NODE_FAULT: out of memory" in shown
    assert "vanished" in shown
    service.jobs["jobs/j1"] = Job(name="jobs/j1", state=Job.STATE_QUEUED, revision=9)
    assert "queued" in said("dead", "redrive", "jobs/j1/tasks/2")
    assert service.requests["RedriveDeadLetter"][0].task == "jobs/j1/tasks/2"


def test_the_tries_of_a_webhook_are_shown(said):
    shown = said("jobs", "webhook", "j1")
    assert "https://example.com/h: pending" in shown
    assert "no answer within 15 s" in shown
