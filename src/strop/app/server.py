"""The endpoint of `strop serve`: OpenAI's paths over a `Service`.

    GET  /v1/models, /v1/models/NAME     POST /v1/chat/completions, /v1/completions     GET /health

Without a token only requests to this machine's own names are answered, so that a page in a browser cannot reach the
model through a name of its own. Errors have OpenAI's shape. A client that leaves ends its answer.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from strop.app.openai import ChatAsked, Shape, TextAsked, error
from strop.errors import DataError, StropError, UsageError
from strop.recipes.serve import BusyError, Part, Service, StoppedError, TooLongError, is_loopback

MOST_BYTES: Final = 8 << 20
"""Of a request."""


class RefusedError(Exception):
    """A request that is not answered: its status and its error."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.headers = status, body, headers


def build_app(service: Service, *, token: str | None, loopback: bool) -> FastAPI:
    """The endpoint as an ASGI application.

    Args:
        service: what answers.
        token: what a request must bring as `Authorization: Bearer TOKEN`; None for no token.
        loopback: whether it listens to this machine alone.
    """

    async def guard(request: Request) -> None:
        size = request.headers.get("content-length", "")
        if request.method == "POST" and not size.isdecimal():
            raise RefusedError(411, error("a request says how long it is (Content-Length)", kind=_INVALID))
        if int(size or 0) > MOST_BYTES:
            raise RefusedError(413, error(f"a request has {MOST_BYTES:,} bytes at the most", kind=_INVALID))
        if token is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
                body = error("the token is missing or wrong", kind=_INVALID, code="invalid_api_key")
                raise RefusedError(401, body, {"www-authenticate": "Bearer"})
        elif loopback and not is_loopback(_host_name(request.headers.get("host", ""))):
            raise RefusedError(403, error("only this machine's own names are answered without a token", kind=_INVALID))

    app = FastAPI(dependencies=[Depends(guard)], docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    own = {"id": service.name, "object": "model", "created": 0, "owned_by": "strop"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [own]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return own

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Any:
        _check_model(service, asked.model)
        prompt = await run_in_threadpool(service.chat_prompt, asked.turns())
        return await _answer(service, request, asked, prompt, chat=True)

    @app.post("/v1/completions")
    async def completions(asked: TextAsked, request: Request) -> Any:
        _check_model(service, asked.model)
        given: Any = asked.prompt  # a list of one text is that text by now
        prompt = await run_in_threadpool(service.text_prompt, given)
        return await _answer(service, request, asked, prompt, chat=False)

    return app


_INVALID: Final = "invalid_request_error"
_PATHS: Final = "there are GET /v1/models and /health, POST /v1/chat/completions and /v1/completions"


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    return header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        message = f"the model {name!r} is not served here; {service.name!r} is"
        raise RefusedError(404, error(message, kind=_INVALID, param="model", code="model_not_found"))


async def _answer(
    service: Service, request: Request, asked: ChatAsked | TextAsked, prompt: list[int], *, chat: bool
) -> Any:
    parts = service.parts(prompt, asked.wish(), goes_on=not chat)
    shape = Shape(service.name, chat=chat, prompt_tokens=len(prompt))
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            _events(parts, shape, usage=usage), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    written: list[Part] = []
    async for part in _closing(parts):
        written.append(part)
        if await request.is_disconnected():
            break
    return JSONResponse(shape.whole("".join(part.text for part in written), written[-1]))


async def _closing(parts: Iterator[Part]) -> AsyncIterator[Part]:
    """The parts, made in a thread; whatever happens the answer is ended."""
    closing: Any = parts
    try:
        async for part in iterate_in_threadpool(parts):
            yield part
    finally:
        closing.close()


async def _events(parts: Iterator[Part], shape: Shape, *, usage: bool) -> AsyncIterator[str]:
    last = Part("", 0)
    try:
        if first := shape.first():
            yield _event(first)
        async for last in _closing(parts):
            if piece := shape.piece(last):
                yield _event(piece)
        yield _event(shape.end(last))
        if usage:
            yield _event(shape.usage(last))
        yield "data: [DONE]\n\n"
    except StropError as problem:  # the status is sent already
        yield _event(_body(problem)[1])


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _body(problem: StropError) -> tuple[int, dict[str, Any]]:
    """Status and body for what strop raises."""
    if isinstance(problem, TooLongError):
        return 400, error(str(problem), kind=_INVALID, code="context_length_exceeded")
    if isinstance(problem, BusyError):
        return 429, error(str(problem), kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(problem, StoppedError):
        return 503, error(str(problem), kind="server_error")
    if isinstance(problem, UsageError | DataError):
        return 400, error(str(problem), kind=_INVALID)
    return 500, error(str(problem), kind="server_error")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, problem: RefusedError) -> JSONResponse:
        return JSONResponse(problem.body, problem.status, problem.headers)

    @app.exception_handler(StropError)
    async def failed(_: Request, problem: StropError) -> JSONResponse:
        status, body = _body(problem)
        return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, problem: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {problem.detail}" + (
            f"; {_PATHS}" if problem.status_code in (404, 405) else ""
        )
        return JSONResponse(error(message, kind=_INVALID), problem.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> JSONResponse:
        found = [(_place(one["loc"]), _complaint(one)) for one in problem.errors()[:4]]
        message = "; ".join(f"{place}: {text}" if place else text for place, text in dict(found).items())
        return JSONResponse(error(message, kind=_INVALID, param=found[0][0] or None), 400)


def _complaint(problem: dict[str, Any]) -> str:
    """What pydantic says of a value; of a body that is no JSON also where it ends to be one."""
    if problem["type"] == "json_invalid":
        return f"the body is no JSON: {problem.get('ctx', {}).get('error')} at character {problem['loc'][-1]}"
    return str(problem["msg"]).removeprefix("Value error, ")


def _place(location: tuple[Any, ...]) -> str:
    """`messages.0.content` of a body's place, without the names of types that pydantic adds; empty for one in text."""
    parts = [str(part) for part in location[1:] if str(part) != "str" and "[" not in str(part)]
    return "" if parts and parts[0].isdecimal() else ".".join(parts)


class _Server(uvicorn.Server):
    """uvicorn, which tells the service at once when it is to end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stop()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UsageError: the address is not this machine's, or another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as problem:
        raise UsageError(f"cannot listen at {host}, port {port}: {problem}; name another --port or --host") from problem


def run(app: FastAPI, service: Service, listening: socket.socket, *, ready: Callable[[], object]) -> None:
    """Answer until Ctrl-C or SIGTERM; an answer under way is ended then.

    Args:
        app: what `build_app` gives.
        service: what it answers with.
        listening: what `bind` gives.
        ready: called when requests are about to be answered.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    server = _Server(config, service)
    ready()
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn once all is closed
        server.run(sockets=[listening])
