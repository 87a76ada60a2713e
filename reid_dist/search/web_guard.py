"""What stands before every route of the web page: who may ask, from where, and what a browser may do with the answer.

With a token, nothing but the form that asks for it is given to whoever lacks it: no page, no script, no photograph. It
comes as `Authorization: Bearer`, or once through the form or the first address, which leave a cookie behind.
Without one, the address must be an IP address or `localhost`: a page elsewhere in the same browser could otherwise
point a name of its own at this machine and read the answers (DNS rebinding).

Wrong tokens are not slowed down, as whoever guesses would ask in parallel and a wait would only hold connections: it is
the length of the token that nobody gets through.
"""

import ipaddress
import secrets
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reid_dist.search.web_body import read_body

LOGIN_PAGE = Path(__file__).parent / "page" / "login.html"
_MAX_FORM_BYTES = 4096
_FORM_SECONDS = 10.0
_HEADERS = {
    # Photographs of people stay in no cache.
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_FORM_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what answers those who may ask.
        token: what they must know; None: everyone may ask.
        host: name that the server was told to listen on, allowed in addresses without a token.
        port: part of the cookie's name; browsers share cookies between the ports of a machine.
    """

    def __init__(self, app: ASGIApp, token: str | None, host: str, port: int) -> None:
        self._app, self._token, self._host = app, token, host
        self._cookie = f"photo_search_{port}"
        self._session = secrets.token_urlsafe(32)  # the cookie does not hold the token, and ends with this process
        self._form = LOGIN_PAGE.read_text(encoding="utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or lets the application answer; the server passes nothing but HTTP on."""

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = await self._refusal(Request(scope, receive))
        await (refusal or self._app)(scope, receive, guarded_send)

    async def _refusal(self, request: Request) -> Response | None:
        if self._token is None:
            if self._host_allowed(request.headers.get("host", "")):
                return None
            return _error(403, "open this page by its IP address or as localhost, or start it with --token")
        if request.url.path == "/login" and request.method == "POST":
            return await self._login(request)
        if request.url.path == "/" and "token" in request.query_params:
            return self._judge(request.query_params["token"])
        if self._knows(request):
            return None
        return self._ask("") if request.url.path == "/" else _error(401, "the token is missing or wrong")

    def _host_allowed(self, header: str) -> bool:
        name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        name = name.strip("[]").lower()
        if name in ("localhost", self._host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _knows(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        return secrets.compare_digest(request.cookies.get(self._cookie, "").encode(), self._session.encode())

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return secrets.compare_digest(given.encode(), self._token.encode())

    async def _login(self, request: Request) -> Response:
        body = await read_body(request, _MAX_FORM_BYTES, _FORM_SECONDS)
        if isinstance(body, Response):
            return body
        fields = parse_qs(body.decode("utf-8", "replace"))
        return self._judge(fields.get("token", [""])[0])

    def _judge(self, given: str) -> Response:
        if not self._is_token(given):
            return self._ask("This is not the token.")
        answer = RedirectResponse("./", status_code=303)  # relative: the page may lie below a path of a proxy
        answer.set_cookie(self._cookie, self._session, httponly=True, samesite="strict")
        return answer

    def _ask(self, problem: str) -> Response:
        page = self._form.replace("<!-- problem -->", problem)
        return HTMLResponse(page, 401, {"content-security-policy": _FORM_POLICY, "www-authenticate": "Bearer"})


def _error(status: int, line: str) -> Response:
    return JSONResponse({"error": line}, status)
