"""`loramux chat [MODEL]`: talk to a server's models, from a terminal or a pipe."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux.cli.client import Client, add_options
from loramux.cli.terminal import printable, table
from loramux.console import note, say
from loramux.errors import AdapterNotFound, LoramuxError

_HELP = """\
/model NAME    answer with another model from here on
/models        list the models
/system TEXT   set the system prompt (no TEXT: none)
/reset         forget the conversation
/quit          leave (Ctrl-D as well; Ctrl-C stops an answer)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if the server was not reached, or an answer that no person was there to retry failed."""
    options = _parser().parse_args(argv)
    try:
        client = Client.of(options)
        chat = Chat(client, "", options.system, _sampling(options))
        chat.use(options.model)
    except LoramuxError as error:
        return _complain(error)
    if options.once is not None:
        return 0 if _turn(chat, options.once) else 1
    if sys.stdin.isatty():
        say(f"{chat.model} at {client.url}; /help lists the commands.")
        return _converse(chat, _typed())
    return _converse(chat, (line.rstrip("\n") for line in sys.stdin), strict=True)


@dataclass
class Chat:
    """A conversation with one model at a time; it survives a change of the model."""

    client: Client
    model: str
    system: str | None
    sampling: dict[str, Any]
    said: list[dict[str, str]] = field(default_factory=list)

    def use(self, name: str | None) -> None:
        """Answer with `name` from here on, None: the base model. Raises LoramuxError if there is no such model."""
        cards = self.client.models()
        ids = [str(card["id"]) for card in cards]
        # `name@version` and `base:name` are the server's business; only `name` is listed.
        listed = name and name.partition("@")[0].removeprefix(f"{ids[0]}:")
        if listed is not None and listed not in ids:
            close = difflib.get_close_matches(listed, ids, n=3)
            hint = f"Did you mean {printable(', '.join(close))}?" if close else "/models lists them."
            raise AdapterNotFound(f"There is no model {name} at {self.client.url}.", hint=hint)
        self.model = name or ids[0]

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer, piece by piece. What was answered before an interruption is part of the conversation; a turn
        that failed is not."""
        messages = [*self.said, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = ""
        body = {"model": self.model, "messages": [*system, *messages], **self.sampling}
        try:
            with contextlib.closing(self.client.chat(body)) as events:
                for event in events:
                    for choice in event.get("choices") or ():
                        piece = choice.get("delta", {}).get("content") or ""
                        answer += piece
                        yield piece
        except LoramuxError:
            answer = ""
            raise
        finally:
            if answer:
                self.said = [*messages, {"role": "assistant", "content": answer}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux chat",
        description=__doc__,
        epilog=f"commands in a chat:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="an adapter's name (default: the base model)")
    parser.add_argument("--once", metavar="TEXT", help="print the answer to TEXT and end")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer (default: the server's)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the server's)")
    add_options(parser)
    return parser


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    given = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    return {name: value for name, value in given.items() if value is not None}


def _typed() -> Iterator[str]:
    """Lines from a person; Ctrl-C begins a new one, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history and editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("", "(/quit leaves)")


def _converse(chat: Chat, lines: Iterator[str], *, strict: bool = False) -> int:
    """`strict`: remember a failure in the exit status."""
    failed = False
    for line in lines:
        text = line.strip()
        if text == "/quit":
            break
        if text.startswith("/"):
            failed |= not _command(chat, *text.split(maxsplit=1))
        elif text:
            try:
                failed |= not _turn(chat, text)
            except KeyboardInterrupt:
                say(" (stopped)")
    return 1 if strict and failed else 0


def _command(chat: Chat, command: str, argument: str = "") -> bool:
    try:
        if command == "/model" and argument:
            chat.use(argument)
            say(f"({printable(chat.model)} answers)")
        elif command == "/models":
            say(*table([_model(card, chat.model) for card in chat.client.models()]))
        elif command == "/system":
            chat.system = argument or None
            say(f"(system prompt: {argument or 'none'})")
        elif command == "/reset":
            chat.said = []
            say("(forgotten)")
        else:
            say(_HELP)
            return command == "/help"
    except LoramuxError as error:
        return _complain(error) == 0
    return True


def _turn(chat: Chat, text: str) -> bool:
    """Print one answer as it comes; False if it failed."""
    try:
        with contextlib.closing(chat.ask(text)) as pieces:
            for piece in pieces:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
    except LoramuxError as error:
        say("")
        _complain(error)
        return False
    say("")
    return True


def _model(card: dict[str, Any], current: str) -> tuple[str, ...]:
    adapter = card.get("adapter") or {}
    kind = f"{adapter.get('method')}, rank {adapter.get('rank')}" if adapter.get("method") else ""
    state = str(adapter.get("state", "base model"))
    return ("*" if card["id"] == current else " ", *map(printable, (str(card["id"]), state, kind)))


def _complain(error: LoramuxError) -> int:
    note(f"loramux chat: {error}")
    return 1
