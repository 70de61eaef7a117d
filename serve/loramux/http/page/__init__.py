"""`GET /`: one page with the adapters' live state and a prompt box that asks two or three models at once.

`index.html`, `style.css` and `page.js` beside this file become one document when the server starts: nothing else is
requested, and the content security policy names the two by their digests, so no other script or style can run.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["page"])


def _read(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What a policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _read("style.css"), _read("page.js")
_PAGE = _read("index.html").replace("{{style}}", _STYLE).replace("{{script}}", _SCRIPT)
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(_SCRIPT)}",
            f"style-src {_source(_STYLE)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """The page holds nothing of the server's; what it shows it asks for, with the visitor's key if need be."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
