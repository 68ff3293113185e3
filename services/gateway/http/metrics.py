"""`/metrics`: figures in Prometheus' text format, for those who watch and scale a fleet."""

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Depends
from starlette.responses import PlainTextResponse, Response

from services.gateway.app.gateway import Gateway
from services.gateway.http import documents
from services.gateway.http.parameters import refuse_unknown

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[dict[str, str], float]


class MetricRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"], dependencies=[Depends(refuse_unknown)])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], **documents.METRICS)
        return router

    async def metrics(self) -> Response:
        return PlainTextResponse(
            "\n".join([*self._cache(), *self._queue(), *self._workers(), ""]), media_type=MEDIA_TYPE
        )

    def _cache(self) -> Iterator[str]:
        figures = self._gateway.cache_figures
        yield from _metric("fanlight_cache_hits_total", "counter", "Control images found.", [({}, figures.hits)])
        yield from _metric("fanlight_cache_misses_total", "counter", "Control images to make.", [({}, figures.misses)])
        yield from _metric("fanlight_cache_entries", "gauge", "Control images remembered.", [({}, figures.entries)])
        yield from _metric("fanlight_cache_bytes", "gauge", "Their bytes.", [({}, figures.size_bytes)])
        yield from _metric("fanlight_cache_budget_bytes", "gauge", "What they may be.", [({}, figures.budget_bytes)])

    def _queue(self) -> Iterator[str]:
        lines = list(self._gateway.queue.statistics())
        kinds = [({"stage": line.stage, "checkpoint": line.checkpoint}, line) for line in lines]
        for name in ("waiting", "blocked", "leased", "oldest_age_s"):
            samples = [(labels, float(getattr(line, name))) for labels, line in kinds]
            yield from _metric(f"fanlight_queue_{name}", "gauge", "As in /v1/queue.", samples)

    def _workers(self) -> Iterator[str]:
        live: dict[str, int] = {}
        for status in self._gateway.workers.statuses():
            live[status.worker.stage] = live.get(status.worker.stage, 0) + status.live
        samples = [({"stage": stage}, float(count)) for stage, count in sorted(live.items())]
        yield from _metric("fanlight_workers_live", "gauge", "Workers that can be counted on.", samples)


def _metric(name: str, kind: str, meaning: str, samples: Iterable[_Sample]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
