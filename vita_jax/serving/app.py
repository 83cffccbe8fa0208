"""The server's endpoints as one ASGI application. What a model cannot do has no endpoint."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from vita_jax.serving import chat_completions, speech
from vita_jax.serving.guard import Guard
from vita_jax.serving.metrics import CONTENT_TYPE
from vita_jax.serving.pages import page_routes
from vita_jax.serving.problems import Problem
from vita_jax.serving.realtime import realtime
from vita_jax.serving.realtime_events import ENDPOINT
from vita_jax.serving.responses import json_response
from vita_jax.serving.service import Service


def create_app(service: Service) -> Starlette:
    """The application of one model."""
    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        Route(chat_completions.ENDPOINT, chat_completions.chat_completions, methods=["POST"]),
    ]
    if service.hears and service.recogniser is not None:
        routes.append(Route("/v1/audio/transcriptions", speech.transcriptions, methods=["POST"]))
    if service.voices:
        routes.append(Route("/v1/audio/speech", speech.speech, methods=["POST"]))
    if service.mute_reason is None:
        routes += [WebSocketRoute(ENDPOINT, realtime), *page_routes()]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(Guard, service=service, paths=paths)]
    if service.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=service.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={404: no_such_path, 405: no_such_path})
    app.state.service = service
    return app


async def no_such_path(request: Request, error: Exception) -> Response:
    """404 and 405 in the form of the API."""
    status = getattr(error, "status_code", 404)
    what = "there is no" if status == 404 else f"{request.method[:20]} is not what is done with"
    problem = Problem(status, f"{what} {request.scope['path'][:80]} here", code="unknown_url")
    return json_response(problem.body, status, getattr(error, "headers", None))


async def health(request: Request) -> Response:
    """Whether it serves: 200, or 503 where it stops or its worker has ended."""
    service: Service = request.app.state.service
    well = service.worker.alive and not service.stopping
    state = "ok" if well else "stopping" if service.stopping else "failed"
    return json_response({"status": state, "model": service.name}, 200 if well else 503)


async def metrics(request: Request) -> Response:
    """The figures for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def models(request: Request) -> Response:
    """The one model."""
    return json_response({"object": "list", "data": [_model(request.app.state.service)]})


async def model(request: Request) -> Response:
    """The model by its name. Raises `Problem` 404."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    if name != service.name:
        raise Problem(404, f"there is no model {name[:80]!r} here; use {service.name!r}", code="model_not_found")
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "vita_jax",
        "hears": service.hears,
        "voices": list(service.voices),
    }
