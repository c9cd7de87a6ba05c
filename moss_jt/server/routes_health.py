"""/healthz, /readyz and /metrics, for those who watch."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from moss_jt.server.routing import ERRORS, service_of, user_of

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the server runs")
async def healthz() -> dict[str, str]:
    """It runs if this is answered."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether requests are answered", responses={503: {"description": "Not yet."}})
async def readyz(request: Request) -> Response:
    """503 while the model is being loaded; `loading` says how far that is."""
    service = service_of(request)
    if service.ready:
        return JSONResponse({"status": "ready"})
    loading = service.dispatcher.loading
    found: dict[str, Any] = {"status": service.dispatcher.state, "loading": loading.task, "share": loading.share}
    return JSONResponse(found, 503, {"Retry-After": "5"})


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}, 401: ERRORS[401]},
)
async def metrics(request: Request) -> Response:
    """Where there are keys, any of them opens this."""
    await user_of(request)
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4")
