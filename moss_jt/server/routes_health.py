"""/healthz, /readyz and /metrics, for those who watch."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from moss_jt.config import GenerationConfig, MossConfig
from moss_jt.server.routing import ERRORS, service_of, user_of
from moss_jt.template import ToolLine

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


@router.get("/v1/figures", summary="What is here, how fast it is, and where its memory is", responses=ERRORS)
async def figures(request: Request) -> dict[str, Any]:
    """For pages: some figures of /metrics, and what may be asked for. Where there are keys, any of them opens this."""
    user, service = await user_of(request), service_of(request)
    speaker = service.speaker if service.ready else None
    return {
        "model": "" if speaker is None else speaker.name,
        "context_size": 0 if speaker is None else speaker.context_size,
        "longest_answer": service.settings.max_new_tokens,
        "sampling": {} if speaker is None else _own_sampling(speaker.model.config),
        "tools": [] if service.tools is None else [_name(one) for one in service.tools.enabled],
        "user": user.owner,
        "lists": user.key is not None,
        **service.metrics.figures(),
    }


def _own_sampling(model: MossConfig) -> dict[str, float]:
    """How a model is asked where a request does not say; temperature 0 for its best token."""
    config = GenerationConfig.for_model(model)
    return {
        "temperature": 0.0 if config.greedy else config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "repetition_penalty": config.repetition_penalty,
    }


def _name(tool: str | ToolLine) -> str:
    return tool if isinstance(tool, str) else (tool.api or tool.title).partition("(")[0]


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
