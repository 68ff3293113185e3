"""RecordService over gRPC: the records that cannot be read, for the operator. Knows no jobs."""

from fanlight.contract.limits import check_whole
from fanlight.records.v1 import records_pb2, records_pb2_grpc
from services.gateway.app.gateway import Gateway
from services.gateway.app.jobs import PAGE_SIZE, PAGE_SIZE_LIMIT
from services.gateway.app.tenants import Callers
from services.gateway.domain.keys import Right
from services.gateway.rpc.jobs import Context, caller_of
from services.gateway.wire import records as wire


class RecordService(records_pb2_grpc.RecordServiceServicer):
    def __init__(self, gateway: Gateway, callers: Callers) -> None:
        self._gateway, self._records, self._callers = gateway, gateway.records, callers

    def _require_operator(self, context: Context) -> None:
        caller_of(self._callers, context, Right.OPERATE)

    async def ListDamagedRecords(
        self, request: records_pb2.ListDamagedRecordsRequest, context: Context
    ) -> records_pb2.ListDamagedRecordsResponse:
        self._require_operator(context)
        size = check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE
        return wire.page(await self._records.damaged_page(before=request.page_token, limit=size), size)

    async def GetDamagedRecord(
        self, request: records_pb2.GetDamagedRecordRequest, context: Context
    ) -> records_pb2.DamagedRecord:
        self._require_operator(context)
        damaged, value = await self._records.damaged(*wire.parse_name(request.name))
        return wire.damaged_record(damaged, value)

    async def RemoveDamagedRecord(
        self, request: records_pb2.RemoveDamagedRecordRequest, context: Context
    ) -> records_pb2.DamagedRecord:
        self._require_operator(context)
        return wire.damaged_record(await self._gateway.remove_damaged(*wire.parse_name(request.name)))
