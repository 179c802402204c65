"""Servers on 127.0.0.1 that speak the published wire formats of OpenAI and Anthropic, faults included. The first part of a
path says what happens: `/NAME/v1/chat/completions` and `/NAME/v1/messages`."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "sk-test-0123456789abcdef"  # the only key that the servers take
ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
ERROR_TYPES |= {429: "rate_limit_error", 500: "api_error", 529: "overloaded_error"}


@contextlib.contextmanager
def run_app(app: Any) -> Iterator[str]:
    "An application behind a real server in a thread; its address."
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Wire:
    "Both providers: what was asked, and an application that answers."

    def __init__(self) -> None:
        self.asked: dict[str, list[dict[str, Any]]] = {}  # what happens -> bodies of the requests
        self.app = Starlette(
            routes=[
                Route("/{case}/v1/chat/completions", self.openai, methods=["POST"]),
                Route("/{case}/v1/messages", self.anthropic, methods=["POST"]),
            ]
        )

    async def take(self, request: Request, key: str | None) -> tuple[str, dict[str, Any], Response | None]:
        "The case and the body of a request, and the fault that it ends with, if it does."
        case, body, anthropic = request.path_params["case"], await request.json(), request.url.path.endswith("messages")
        self.asked.setdefault(case, []).append(body)
        first = len(self.asked[case]) == 1
        if case == "keyed" and key != KEY:
            return case, body, fault(401, f"invalid key: {key}", anthropic)
        if case.startswith("status-"):
            return case, body, fault(int(case[7:]), "on purpose", anthropic)
        if case == "broke":
            return case, body, fault(429, "no credit", anthropic, code="insufficient_quota")
        if first and case in ("busy", "busy-seconds", "busy-date", "busy-hour"):
            soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
            after = {"busy": None, "busy-seconds": "0.7", "busy-date": soon, "busy-hour": "3600"}[case]
            return case, body, fault(429, "slow down", anthropic, {"retry-after": after} if after else {})
        if first and case == "stumbles":
            return case, body, fault(500, "on purpose", anthropic)
        if case == "page":
            return case, body, Response("<html>Welcome</html>", media_type="text/html")
        if case == "torn":
            return case, body, Response('{"id": "1", "cho', media_type="application/json")
        if case == "other":
            return case, body, JSONResponse({"hello": "world"})
        if case == "silent":
            await asyncio.sleep(1.5)
        return case, body, None

    async def openai(self, request: Request) -> Response:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        case, body, failed = await self.take(request, key)
        if failed:
            return failed
        refused = "I cannot help with that." if case == "refuses" else None
        text = "" if case in ("empty", "refuses", "filtered") else "Hello there."
        reason = "content_filter" if case == "filtered" else "stop"
        usage = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
        usage["prompt_tokens_details"] = {"cached_tokens": 12}
        base = {"id": "chatcmpl-1", "created": 1, "model": f"{body['model']}-2026-11-01"}
        if not body.get("stream"):
            message = {"role": "assistant", "content": text or None, "refusal": refused}
            choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
            answer = base | {"object": "chat.completion", "choices": [choice], "usage": usage}
            return JSONResponse(answer, headers={"x-request-id": "req_openai"})

        async def events() -> AsyncIterator[str]:
            base["object"] = "chat.completion.chunk"
            deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in text.split(" ") if word)]
            deltas += [{"refusal": refused}] if refused else []
            for n, delta in enumerate(deltas):
                yield data(base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None})
                if n == 1:
                    breaks(case, len(self.asked[case]))
                    if case == "ends-early":
                        return
                    if case == "garbled":
                        yield "data: {oops\n\n"
            yield data(base | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": None})
            if body.get("stream_options", {}).get("include_usage"):
                yield data(base | {"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"x-request-id": "req_openai"})

    async def anthropic(self, request: Request) -> Response:
        assert request.headers["anthropic-version"] and request.headers["content-type"] == "application/json"
        # the key's place is x-api-key by the published pages, and Authorization for the client of version 2.14
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        case, body, failed = await self.take(request, request.headers.get("x-api-key") or bearer)
        if failed:
            return failed
        text = "" if case in ("empty", "refuses", "filtered") else "Hello there."
        reason = "refusal" if case in ("refuses", "filtered") else "end_turn"
        usage = {"input_tokens": 8, "cache_read_input_tokens": 12, "cache_creation_input_tokens": 0, "output_tokens": 4}
        content = [{"type": "text", "text": text}] if text else []
        message: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant"}
        message |= {"model": f"{body['model']}-20261101", "stop_sequence": None}
        headers = {"request-id": "req_anthropic"}
        if not body.get("stream"):
            return JSONResponse(message | {"content": content, "stop_reason": reason, "usage": usage}, headers=headers)

        async def events() -> AsyncIterator[str]:
            begun = message | {"content": [], "stop_reason": None, "usage": usage | {"output_tokens": 1}}
            yield event("message_start", message=begun)
            yield event("ping")
            if text:
                yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
                for n, word in enumerate(text.split(" ")):
                    delta = {"type": "text_delta", "text": word}
                    yield event("content_block_delta", index=0, delta=delta)
                    if n == 0:
                        breaks(case, len(self.asked[case]))
                        if case == "ends-early":
                            return
                        if case == "garbled":
                            yield "event: content_block_delta\ndata: {oops\n\n"
                        if case == "overloaded":
                            yield event("error", error={"type": "overloaded_error", "message": "Overloaded"})
                            return
                yield event("content_block_stop", index=0)
            delta = {"stop_reason": reason, "stop_sequence": None}
            yield event("message_delta", delta=delta, usage={"output_tokens": 4})
            yield event("message_stop")

        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def breaks(case: str, asked: int) -> None:
    "Break a connection off in the middle of a stream; the server sends no last chunk."
    if case == "breaks" or (case == "breaks-once" and asked == 1):
        raise ConnectionResetError("on purpose")


def data(body: dict[str, Any]) -> str:
    "An event of OpenAI's stream."
    return f"data: {json.dumps(body)}\n\n"


def event(kind: str, **fields: Any) -> str:
    "An event of Anthropic's stream."
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def fault(
    status: int, message: str, anthropic: bool, headers: dict[str, str] | None = None, code: str | None = None
) -> JSONResponse:
    "An error in a provider's shape."
    said: dict[str, Any] = {"message": message, "type": ERROR_TYPES.get(status, "api_error")}
    if anthropic:
        return JSONResponse({"type": "error", "error": said, "request_id": "req_fault"}, status, headers)
    return JSONResponse({"error": said | {"param": None, "code": code}}, status, headers)
