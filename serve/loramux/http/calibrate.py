"""`POST /v1/uncertainty/calibrate`: labelled answers make a version's `confidence` the probability of being right.

What is to be sent is in `loramux.uncertainty.calibration.wish`. Items without scores go on, one by one, as the requests
that they are: to `/v1/uncertainty/score`, or as decisions to the completion routes, by the version's digest. So they
are scored just as those answers will be that the calibration is for. Nothing is kept unless all of them were.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loramux.errors import InvalidRequest, ItemsNotScored, LoramuxError
from loramux.http import scored
from loramux.http.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    json_object,
    replayed,
    request_state,
    send_json,
    with_length,
)
from loramux.http.completions import OfPaths
from loramux.http.errors import refuse
from loramux.http.gate import gate_of
from loramux.registry import AdapterRegistry, Version
from loramux.registry.tasks import all_of
from loramux.uncertainty.ask import FIELD, Mode, resolve
from loramux.uncertainty.calibration import (
    MODES,
    SCORE,
    Calibration,
    Items,
    Settings,
    calibrate,
    inputs,
    of_answers,
    of_scores,
)
from loramux.uncertainty.calibration.wish import HINT, Item, Wish, wish_in
from loramux.uncertainty.recent import Recent

if TYPE_CHECKING:
    from loramux.http.app import Services

PATH = "/v1/uncertainty/calibrate"
#: Items that are asked about at once; how many draws read at once is the engine's business.
AT_ONCE = 8


class Calibrate(OfPaths):
    """ASGI middleware outside of all that reads completion requests. A client that leaves ends it."""

    paths = (PATH,)

    async def handle(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        work, gone = asyncio.ensure_future(self._answer(scope, body)), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await send_json(send, 200, work.result())
        except LoramuxError as error:
            await refuse(scope, send, error)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, scope: Scope, body: bytes) -> dict[str, Any]:
        services: Services = scope["app"].state.loramux
        wish = wish_in(json_object(body, HINT))
        version = await _version(wish, services.registry, gate_of(scope).bases)
        request_state(scope)["loramux_changed"] = version.name
        settings = await _settings(wish, version, services.registry)
        score = wish.score or SCORE[settings.mode]
        if score not in inputs(settings.mode):
            raise InvalidRequest(
                f"Nothing is a function of {score[:64]!r}.",
                hint=f"There are {', '.join(inputs(settings.mode))}.",
                param="score",
            )
        if wish.items is None:
            items = _of_feedback(version, settings, services.recent)
        else:
            items = await self._items(scope, wish, wish.items, settings, version, score)

        def made() -> Calibration:
            return calibrate(items, settings, score=score, method=wish.method, sets=wish.sets, risk=wish.risk)

        calibration = await asyncio.to_thread(made)
        if version.retired:
            raise InvalidRequest(
                f"The version {version.tag!r} was replaced meanwhile.", hint="Calibrate the new one.", param="model"
            )
        await services.calibrations.keep(version, calibration)
        return {"object": "calibration", "model": version.name, "version": version.digest, **calibration.card()}

    async def _items(
        self, scope: Scope, wish: Wish, items: list[Item], settings: Settings, version: Version, score: str
    ) -> Items:
        if items[0].score is not None:
            return of_scores(score, [item.score or 0.0 for item in items], [bool(item.right) for item in items])
        turns = asyncio.Semaphore(AT_ONCE)
        asked = {**wish.asked, "mode": settings.mode.value, "calibrated": False}

        async def told(place: int, item: Item) -> dict[str, Any]:
            if item.told is not None:
                return item.told
            async with turns:
                return await self._ask(scope, {**(item.request or {}), "model": version.tag, FIELD: asked}, place)

        found = await all_of(told(place, item) for place, item in enumerate(items))
        return of_answers(found, settings, [item.right for item in items])

    async def _ask(self, scope: Scope, request: dict[str, Any], place: int) -> dict[str, Any]:
        """The field `uncertainty` of one item. Raises InvalidRequest or ItemsNotScored, which name it."""
        path = scored.PATH
        if "completion" not in request:
            path = "/v1/chat/completions" if "messages" in request else "/v1/completions"
        body = json.dumps(request).encode()
        request_id = f"{request_state(scope).get('loramux_request_id')}-{place}".encode()
        headers = [pair for pair in with_length(scope["headers"], len(body)) if pair[0].lower() != b"x-request-id"]
        path = scope["path"].removesuffix(PATH) + path
        collected = _Collected()
        inner = {
            **scope,
            "path": path,
            "raw_path": path.encode(),
            "headers": [*headers, (b"x-request-id", request_id)],
            "state": dict(request_state(scope)),
        }
        await self.app(inner, replayed(body, _never), collected.send)
        answer = collected.json()
        if collected.status == 200:
            told: dict[str, Any] = answer["choices"][0].get(FIELD) or {"partial": True}
            if not told["partial"]:
                return told
            answer = {"error": told.get("error", {"message": "its scores are not complete"})}
        error = answer.get("error", {})
        failed = InvalidRequest if 400 <= collected.status < 500 else ItemsNotScored
        raise failed(
            f"Item {place} was not scored: {error.get('message')}",
            hint=error.get("hint") or "Nothing was calibrated. Try again.",
            param=f"data[{place}]",
        )


def _of_feedback(version: Version, settings: Settings, recent: Recent) -> Items:
    """Those of decisions of which the right label is known, and all others."""
    assert version.artefact is not None
    found = recent.labelled(version.name, version.artefact.digest, settings)
    if settings.mode is Mode.DECIDE:
        found = [one for one in found if one.label is not None]
    right = [bool(one.right) if one.label is None else one.label for one in found]
    return of_answers([one.told for one in found], settings, right)


@dataclass
class _Collected:
    """A send that keeps an answer."""

    status: int = 500
    parts: list[bytes] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))

    def json(self) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(b"".join(self.parts)), dict):
                return value
        return {}


async def _version(wish: Wish, registry: AdapterRegistry, bases: tuple[str, ...]) -> Version:
    """What is calibrated. Raises AdapterNotFound, InvalidRequest for the base."""
    if wish.model in bases:
        raise InvalidRequest(
            "The base model has no versions that a calibration could be of.",
            hint="Name an adapter.",
            param="model",
        )
    return await registry.resolve(wish.model)


async def _settings(wish: Wish, version: Version, registry: AdapterRegistry) -> Settings:
    mode = resolve(wish.ask, bayesian=version.bayesian)
    if mode not in MODES:
        raise InvalidRequest(
            f"Answers of the mode {mode.value!r} are not calibrated.",
            hint=f"There are {', '.join(MODES)}.",
            param=f"{FIELD}.mode",
        )
    if not version.bayesian or mode is Mode.FAST:
        return Settings(mode, None, 0, None, tuple(sorted(wish.ask.labels)))
    samples = await registry.samples(version, wish.ask.samples)
    return Settings(mode, "sequence", samples, wish.ask.seed, tuple(sorted(wish.ask.labels)))


async def _left(receive: Receive) -> None:
    """Ends when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError
