"""What there is: annotators, models, workers, and how much waits."""

from fastapi import APIRouter, Depends
from starlette.responses import Response

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.app.statistics import QueueLine
from services.gateway.http import documents
from services.gateway.http.json_messages import answer, of_value
from services.gateway.http.parameters import Asking, refuse_unknown
from services.gateway.wire import answers


class ListingRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        add("/v1/annotators", self.annotators, methods=["GET"], tags=["annotators"], **documents.LIST_ANNOTATORS)
        add("/v1/models", self.models, methods=["GET"], tags=["models"], **documents.LIST_MODELS)
        add("/v1/workers", self.workers, methods=["GET"], tags=["workers"], **documents.LIST_WORKERS)
        add("/v1/queue", self.queue, methods=["GET"], tags=["workers"], **documents.QUEUE)
        return router

    async def annotators(self) -> Response:
        return answer(answers.annotators(self._gateway.workers))

    async def models(self) -> Response:
        return answer(answers.models(self._gateway.workers))

    async def workers(self, caller: Asking) -> Response:
        statuses = [caller.without_secrets(each) for each in self._gateway.workers.statuses()]
        return answer(gateway_pb2.ListWorkersResponse(workers=[answers.worker_status(each) for each in statuses]))

    async def queue(self, caller: Asking) -> Response:
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
