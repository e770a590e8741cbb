"""Whether a model still is what something was made from: asked at every token, where it must cost nothing."""

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor, nn
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
        self.states = self._states()
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
        counted = _counted()
        unchanged = not self.hooked() and self.same()
        self.noted = counted if unchanged else (-1, -1)
        return unchanged

    def undisturbed(self) -> bool:
        """Whether nothing has been counted since `unchanged` said yes, which takes no time.

        Not seen: what is written past PyTorch's modules, into their tables or attributes (`functional_call`, a
        module's own ``forward``), a parameter that becomes None, and weights that are given as ``.data`` or written in
        place where a copy of them is in use (routers in bfloat16).
        """
        return self.noted == _counted() and not modules_of_torch._has_any_global_hook()

    def same(self) -> bool:
        """Whether children, weights and kernels are what they were."""
        try:
            same = self.tables == self.contents  # identical objects are equal, and no others but numbers
        except RuntimeError:  # of other tensors than before, which have no truth
            return False
        return (
            same
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and [*map(len, self.attributes)] == self.counts
            and self._states() == self.states
        )

    def hooked(self) -> bool:
        """Whether a forward pass is more than the modules' own."""
        return self.own_forward or any(self.hooks) or modules_of_torch._has_any_global_hook()

    def _states(self) -> list[tuple[int, int]]:
        """Where the parameters' numbers are, and their versions."""
        return [*map(state_of, self.parameters)]


def version_of(tensor: Tensor) -> int:
    """That grows where a tensor is written in place; of those made in inference mode there is none."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Where its numbers are, and their version: what was made of them is of these."""
    return tensor.data_ptr(), version_of(tensor)


def _counted() -> tuple[int, int]:
    """Changes to modules of this process, and hooks that were put on any."""
    return _registered, RemovableHandle.next_id
