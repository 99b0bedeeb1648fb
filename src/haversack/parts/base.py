"""What every part is: a frozen dataclass of hyper-parameters that declares what it stores, and does it.

A part fills one stage of one resident (the table in docs/design.md). Working state is passed in and out; a part never
replaces a module and never branches on a model's or a method's name. `to_dict`/`part_from_dict` round-trip through plan
files; registries discover parts by walking `haversack.parts`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

from haversack.errors import PlanError, UsageError

RESIDENTS = ("weights", "kv", "optimizer", "activations", "loss", "adaptation", "experts", "placement")


@dataclass(frozen=True)
class Source:
    """Where an idea comes from."""

    authors: str
    year: int
    title: str = ""
    arxiv: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Part(ABC):
    """Base of all parts. Class attributes are declarations that the contract tests try to prove false."""

    id: ClassVar[str]
    resident: ClassVar[str]
    stage: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[Source | None] = None
    catalogue: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()  # of {"hessian", "calibration", "training"}
    lossless: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """A few words for tables, unique among settings: the id, and the fields that differ from their defaults."""
        own = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        ]
        return " ".join([self.id, *own])

    def to_dict(self) -> dict[str, Any]:
        """`{"part": id, field: value, ...}`, JSON-ready."""
        return {"part": self.id, **dataclasses.asdict(self)}


def check_range(part: str, field: str, value: object, allowed: str, ok: bool) -> None:
    """Raise a UsageError that names the part, the field, the value and what is allowed, unless `ok`."""
    if not ok:
        raise UsageError(f"{part}: {field} is {value!r}, but must be {allowed}.")


@cache
def all_parts() -> dict[str, type[Part]]:
    """Every registered part by id, found by importing each module below `haversack.parts`."""
    import haversack.parts as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    found: dict[str, type[Part]] = {}
    queue = list(Part.__subclasses__())
    while queue:
        cls = queue.pop()
        queue.extend(cls.__subclasses__())
        if "id" in cls.__dict__ and found.setdefault(cls.id, cls) is not cls:
            raise AssertionError(f"two parts share the id {cls.id!r}")
    return dict(sorted(found.items()))


@cache
def part_class(name: str) -> type[Part] | None:
    """The part of an id: looked for in the module that the id names, since importing all of them takes longer than reading a small model."""
    import haversack.parts as package

    stem = name.rpartition(".")[2].replace("-", "_")
    for folder in pkgutil.iter_modules(package.__path__):
        path = f"{package.__name__}.{folder.name}.{stem}"
        if folder.ispkg and stem.isidentifier() and find_spec(path) is not None:
            for value in vars(importlib.import_module(path)).values():
                if isinstance(value, type) and issubclass(value, Part) and value.__dict__.get("id") == name:
                    return value
    return all_parts().get(name)


def part_from_dict(data: dict[str, Any]) -> Part:
    """The part that `to_dict` wrote. Raises PlanError naming an unknown part or field."""
    fields = dict(data)
    name = fields.pop("part", None)
    cls = part_class(name) if isinstance(name, str) else None
    if cls is None:
        raise PlanError(f"the plan names a part {name!r}, which this version of haversack does not have.")
    try:
        return cls(**fields)
    except TypeError as error:
        raise PlanError(f"the plan's fields for part {name!r} are wrong: {error}.") from None
