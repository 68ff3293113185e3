"""The HTTP application, put together."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from services.gateway.app.gateway import Gateway
from services.gateway.http import docs_page, errors
from services.gateway.http.annotate import AnnotateRoutes
from services.gateway.http.blobs import BlobRoutes
from services.gateway.http.dead_letters import DeadLetterRoutes
from services.gateway.http.events import EventRoutes
from services.gateway.http.guards import RequestLimit, TokenGuard
from services.gateway.http.health import HealthRoutes
from services.gateway.http.jobs import JobRoutes
from services.gateway.http.lingering import Lingering
from services.gateway.http.listings import ListingRoutes
from services.gateway.http.metrics import MetricRoutes
from services.gateway.http.openapi import describe
from services.gateway.http.options import HttpOptions
from services.kernel.blobs import BlobStore


def http_app(gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> FastAPI:
    app = FastAPI(
        title="Fanlight",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Lingering, idle_s=options.linger_idle_s),
            Middleware(errors.ErrorGuard),
            Middleware(TokenGuard, callers=options.callers),
            Middleware(RequestLimit, limit=options.requests_limit),
        ],
    )
    errors.install(app)
    for routes in (
        JobRoutes(gateway, blobs, options),
        EventRoutes(gateway, options),
        BlobRoutes(blobs, options),
        AnnotateRoutes(gateway, blobs, options),
        ListingRoutes(gateway),
        DeadLetterRoutes(gateway),
        MetricRoutes(gateway),
        HealthRoutes(gateway),
    ):
        app.include_router(routes.router())
    describe(app)
    docs_page.install(app)
    return app
