"""The body of a request, never more of it than is allowed."""

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response


async def read_body(request: Request, limit: int, seconds: float) -> bytes | Response:
    """All of the body, or the answer that refuses it.

    Args:
        request: of which nothing was read yet.
        limit: bytes; what is beyond is neither kept nor waited for.
        seconds: after which it must have arrived; who sends slower holds a connection for nothing.
    """
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        return _too_large(limit)
    body = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    return _too_large(limit)
    except (ClientDisconnect, TimeoutError):
        return JSONResponse({"error": "the request did not arrive whole"}, 408)
    return bytes(body)


def _too_large(limit: int) -> Response:
    return JSONResponse({"error": f"the request is larger than {limit} bytes; send a smaller photo"}, 413)
