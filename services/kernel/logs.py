"""Log events: a name and values, one line each on standard error. Never prompts, image bytes or secrets."""

import logging
import sys

from fanlight.terminal import printable_lines
from services.kernel.process import without

# Importing rich takes more than twice as long, for tracebacks that are not used here.
with without("rich"):
    import structlog

# Without local variables, which contain prompts, image bytes and tokens.
_TRACEBACKS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def configure(*, level: str, style: str, service: str) -> None:
    """`style` is `json` or `console`. Libraries' own logs are written to the same place, from warnings up."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    # JSON has escapes of its own for what controls a terminal.
    last: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_TRACEBACKS), structlog.processors.JSONRenderer()]
        if style == "json"
        else [
            _printable_values,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _json_formatter(service, shared, last)
        if style == "json"
        else _PrintableFormatter("%(levelname)s %(name)s %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Warnings of libraries are lines like theirs.
    logging.captureWarnings(True)


def _json_formatter(
    service: str, shared: list[structlog.typing.Processor], last: list[structlog.typing.Processor]
) -> logging.Formatter:
    """Libraries' lines, uvicorn's too, as events like ours: their text is the event, and `logger` who wrote it."""

    def of_service(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # Threads of libraries do not know our context.
        return {"service": service, **event}

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, of_service],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _printable_values(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Values come from workers and hubs too."""
    return {name: printable_lines(value) if isinstance(value, str) else value for name, value in event.items()}


def get_logger() -> structlog.typing.FilteringBoundLogger:
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
