"""Which modules a PEFT LoRA config targets, and with which rank and alpha. The rules are PEFT's own.

A name in a list matches a module whose full name it is, or whose name ends with "." + it. A string is a pattern for
the whole name; "all-linear" is every linear layer but the head. `layers_to_transform` narrows suffix matches only.
The first matching key of `rank_pattern` or `alpha_pattern` wins, in the order of the file.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from loramux_adapters.peft.config import LoraConfig
from loramux_adapters.peft.patterns import Patterns

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"[\w.]+")
# The first numbered part of a name is the layer; a later one may be an expert.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


class Targets:
    """Resolves one config against module names."""

    def __init__(self, config: LoraConfig) -> None:
        self._config = config
        self._patterns = Patterns()
        self._used: set[tuple[str, str]] = set()
        # Pattern field -> the first module for which its matching keys disagree.
        self.ambiguous: dict[str, str] = {}

    def select(self, modules: Iterable[str], linear: bool = True) -> set[str]:
        """The modules among these that the config targets. `linear`: they count for "all-linear"."""
        return {module for module in modules if self._is_target(module, linear) and not self._is_excluded(module)}

    def rank(self, module: str) -> int:
        return self._lookup("rank_pattern", self._config.rank_pattern, module, self._config.r)

    def alpha(self, module: str) -> float:
        return self._lookup("alpha_pattern", self._config.alpha_pattern, module, self._config.lora_alpha)

    def resolve(self, modules: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
        """Rank and alpha of each of the modules that the config targets."""
        selected = sorted(self.select(modules))
        return {module: self.rank(module) for module in selected}, {module: self.alpha(module) for module in selected}

    def unused_patterns(self) -> list[tuple[str, str]]:
        """(field, key) of the patterns that no rank() or alpha() call has matched so far."""
        keys = [("rank_pattern", key) for key in self._config.rank_pattern]
        keys += [("alpha_pattern", key) for key in self._config.alpha_pattern]
        return [key for key in keys if key not in self._used]

    def _is_target(self, module: str, linear: bool) -> bool:
        target = self._config.target_modules
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return linear
            return self._patterns.fullmatch(target, module, "target_modules")
        if module in target:
            return True
        return any(module.endswith(f".{name}") for name in target) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if not self._config.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self._config.layers_pattern]
        for pattern in patterns or [_ANY_LAYER]:
            match = self._patterns.match(pattern, module, "layers_pattern")
            if match is not None:
                return match["idx"] is not None and int(match["idx"]) in self._config.layers_to_transform
        return False

    def _is_excluded(self, module: str) -> bool:
        excluded = self._config.exclude_modules
        if isinstance(excluded, str):
            return self._patterns.fullmatch(excluded, module, "exclude_modules")
        return module in excluded or any(module.endswith(f".{name}") for name in excluded)

    def _matches(self, key: str, module: str, field: str) -> bool:
        if _PLAIN.fullmatch(key):
            # Decided without the pattern where possible: EVA writes a key per module, 300 000 pairs for 80 layers.
            # What is left is a dot of the key that would stand for another character.
            start = len(module) - len(key)
            if start < 0 or (start > 0 and module[start - 1] != "."):
                return False
            tail = module[start:]
            if tail == key or list(map(len, tail.split("."))) == list(map(len, key.split("."))):
                return tail == key
        return self._patterns.fullmatch(rf"(.*\.)?({key})$", module, field)

    def _lookup(self, field: str, table: Mapping[str, Value], module: str, default: Value) -> Value:
        matching = [key for key in table if self._matches(key, module, field)]
        if not matching:
            return default
        if any(table[key] != table[matching[0]] for key in matching):
            self.ambiguous.setdefault(field, module)
        self._used.add((field, matching[0]))
        return table[matching[0]]
