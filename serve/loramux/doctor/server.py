"""The server's port: free, taken, or a loramux that answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from loramux.cli.client import Client, ServerUnreachable
from loramux.cli.terminal import printable
from loramux.doctor.finding import Finding
from loramux.doctor.machine import Machine


def port(machine: Machine) -> Iterator[Finding]:
    """Who answers at the URL?"""
    address = urlsplit(machine.url)
    number = address.port or (443 if address.scheme == "https" else 80)
    another = f"Start on another port: loramux serve --port {number + 1}"
    try:
        answer = Client(machine.url, machine.key).send("GET", "/health/ready", timeout_s=10)
    except ServerUnreachable as error:
        if _listens(address.hostname or "", number):
            yield Finding.warn("server", f"port {number} is taken by what is no HTTP server", another)
        else:
            yield Finding.ok("server", f"{error.message} The port is free.")
        return
    body = answer.body if isinstance(answer.body, dict) else {}
    if "base" not in body:
        yield Finding.warn("server", f"something that is no loramux answers at {machine.url}", another)
        return
    text = f"{machine.url} serves {printable(str(body['base']))}: {printable(str(body.get('status')))}"
    if answer.status == 200:
        yield Finding.ok("server", text)
    elif body.get("status") == "engine_down":
        yield Finding.fail("server", text, "Start it again; its log has the reason.")
    else:
        yield Finding.warn("server", text, "Ask again shortly.")


def _listens(host: str, number: int) -> bool:
    try:
        socket.create_connection((host, number), timeout=2).close()
    except OSError:
        return False
    return True
