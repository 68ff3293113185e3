"""/v1/annotators, /v1/models, /v1/workers, /v1/queue"""

from dataclasses import replace

import httpx

from services.gateway.app.queue_index import QueueLine
from services.gateway.domain.workers import AnnouncedLeftOut, Worker, WorkerStatus
from tests.fakes.gateway import FakeGateway


async def test_annotators_are_listed_with_their_parameters(client: httpx.AsyncClient) -> None:
    (canny,) = (await client.get("/v1/annotators")).json()["annotators"]
    assert canny["id"] == "canny"
    threshold, *_ = canny["parameters"]
    assert threshold == {
        "name": "low_threshold",
        "kind": "KIND_INTEGER",
        "description": "",
        "default_value": 100.0,
        "minimum": 0.0,
        "maximum": 255.0,
        "choices": [],
    }


async def test_models_are_listed(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()["models"]
    assert [(model["id"], model["kind"]) for model in models] == [("starter", "checkpoint"), ("canny", "controlnet")]


async def test_what_workers_do_not_use_is_listed_on_request(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    left_out = AnnouncedLeftOut(path="Lora/old.ckpt", reason="it is a pickle")
    gateway.workers.capabilities = replace(gateway.workers.capabilities, left_out=(left_out,), left_out_count=1)
    listed = (await client.get("/v1/models", params={"left_out": "true"})).json()
    assert listed["left_out"] == [{"path": "Lora/old.ckpt", "reason": "it is a pickle", "nodes": ["node"]}]
    assert (len(listed["models"]), listed["left_out_count"]) == (2, 1)
    assert (await client.get("/v1/models")).json()["left_out"] == []
    wrong = await client.get("/v1/models", params={"left_out": "perhaps"})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (400, "left_out")


async def test_a_list_of_nothing_is_a_list(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/workers")).json() == {"workers": []}
    assert (await client.get("/v1/jobs")).json() == {"jobs": [], "next_page_token": ""}
    assert (await client.get("/v1/queue")).json() == {"lines": []}


async def test_workers_are_listed(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    worker = Worker(id="w1", node="n1", stage="diffusion")
    gateway.workers.known = [WorkerStatus(worker=worker, last_poll_time_s=0.0, live=True, tasks=("jobs/1/tasks/1",))]
    (listed,) = (await client.get("/v1/workers")).json()["workers"]
    assert (listed["worker"]["id"], listed["live"], listed["tasks"]) == ("w1", True, ["jobs/1/tasks/1"])


async def test_the_queue_reports_how_much_waits(client: httpx.AsyncClient, gateway: FakeGateway) -> None:
    gateway.queue.lines = [
        QueueLine(stage="diffusion", checkpoint="starter", waiting=3, blocked=1, leased=2, oldest_age_s=1.23456)
    ]
    assert (await client.get("/v1/queue")).json() == {
        "lines": [
            {
                "stage": "diffusion",
                "checkpoint": "starter",
                "waiting": 3,
                "blocked": 1,
                "leased": 2,
                "oldest_age_s": 1.235,
            }
        ]
    }
