"""For people and machines that run a fleet: what workers offer, the queue, dead letters, metrics and health."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.app.jobs import PAGE_SIZE, PAGE_SIZE_LIMIT
from services.gateway.app.queue_index import QueueLine
from services.gateway.app.readiness import require_ready
from services.gateway.app.tenants import Caller
from services.gateway.domain.keys import Right
from services.gateway.http import docs
from services.gateway.http.bodies import MetricsReader, QueueReader, Reader, Submitter, refuse_unknown
from services.gateway.http.json_messages import answer, of_value
from services.gateway.wire import answers


class ListingRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/annotators", self.annotators, methods=["GET"], tags=["annotators"], **docs.LIST_ANNOTATORS)
        add("/v1/models", self.models, methods=["GET"], tags=["models"], **docs.LIST_MODELS)
        add("/v1/workers", self.workers, methods=["GET"], tags=["workers"], **docs.LIST_WORKERS)
        add("/v1/queue", self.queue, methods=["GET"], tags=["workers"], **docs.QUEUE)
        return router

    async def annotators(self, caller: Reader) -> Response:
        return answer(answers.annotators(self._gateway.workers.offers))

    async def models(
        self,
        caller: Reader,
        left_out: Annotated[
            bool, Query(description="Also list what workers found among their models and do not use; operator only.")
        ] = False,
    ) -> Response:
        if left_out:
            caller.require(Right.OPERATE)
        return answer(answers.models(self._gateway.workers.offers, left_out=left_out))

    async def workers(self, caller: Reader) -> Response:
        statuses = [caller.without_secrets(each) for each in self._gateway.workers.statuses()]
        return answer(gateway_pb2.ListWorkersResponse(workers=[answers.worker_status(each) for each in statuses]))

    async def queue(self, caller: QueueReader) -> Response:
        return of_value({"lines": [_line(line) for line in self._gateway.queue.statistics(caller)]})


def _line(line: QueueLine) -> dict[str, object]:
    return {
        "stage": line.stage,
        "checkpoint": line.checkpoint,
        "waiting": line.waiting,
        "blocked": line.blocked,
        "leased": line.leased,
        "oldest_age_s": round(line.oldest_age_s, 3),
    }


class DeadLetterRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["dead letters"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        one = "/v1/dead-letters/jobs/{job_id}/tasks/{number}"
        add("/v1/dead-letters", self.list, methods=["GET"], **docs.LIST_DEAD_LETTERS)
        add(f"{one}:redrive", self.redrive, methods=["POST"], **docs.REDRIVE_DEAD_LETTER)
        add(one, self.get, methods=["GET"], **docs.GET_DEAD_LETTER)
        return router

    async def list(
        self,
        caller: Reader,
        page_size: Annotated[int, Query(ge=0, le=PAGE_SIZE_LIMIT, description=f"0 means {PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or PAGE_SIZE
        letters = await self._gateway.dead_letters.page(before=page_token, limit=size, caller=caller)
        return answer(answers.dead_letters(letters, size))

    async def get(self, job_id: str, number: str, caller: Reader) -> Response:
        letter = await self._gateway.dead_letters.get(f"jobs/{job_id}/tasks/{number}", caller)
        return answer(answers.dead_letter(letter))

    async def redrive(self, job_id: str, number: str, caller: Submitter) -> Response:
        job = await self._gateway.redrives.redrive(f"jobs/{job_id}/tasks/{number}", caller)
        return answer(answers.job(self._gateway.explanations.with_estimate(job)))


class MetricRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"], dependencies=[Depends(refuse_unknown)])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], **docs.METRICS)
        return router

    async def metrics(
        self, caller: MetricsReader, accept: Annotated[str, Header(include_in_schema=False)] = ""
    ) -> Response:
        # The library's default registry is one per process, and has metrics of the process too.
        registry = CollectorRegistry()
        registry.register(GatewayCollector(self._gateway, caller))
        encode, media_type = choose_encoder(accept)
        return Response(encode(registry), headers={"Content-Type": media_type})


class GatewayCollector(Collector):
    """Reads the gateway's figures when Prometheus scrapes them; counts nothing itself.

    A tenant sees its own tasks; figures of all tenants together, such as the cache's, are the operator's.
    """

    def __init__(self, gateway: Gateway, caller: Caller) -> None:
        self._gateway = gateway
        self._caller = caller

    def collect(self) -> Iterator[Metric]:
        if self._caller.sees_fleet:
            yield from self._cache()
            yield from self._records()
        yield from self._queue()
        yield from self._workers()

    def _records(self) -> Iterator[Metric]:
        name, words = "fanlight_damaged_records", "Records of the store that cannot be read."
        family = GaugeMetricFamily(name, words, labels=("bucket",))
        for bucket, count in sorted(self._gateway.records.damaged_counts.items()):
            family.add_metric((bucket,), count)
        yield family

    def _cache(self) -> Iterator[Metric]:
        figures = self._gateway.cache_figures
        yield CounterMetricFamily("fanlight_cache_hits_total", "Control images found.", value=figures.hits)
        yield CounterMetricFamily("fanlight_cache_misses_total", "Control images not found.", value=figures.misses)
        yield GaugeMetricFamily("fanlight_cache_entries", "Control images in the cache.", value=figures.entries)
        yield GaugeMetricFamily("fanlight_cache_bytes", "Bytes in the cache.", value=figures.size_bytes)
        yield GaugeMetricFamily("fanlight_cache_budget_bytes", "Limit of these bytes.", value=figures.budget_bytes)

    def _queue(self) -> Iterator[Metric]:
        lines = list(self._gateway.queue.statistics(self._caller))
        for name in ("waiting", "blocked", "leased", "oldest_age_s"):
            family = GaugeMetricFamily(f"fanlight_queue_{name}", "As in /v1/queue.", labels=("stage", "checkpoint"))
            for line in lines:
                family.add_metric((line.stage, line.checkpoint), float(getattr(line, name)))
            yield family

    def _workers(self) -> Iterator[Metric]:
        live: dict[str, int] = {}
        for status in self._gateway.workers.statuses():
            live[status.worker.stage] = live.get(status.worker.stage, 0) + status.live
        family = GaugeMetricFamily("fanlight_workers_live", "Workers that are live.", labels=("stage",))
        for stage, count in sorted(live.items()):
            family.add_metric((stage,), count)
        yield family


class HealthRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"])
        router.add_api_route("/healthz", self.alive, methods=["GET"], **docs.HEALTHZ)
        router.add_api_route("/readyz", self.ready, methods=["GET"], **docs.READYZ)
        return router

    async def alive(self) -> Response:
        return of_value({"status": "alive"})

    async def ready(self) -> Response:
        await require_ready(self._gateway)
        return of_value({"status": "ready"})
