"""What a method says of itself: the layouts it reads and what it can do. The table of methods is made of it."""

import re
from dataclasses import dataclass

OURS = "loramux"
# Of methods whose paper could not be read whole and that have no public code; their docstrings say what is open.
OUR_READING = "as far as its paper tells"


@dataclass(frozen=True)
class Layout:
    """One way to save one method's adapters.

    method  what it is, as its paper calls it
    origin  the code base that saves it so; OURS where nothing public does
    types   what `peft_type` in its adapter_config.json can be
    files   files that only it has, for layouts without adapter_config.json
    when    what else tells it apart, or has to be there; Markdown
    keys    a pattern of tensor names that other layouts do not have; "" where there are none
    """

    method: str
    origin: str
    types: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    when: str = ""
    keys: str = ""

    def __str__(self) -> str:
        return f"{self.method} ({self.origin})"

    @property
    def sign(self) -> str:
        """By what a folder is recognised as this layout; Markdown."""
        marks = [*(f"`peft_type: {kind}`" for kind in self.types[:1]), *(f"`{kind}`" for kind in self.types[1:])]
        marks += [f"`{name}`" for name in self.files]
        return " ".join(part for part in (" or ".join(marks), self.when) if part)

    def has_tensor(self, name: str) -> bool:
        """Whether a tensor's name gives this layout away."""
        return bool(self.keys) and re.fullmatch(self.keys, name) is not None


@dataclass(frozen=True)
class Abilities:
    """A row of the table of methods. `tests/adapters/test_matrix.py` holds every method to what it says here.

    layouts         what `detect` claims
    read            whether `read` and `lower` take such adapters, or only recognise them
    write           whether loramux can write this kind
    serve           whether `prepare` takes all of them; in words, which; or none: then `why` says why
    exact           whether the lowered form computes just what the code base does; in words, in which sense
    router          what one routing decision holds for: "none", "token", "prompt", "task" or "any"
    prefix_cache    whether requests for one content may share the KV cache of a common prefix: what a token gets from
                    the adapter depends on no later token. In words, under which condition
    quantised_base  whether it is lowered from names and widths of the base alone, so that the number format of the
                    base's weights does not matter; in words, under which condition
    posterior       the kind of posterior that its adapters have; None if they are not Bayesian
    """

    layouts: tuple[Layout, ...]
    read: bool = True
    write: bool = False
    serve: bool | str = True
    exact: bool | str = True
    router: str = "none"
    prefix_cache: bool | str = True
    quantised_base: bool | str = True
    posterior: str | None = None
    why: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """Every `peft_type` of its layouts."""
        return tuple(kind for layout in self.layouts for kind in layout.types)
