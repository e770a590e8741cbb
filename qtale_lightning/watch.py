"""Whether a model still is what something was made from: asked at every token, where it must cost nothing."""

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as modules_of_torch
from torch.utils.hooks import RemovableHandle

_OF_OURS = ("kernel", "activation_bits", "_low")
"""Attributes of our modules that say how they compute."""

_registered = 0


def note_change(*_: Any) -> None:
    """Count a change to some module of this process, by which `Watch.undisturbed` goes.

    PyTorch tells of modules, parameters and buffers that are put into one; ours tell of what they compute with.
    """
    global _registered
    _registered += 1


modules_of_torch.register_module_module_registration_hook(note_change)
modules_of_torch.register_module_parameter_registration_hook(note_change)
modules_of_torch.register_module_buffer_registration_hook(note_change)


class Watch:
    """Sees whether modules are what they were: the same children, weights and kernels, and nothing hooked to them."""

    def __init__(self, modules: Iterable[nn.Module], tables: Iterable[dict[str, Any]] = ()) -> None:
        """Of modules, and of further tables of such."""
        modules = list(modules)
        tables = [
            *tables,
            *(table for module in modules for table in (module._modules, module._parameters) if table),
        ]
        self.tables, self.contents = tables, [dict(table) for table in tables]
        self.parameters = [
            one for module in modules for one in module._parameters.values() if one is not None
        ]
        self.addresses = self._addresses()
        self.owners: list[dict[str, Any]] = []
        self.names: list[str] = []
        for module in modules:
            own = [name for name in _OF_OURS if name in vars(module)]
            self.owners += [vars(module)] * len(own)
            self.names += own
        self.values = [*map(dict.get, self.owners, self.names)]
        self.attributes = [vars(module) for module in modules]
        self.counts = [*map(len, self.attributes)]  # more by one where a module is given a forward of its own
        self.own_forward = any("forward" in attributes for attributes in self.attributes)
        self.hooks = [
            hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.noted = (-1, -1)  # what was counted when they were seen to be the same

    def unchanged(self) -> bool:
        """Whether that is still so, by looking at all of it."""
        self.noted = (-1, -1)
        counted = _counted()
        try:
            same = self.tables == self.contents  # identical objects are equal, and no others but numbers
        except RuntimeError:  # of other tensors than before, which have no truth
            return False
        same = (
            same
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and [*map(len, self.attributes)] == self.counts
            and self._addresses() == self.addresses
            and not (self.own_forward or any(self.hooks) or modules_of_torch._has_any_global_hook())
        )
        if same:
            self.noted = counted
        return same

    def undisturbed(self) -> bool:
        """Whether nothing has been counted since `unchanged` said yes, which takes no time.

        Not seen: what is written past PyTorch's modules, into their tables or attributes, or given as `.data`.
        """
        return self.noted == _counted() and not modules_of_torch._has_any_global_hook()

    def _addresses(self) -> list[int]:
        """Where the parameters' numbers are."""
        return [parameter.data_ptr() for parameter in self.parameters]


def _counted() -> tuple[int, int]:
    """Changes to modules of this process, and hooks that were put on any."""
    return _registered, RemovableHandle.next_id
