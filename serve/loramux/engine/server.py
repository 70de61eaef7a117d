"""Run vLLM's OpenAI server, with our parts in it, in this process until it is interrupted."""

from __future__ import annotations

from argparse import Namespace

import uvloop

try:
    from vllm.entrypoints.launchers.api_server.entry import run_server
except ImportError:  # up to 0.31
    from vllm.entrypoints.openai.api_server import run_server

from loramux.engine.plugin import Launch


def serve(args: Namespace, launch: Launch) -> None:
    """Blocks. vLLM's own console command is not used: the CPU build of vLLM breaks it."""
    args.loramux = launch
    uvloop.run(run_server(args))
