"""What a check of a DeepSpeed JSON finds."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Binding:
    """A value of the JSON that says the same thing as one of the run's settings."""

    setting: str
    key: str  # path in the JSON, such as optimizer.params.lr
    value: Any  # in the setting's own terms
    shown: str  # as it stands in the JSON
    also: tuple[Any, ...] = ()  # values of the setting that agree with the JSON too
    times: str = ""  # `value` is a share of this other setting
    is_default: bool = False  # DeepSpeed's default of a key that is not there: it gives way to the run's own


@dataclass
class Findings:
    """What a JSON binds and what is to be said about its keys. Every line begins with a key's dotted path.

    `lacking` holds paths alone.
    """

    bindings: list[Binding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # DeepSpeed refuses or ignores it, or it contradicts itself
    unsupported: list[str] = field(default_factory=list)  # DeepSpeed takes it, this program (or the engine) cannot
    notes: list[str] = field(default_factory=list)  # it changes nothing at this stage, or here
    lacking: list[str] = field(default_factory=list)  # the engine has no counterpart; no result depends on it
    tree: dict[str, Any] = field(default_factory=dict)  # what is left: keys with an effect, in today's names

    def bind(self, setting: str, key: str, value: Any, shown: Any, **more: Any) -> None:
        self.bindings.append(Binding(setting, key, value, json.dumps(shown), **more))
