"""`/metrics`: figures for Prometheus, for those who watch and scale a fleet. The library writes the text."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from services.gateway.app.gateway import Gateway
from services.gateway.http import documents
from services.gateway.http.parameters import refuse_unknown


class MetricRoutes:
    def __init__(self, gateway: Gateway) -> None:
        # The library's own registry is one per process, and also counts what the process does.
        self._registry = CollectorRegistry()
        self._registry.register(GatewayCollector(gateway))

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"], dependencies=[Depends(refuse_unknown)])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], **documents.METRICS)
        return router

    async def metrics(self, accept: Annotated[str, Header(include_in_schema=False)] = "") -> Response:
        encode, media_type = choose_encoder(accept)
        return Response(encode(self._registry), headers={"Content-Type": media_type})


class GatewayCollector(Collector):
    """Reads the gateway's figures when it is asked for them; counts nothing itself."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        yield from self._cache()
        yield from self._queue()
        yield from self._workers()

    def _cache(self) -> Iterator[Metric]:
        figures = self._gateway.cache_figures
        yield CounterMetricFamily("fanlight_cache_hits_total", "Control images found.", value=figures.hits)
        yield CounterMetricFamily("fanlight_cache_misses_total", "Control images to make.", value=figures.misses)
        yield GaugeMetricFamily("fanlight_cache_entries", "Control images remembered.", value=figures.entries)
        yield GaugeMetricFamily("fanlight_cache_bytes", "Their bytes.", value=figures.size_bytes)
        yield GaugeMetricFamily("fanlight_cache_budget_bytes", "What they may be.", value=figures.budget_bytes)

    def _queue(self) -> Iterator[Metric]:
        lines = list(self._gateway.queue.statistics())
        for name in ("waiting", "blocked", "leased", "oldest_age_s"):
            family = GaugeMetricFamily(f"fanlight_queue_{name}", "As in /v1/queue.", labels=("stage", "checkpoint"))
            for line in lines:
                family.add_metric((line.stage, line.checkpoint), float(getattr(line, name)))
            yield family

    def _workers(self) -> Iterator[Metric]:
        live: dict[str, int] = {}
        for status in self._gateway.workers.statuses():
            live[status.worker.stage] = live.get(status.worker.stage, 0) + status.live
        family = GaugeMetricFamily("fanlight_workers_live", "Workers that can be counted on.", labels=("stage",))
        for stage, count in sorted(live.items()):
            family.add_metric((stage,), count)
        yield family
