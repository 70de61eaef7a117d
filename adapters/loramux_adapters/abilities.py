"""What a method can do, for people who choose one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Abilities:
    """What `loramux adapters methods` shows.

    read    what is recognised, in a few words
    write   whether loramux can write this kind
    serve   whether every adapter of the kind can be served; else what cannot, in a few words
    exact   whether what is served computes just what the checkpoint does
    router  what one routing decision holds for: "none", "token", "prompt", "task" or "any"
    """

    read: str
    write: bool = False
    serve: bool | str = True
    exact: bool = True
    router: str = "none"
