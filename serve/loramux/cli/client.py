"""The server's HTTP API as the command line uses it. Standard library only: these commands start at once."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from loramux.cli.terminal import printable
from loramux.errors import ConfigError, LoramuxError

DEFAULT_URL = "http://127.0.0.1:8000"
_LOCAL = ("127.0.0.1", "::1", "localhost")
#: Between two reads. A long prompt on a CPU takes minutes to its first token; an endpoint of ours takes a moment.
_STREAM_S, _ANSWER_S = 600.0, 30.0


class ServerUnreachable(LoramuxError):
    """Nothing answers, or what does is no loramux."""

    code = "server_unreachable"


class ServerRefused(LoramuxError):
    """The server's own error object, its code kept. `answered` is the HTTP status; 200 for an error in a stream."""

    def __init__(self, message: str, *, code: str, hint: str | None = None, answered: int) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.answered = answered


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, whatever its status. `body` is the parsed JSON, None if it is none."""

    status: int
    body: Any
    text: str


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect to another host would be sent the key."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Client:
    """`key` opens the inference routes, `admin_key` the lifecycle routes; neither is ever shown."""

    url: str = DEFAULT_URL
    key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Client:
        """From `--url`, `--key` and the environment. Raises ConfigError."""
        user, admin = (os.environ.get(name) for name in ("LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY"))
        url = _checked_url(options.url or os.environ.get("LORAMUX_URL") or DEFAULT_URL)
        return cls(url, _checked_key(options.key or user or admin), _checked_key(options.key or admin or user))

    def get(self, path: str) -> Any:
        """The JSON of a successful answer. Raises ServerUnreachable or ServerRefused, as all methods do."""
        return self.checked(self.send("GET", path))

    def models(self) -> list[dict[str, Any]]:
        """The base model first, then its adapters."""
        cards: list[dict[str, Any]] = self.get("/v1/models")["data"]
        return cards

    def lifecycle(
        self,
        method: str,
        name: str,
        action: str = "",
        *,
        body: Any = None,
        if_match: str | None = None,
        wait_s: float | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Status and card of a change to the adapter `name`. `wait_s`: how long the server may take to answer."""
        headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
        query = "" if wait_s is None else f"?wait={wait_s:g}"
        path = f"{adapter_path(name)}{action}{query}"
        answer = self.send(
            method, path, body, headers=headers, key=self.admin_key, timeout_s=_ANSWER_S + (wait_s or _ANSWER_S)
        )
        card: dict[str, Any] = self.checked(answer)
        return answer.status, card

    def chat(self, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Events of a streamed chat completion. Closing the iterator ends the request on the server."""
        request = self._request("POST", "/v1/chat/completions", {**body, "stream": True}, {}, self.key)
        with self._reached(), self._open(request, _STREAM_S) as response:
            if response.status >= 400:
                self.checked(_answer(response))
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                if (data := line.removeprefix(b"data:").strip()) == b"[DONE]":
                    return
                event = json.loads(data)
                if isinstance(event.get("error"), dict):
                    raise _refused(event["error"], response.status)
                yield event
        raise ServerUnreachable("The answer broke off.", hint="The server's log has the reason.")

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        timeout_s: float = _ANSWER_S,
    ) -> Answer:
        """One request and its answer, errors of the server included. Raises ServerUnreachable."""
        request = self._request(method, path, body, headers or {}, key or self.key)
        with self._reached(), self._open(request, timeout_s) as response:
            return _answer(response)

    def checked(self, answer: Answer) -> Any:
        """The answer's JSON. Raises ServerRefused for an error, ServerUnreachable for what no loramux would say."""
        body = answer.body
        if answer.status < 300 and isinstance(body, dict):
            return body
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            raise _refused(body["error"], answer.status)
        said = printable(" ".join(answer.text.split())[:80]) or "nothing"
        raise ServerUnreachable(
            f"{self.url} answered {answer.status} without JSON of ours: {said}",
            hint="Is it a loramux server, or a proxy in front of one? --url or LORAMUX_URL names another.",
        )

    def _request(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], key: str | None
    ) -> urllib.request.Request:
        request = urllib.request.Request(self.url + path, method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name, value)
        if key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _open(self, request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if urlsplit(self.url).hostname in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy's 127.0.0.1 is not ours
        try:
            response: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            response = error  # type: ignore[assignment]  # it is a response as well
        return response

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Every way not to get an answer, as one error."""
        try:
            yield
        except urllib.error.URLError as error:
            refused = isinstance(error.reason, ConnectionRefusedError)
            why = "" if refused else f" ({printable(str(error.reason))})"
            raise ServerUnreachable(
                f"Nothing answers at {self.url}{why}.",
                hint="Start one: loramux serve …   Or name another with --url or LORAMUX_URL.",
            ) from error
        except TimeoutError as error:
            raise ServerUnreachable(
                f"{self.url} took the request and did not answer.", hint="Ask it: loramux doctor"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerUnreachable(
                f"{self.url} broke off its answer ({type(error).__name__}).",
                hint="The server's log has the reason. Is that port an HTTP server's?",
            ) from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--key`."""
    parser.add_argument("--url", metavar="URL", help=f"the server (default: $LORAMUX_URL, else {DEFAULT_URL})")
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="better in the environment, where no process list shows it: $LORAMUX_API_KEY, $LORAMUX_ADMIN_KEY",
    )


def adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='/:')}"


def as_json(error: LoramuxError) -> dict[str, Any]:
    """What `--json` prints for an error."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def _answer(response: http.client.HTTPResponse) -> Answer:
    text = response.read().decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    return Answer(response.status, body, text)


def _refused(error: Mapping[str, Any], status: int) -> ServerRefused:
    hint = error.get("hint")
    if status == 401:
        hint = "Set LORAMUX_API_KEY, for changes LORAMUX_ADMIN_KEY, to the server's key."
    return ServerRefused(
        printable(str(error.get("message") or f"HTTP {status}")),
        code=printable(str(error.get("code") or "internal_error")),
        hint=printable(str(hint)) if hint else None,
        answered=status,
    )


def _checked_url(url: str) -> str:
    """`host:port` and OpenAI's `…/v1` will do."""
    full = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(full)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not full.isascii() or not full.isprintable() or " " in full:
        raise ConfigError(f"{url!r} is not a server's address.", hint=f"Write it like {DEFAULT_URL}")
    return full


def _checked_key(key: str | None) -> str | None:
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError("The key has characters that no key has.", hint="Is there a line break in it?")
    return key or None
