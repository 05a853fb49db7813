"""The page that shows a deployment to people. Its files hold no secrets: what they show, they ask for with a token."""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parents[1] / "ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own files and speaks with this gateway, and with nobody else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asked for again with its etag, so that an upgrade is seen at once
}


def ui_routes() -> list[Route]:
    files = [_File(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES]
    index = next(file for file in files if file.name == "index.html")

    async def to_folder(request: Request) -> Response:
        return RedirectResponse("ui/", headers=_HEADERS)

    return [
        Route("/ui", to_folder),
        Route("/ui/", index.answer),
        *(Route(f"/ui/{file.name}", file.answer) for file in files),
    ]


class _File:
    """In memory: a path can name these and no others."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._content = path.read_bytes()
        self._headers = {
            **_HEADERS,
            "content-type": _TYPES[path.suffix],
            "etag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"',
        }

    async def answer(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
