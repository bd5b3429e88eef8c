"""Reading a pickle as data, without running what it names."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, ClassVar


# The one in Python: that in C takes any amount of memory that a pickle asks for.
class InertUnpickler(pickle._Unpickler):
    """Imports and runs nothing: a name in the pickle stands for what a subclass ``knows`` it as, or is an error."""

    knows: ClassVar[Mapping[str, Any]] = {}
    """The full names of classes and functions → what to take instead: harmless, called or not."""

    # Nothing that is written today needs the others, of which some import what they name by themselves.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in pickle.BYTEARRAY8 + pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.INST + pickle.OBJ
    }

    def find_class(self, module: str, name: str) -> Any:
        known = self.knows.get(f"{module}.{name}")
        return self.unknown(f"{module}.{name}") if known is None else known

    def unknown(self, name: str) -> Any:
        """What stands for a full name that is not among those known."""
        raise pickle.UnpicklingError(f"it names {name}, which does not belong there")

    def persistent_load(self, pid: Any) -> Any:
        return pid  # where the data of a tensor lies, which stays there
