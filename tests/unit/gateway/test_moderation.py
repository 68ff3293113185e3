"""The operator's moderation: policies that requests can only make stricter, and the hook before and after the work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from fanlight.client import AsyncClient
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import (
    CallFailed,
    ContentBlocked,
    FailedPrecondition,
    ModerationUnavailable,
    ResourceExhausted,
    Unavailable,
)
from services.gateway.app.completion import Renewal
from services.gateway.app.moderation import TAKEOVER_S, UNJUDGED
from services.gateway.app.tenants import Caller, Tenant, callers_of
from services.gateway.app.watch import TaskProgress
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job, JobState, TaskState
from services.gateway.domain.moderation import POLICIES, ContentVerdict, Decision, Policy, stricter, verdict_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.wire import answers, stages
from tests.fakes.fleet import OTHER, STARTER, STARTER_CANNY, Fleet, FleetWorker, annotation, generation, result
from tests.fakes.moderation import ALLOW, BLOCK, BLUR, FLAG, FakeHook, options
from tests.fakes.rpc_gateway import serving

ACME, OTHERS = Caller(tenant="acme"), Caller(tenant="others")
TOKEN, ACME_TOKEN = "operator-0123456789", "acme-0123456789-x"
CHECKS = tuple(f"safety_checker:{policy}" for policy in POLICIES[1:])


@asynccontextmanager
async def moderated(
    hook: FakeHook | None = None, *, fleet: Fleet | None = None, **changes: Any
) -> AsyncIterator[Fleet]:
    fleet = fleet or Fleet(settings={"moderation_policy": "flag"})
    if hook is not None:
        fleet.gateway.moderation.use(options(hook, **changes))
    async with fleet.running() as running:
        await checker(running).come()
        yield running


def checker(fleet: Fleet) -> FleetWorker:
    models = (STARTER, OTHER, STARTER_CANNY)
    return fleet.worker(DIFFUSION, models=models, other_offers=CHECKS)


async def ended(fleet: Fleet, job: Job, caller: Caller = ACME) -> Job:
    return await fleet.gateway.jobs.wait(job.name, wait_s=5.0, caller=caller)


async def create(fleet: Fleet, caller: Caller = ACME, **fields: Any) -> Job:
    return await fleet.gateway.jobs.create(generation(workers=fleet.gateway.workers.offers, **fields), caller)


async def until_asked(hook: FakeHook, count: int) -> None:
    async with asyncio.timeout(5):
        while len(hook.asked) < count:
            hook.arrived.clear()
            await hook.arrived.wait()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("asked", ["", *POLICIES])
async def test_a_request_makes_the_tenants_policy_only_stricter(policy: Policy, asked: str) -> None:
    order = ["off", "flag", "blur", "block"]
    expected = max(asked or "off", policy.value, key=order.index)
    async with moderated(fleet=Fleet()) as fleet:
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy=policy))
        job = await create(fleet, safety_checker=asked)
        sent = answers.job(job).generation.safety_checker
        assert (sent or "off") == expected
        needs = {need for need in job.request.facts.needs if need.startswith("safety_checker")}
        assert needs == (set() if expected == "off" else {f"safety_checker:{expected}"})
        [task] = await checker(fleet).lease()
        assert (packed(task).safety_checker or "off") == expected
        told = [each for each in job.warnings if "policy" in each]
        assert bool(told) == (bool(asked) and asked != expected)


def packed(task: Any) -> Any:
    message = stages.STAGES[DIFFUSION].request_type()
    stages.request_for(task.job, task.task).Unpack(message)
    return message


async def test_the_gateways_default_counts_for_tenants_without_a_policy() -> None:
    async with moderated(fleet=Fleet(settings={"moderation_policy": "block"})) as fleet:
        assert answers.job(await create(fleet)).generation.safety_checker == "block"
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy=Policy.OFF))
        assert answers.job(await create(fleet)).generation.safety_checker == ""


async def test_a_policy_that_no_worker_can_keep_refuses_the_request() -> None:
    fleet = Fleet(settings={"moderation_policy": "block"})
    async with fleet.running():
        await fleet.worker(DIFFUSION).come()
        with pytest.raises(FailedPrecondition) as refused:
            await create(fleet)
        assert refused.value.field == "generation.safety_checker"


async def test_the_check_goes_to_the_nodes_of_the_policys_pool_alone() -> None:
    async with moderated() as fleet:
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy_pool="trusted"))
        with pytest.raises(FailedPrecondition, match="no worker of the pool trusted"):
            await create(fleet)
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy=Policy.OFF))
        assert (await create(fleet)).pool == ""
        await fleet.gateway.quotas.change(
            "acme", lambda tenant: replace(tenant, policy=Policy.FLAG, policy_pool="trusted", pool="acmes")
        )
        with pytest.raises(FailedPrecondition, match="ask the operator"):
            await create(fleet)


async def test_what_the_hook_blocks_is_refused_before_a_job_exists() -> None:
    hook = FakeHook(of_requests=BLOCK)
    async with moderated(hook) as fleet:
        with pytest.raises(ContentBlocked, match="no knives here"):
            await create(fleet, prompt="a knife", negative_prompt="blunt")
        assert (await fleet.gateway.jobs.list(page_size=0, page_token="")).jobs == []
    [asked] = hook.asked
    assert (asked.prompt, asked.negative_prompt, asked.tenant) == ("a knife", "blunt", "acme")
    assert (asked.job, asked.policy, asked.stage) == ("", "flag", DIFFUSION)


async def test_the_hook_is_asked_with_the_requests_images_and_with_their_bytes_where_it_should() -> None:
    hook = FakeHook(of_requests=BLOCK)
    for sends_bytes, limit in ((False, 10_000), (True, 10_000), (True, 8)):
        async with moderated(hook, sends_bytes=sends_bytes, body_limit_bytes=limit) as fleet:
            await fleet.worker(PREPROCESS).come()
            with pytest.raises(ContentBlocked):
                await fleet.gateway.jobs.create(annotation(), ACME)
    digest, data, left_out = (asked.images[0] for asked in hook.asked)
    assert digest.field == "annotation.image"
    assert digest.blob.scope == "acme"
    assert (digest.data, left_out.data) == (b"", b"")
    assert len(data.data) == data.blob.size_bytes > 8


@pytest.mark.parametrize(
    ("verdict", "checker_mode", "labels"), [(ALLOW, "flag", []), (FLAG, "flag", ["violence"]), (BLUR, "blur", [])]
)
async def test_what_the_hook_lets_pass_is_marked_and_checked_more_strictly(
    verdict: ContentVerdict, checker_mode: str, labels: list[str]
) -> None:
    async with moderated(FakeHook(of_requests=verdict)) as fleet:
        shown = answers.job(await create(fleet))
        assert (shown.generation.safety_checker, list(shown.labels)) == (checker_mode, labels)


async def test_a_tenant_whose_policy_is_off_is_not_judged() -> None:
    hook = FakeHook(of_requests=BLOCK, of_results=BLOCK)
    async with moderated(hook, fleet=Fleet()) as fleet:
        job = await create(fleet)
        await checker(fleet).work()
        assert (await ended(fleet, job)).state is JobState.SUCCEEDED
    assert hook.asked == []


@pytest.mark.parametrize("verdict", [BLOCK, BLUR])
async def test_a_result_that_the_hook_blocks_is_withheld(verdict: ContentVerdict) -> None:
    hook = FakeHook(of_results=verdict)
    async with moderated(hook, sends_bytes=True) as fleet:
        job = await create(fleet)
        await checker(fleet).work()
        done = await ended(fleet, job)
        assert (done.state, done.failure and done.failure.reason) == (JobState.FAILED, "CONTENT_BLOCKED")
        assert verdict.reason in str(done.failure)
        assert not done.tasks[0].outputs
        assert not answers.job(done).images
    _, asked = hook.asked
    assert (asked.job, asked.task, asked.id) == (job.name, 1, f"{job.id}.1")
    assert asked.images[0].data.startswith(b"\x89PNG")


async def test_a_result_that_passes_has_the_hooks_labels() -> None:
    async with moderated(FakeHook(of_results=FLAG)) as fleet:
        job = await create(fleet, count=2)
        await checker(fleet).work()
        done = await ended(fleet, job)
        assert done.state is JobState.SUCCEEDED
        assert [list(image.labels) for image in answers.job(done).images] == [["violence"], ["violence"]]


async def test_nobody_sees_a_result_before_its_verdict() -> None:
    hook = FakeHook(of_results=None)
    async with moderated(hook, timeout_s=30.0) as fleet:
        job = await create(fleet)
        worker = checker(fleet)
        await worker.work()
        await until_asked(hook, 2)
        waiting = await fleet.gateway.jobs.get(job.name, ACME)
        assert (waiting.state, waiting.tasks[0].state) == (JobState.RUNNING, TaskState.JUDGING)
        assert not answers.job(waiting).images
        assert "moderation" in fleet.gateway.explanations.of(waiting).summary
        assert not list(fleet.gateway._leases.of_worker(worker.worker.id))
        after = await fleet.gateway.jobs.cancel(job.name, ACME)
        assert (after.state, after.tasks[0].outputs) == (JobState.CANCELLED, ())


@pytest.mark.parametrize("trouble", [None, Unavailable("HTTP 500"), FailedPrecondition("garbage")])
async def test_a_hook_without_an_answer_costs_its_timeout_and_lets_nothing_pass_when_closed(trouble: Any) -> None:
    hook = FakeHook(of_requests=trouble)
    async with moderated(hook) as fleet:
        with pytest.raises(ModerationUnavailable) as refused:
            await create(fleet)
        assert refused.value.retry_after_s
        hook.of_requests, hook.of_results = ALLOW, trouble
        job = await create(fleet)
        await checker(fleet).work()
        done = await ended(fleet, job)
        assert done.failure is not None
        assert done.failure.reason == "MODERATION_UNAVAILABLE"


@pytest.mark.parametrize("trouble", [None, Unavailable("HTTP 500"), FailedPrecondition("garbage")])
async def test_a_hook_without_an_answer_lets_all_pass_with_a_label_when_open(trouble: Any) -> None:
    async with moderated(FakeHook(of_requests=trouble, of_results=trouble), fails_open=True) as fleet:
        job = await create(fleet)
        await checker(fleet).work()
        shown = answers.job(await ended(fleet, job))
        assert (list(shown.labels), [list(each.labels) for each in shown.images]) == ([UNJUDGED], [[UNJUDGED]])


async def test_a_hook_that_is_away_for_a_moment_is_asked_again_within_its_time() -> None:
    hook = FakeHook(of_requests=Unavailable("away"))
    async with moderated(hook, timeout_s=10.0) as fleet:
        asking = asyncio.create_task(create(fleet))
        await until_asked(hook, 1)
        hook.of_requests = ALLOW
        assert (await asking).state is JobState.QUEUED
    assert len({asked.id for asked in hook.asked}) == 1


async def test_a_hook_that_hangs_on_one_tenant_holds_up_that_tenant_alone() -> None:
    hook = FakeHook(hangs_for="acme")
    async with moderated(hook, timeout_s=30.0, places=2) as fleet:
        hanging = [asyncio.create_task(create(fleet)) for _ in range(2)]
        await until_asked(hook, 2)
        with pytest.raises(ResourceExhausted, match="moderation"):
            await create(fleet)
        job = await create(fleet, OTHERS)
        await checker(fleet).work()
        assert (await ended(fleet, job, OTHERS)).state is JobState.SUCCEEDED
        for each in hanging:
            each.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        hook.hangs_for = ""
        assert (await create(fleet)).state is JobState.QUEUED


async def test_results_of_one_tenant_wait_for_places_of_their_own() -> None:
    hook = FakeHook()
    async with moderated(hook, timeout_s=30.0, places=2) as fleet:
        jobs = [await create(fleet) for _ in range(4)]
        hook.asked.clear()
        hook.of_results = None
        await checker(fleet).work()
        await until_asked(hook, 2)
        hook.of_results = ALLOW
        job = await create(fleet, OTHERS)
        await checker(fleet).work()
        assert (await ended(fleet, job, OTHERS)).state is JobState.SUCCEEDED
        assert len({each.id for each in hook.asked if each.tenant == "acme" and each.job}) == 2
        for each in jobs:
            await fleet.gateway.jobs.cancel(each.name, ACME)


async def test_a_gateway_that_is_killed_before_the_verdict_judges_again_and_delivers_once() -> None:
    first = FakeHook(of_results=None)
    fleet = Fleet(settings={"moderation_policy": "flag"})
    async with moderated(first, fleet=fleet, timeout_s=30.0):
        job = await create(fleet)
        await checker(fleet).work()
        await until_asked(first, 2)
    second = FakeHook(of_results=FLAG)
    again = fleet.restarted()
    async with moderated(second, fleet=again):
        done = await ended(again, job)
        assert done.state is JobState.SUCCEEDED
        assert done.tasks[0].outputs[0].labels == ("violence",)
        assert await checker(again).lease() == []
    assert [each.id for each in second.asked] == [first.asked[1].id]


async def test_without_a_hook_that_it_was_promised_a_result_is_withheld() -> None:
    fleet = Fleet(settings={"moderation_policy": "flag"})
    async with moderated(FakeHook(of_results=None), fleet=fleet, timeout_s=30.0):
        job = await create(fleet)
        await checker(fleet).work()
    again = fleet.restarted()
    async with moderated(fleet=again):
        done = await ended(again, job)
        assert done.failure is not None
        assert done.failure.reason == "MODERATION_UNAVAILABLE"


async def test_another_gateway_asks_only_after_a_while() -> None:
    hook, other = FakeHook(of_results=None), FakeHook()
    fleet = Fleet(settings={"moderation_policy": "flag"}, is_shared=True)
    beside = fleet.restarted()
    async with moderated(hook, fleet=fleet, timeout_s=30.0), moderated(other, fleet=beside):
        job = await create(fleet)
        await checker(fleet).work()
        await until_asked(hook, 2)
        assert other.asked == []
        fleet.clock.advance(TAKEOVER_S)
        assert (await ended(beside, job)).state is JobState.SUCCEEDED
        assert len(other.asked) == 1
        assert (await ended(fleet, job)).state is JobState.SUCCEEDED


async def test_a_cached_control_image_is_no_way_around_the_hook() -> None:
    hook = FakeHook()
    async with moderated(hook) as fleet:
        worker = fleet.worker(PREPROCESS)
        await worker.come()
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy=Policy.OFF))
        before = await fleet.gateway.jobs.create(annotation(), ACME)
        await worker.work()
        assert (await ended(fleet, before)).state is JobState.SUCCEEDED
        await fleet.gateway.quotas.change("acme", lambda tenant: replace(tenant, policy=Policy.FLAG))
        hook.of_results = BLOCK
        judged = await fleet.gateway.jobs.create(annotation(), ACME)
        assert await worker.work() == 1
        assert (await ended(fleet, judged)).state is JobState.FAILED


@pytest.mark.parametrize(("mode", "is_shown"), [("", True), ("flag", True), ("blur", False), ("block", False)])
async def test_previews_do_not_show_what_may_be_hidden(mode: str, is_shown: bool) -> None:
    async with moderated(fleet=Fleet()) as fleet:
        assert await previews(fleet, mode) == ([True] if is_shown else [False])


async def test_previews_of_judged_jobs_are_not_shown() -> None:
    async with moderated(FakeHook()) as fleet:
        assert await previews(fleet, "") == [False]


async def previews(fleet: Fleet, mode: str) -> list[bool]:
    """Whether each progress that a watcher gets has a preview."""
    job = await create(fleet, safety_checker=mode)
    worker = checker(fleet)
    [task] = await worker.lease()
    watching = fleet.gateway.jobs.watch(job.name, caller=ACME)
    await anext(watching)
    progress = TaskProgress(task=1, step=1, steps=4, preview=result(8, 8, b"p"))
    await fleet.gateway.queue.renew(worker.worker.id, [Renewal(token=task.token, progress=progress)])
    async for news in watching:
        if isinstance(news, TaskProgress):
            return [bool(news.preview)]
    return []


def test_the_stricter_of_two_policies_counts() -> None:
    assert [stricter(Policy.BLUR, each) for each in POLICIES] == [Policy.BLUR, Policy.BLUR, Policy.BLUR, Policy.BLOCK]


def test_what_a_hook_says_is_bounded_and_printable() -> None:
    said = verdict_of(Decision.BLOCK, ["a\x1b[2J" + "b" * 100] * 50, "why\n" * 1_000)
    assert (len(said.labels), len(said.labels[0]), len(said.reason)) == (16, 64, 300)
    assert (said.labels[0] + said.reason).isprintable()


@asynccontextmanager
async def calling(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    callers = callers_of(TOKEN, [Tenant(name="acme", token=ACME_TOKEN)], fleet.gateway.keys)
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        yield client


async def test_an_operator_sets_a_tenants_policy_over_http() -> None:
    operator = {"X-Api-Key": TOKEN}
    async with moderated(fleet=Fleet()) as fleet, calling(fleet) as client:
        path = "/v1/tenants/acme"
        changed = await client.patch(path, headers=operator, json={"policy": "blur", "policy_pool": "trusted"})
        assert (changed.json()["policy"], changed.json()["policy_pool"]) == ("blur", "trusted")
        assert fleet.gateway.moderation.policy_of("acme") is Policy.BLUR
        cleared = await client.patch(path, headers=operator, json={"policy": "", "policy_pool": ""})
        assert cleared.json()["policy"] == ""
        assert fleet.gateway.moderation.policy_of("acme") is Policy.OFF
        for body, field in (
            ({"policy": "none"}, "policy"),
            ({"policy_pool": "Not A Pool"}, "policy_pool"),
            ({"pool": "acmes", "policy_pool": "trusted"}, "policy_pool"),
        ):
            refused = await client.patch(path, headers=operator, json=body)
            assert (refused.status_code, refused.json()["error"]["field"]) == (400, field)
        own = await client.patch(path, headers={"X-Api-Key": ACME_TOKEN}, json={"policy": "off"})
        assert own.status_code == 403


async def test_a_blocked_request_is_a_typed_error_over_http_and_grpc() -> None:
    hook = FakeHook(of_requests=BLOCK)
    async with moderated(hook) as fleet:
        async with calling(fleet) as client:
            asked = {"generation": {"prompt": "a knife", "model": "starter"}}
            refused = await client.post("/v1/jobs", headers={"X-Api-Key": ACME_TOKEN}, json=asked)
            assert (refused.status_code, refused.json()["error"]["reason"]) == (403, "CONTENT_BLOCKED")
            assert "no knives here" in refused.json()["error"]["message"]
            hook.of_requests = None
            later = await client.post("/v1/jobs", headers={"X-Api-Key": ACME_TOKEN}, json=asked)
            assert (later.status_code, later.json()["error"]["reason"]) == (503, "MODERATION_UNAVAILABLE")
            assert later.headers["retry-after"]
        hook.of_requests = BLOCK
        async with serving(fleet) as address, AsyncClient(address) as rpc:
            with pytest.raises(CallFailed) as caught:
                await rpc.create_job(GenerateRequest(prompt="a knife", model="starter"))
            assert (caught.value.code, caught.value.reason) == ("PERMISSION_DENIED", "CONTENT_BLOCKED")
