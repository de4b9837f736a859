"""Copies of frozen parameters in the form that forwards want them in.

Of parameters that may learn nothing is kept: fused optimisers change them without counting it as a change.
"""

from collections.abc import Callable

from torch import Tensor


class KeptCopies:
    """By name: what was made of some parameters, and as which state of them."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[tuple[int, int], ...], Tensor]] = {}

    def __call__(self, name: str, make: Callable[[], Tensor], *of: Tensor) -> Tensor:
        """What `make` made of the tensors `of`, as they are now."""
        if any(part.requires_grad for part in of):
            return make()
        # Tensors made in inference mode count no changes.
        state = tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in of)
        found = self._kept.get(name)
        if found is None or found[0] != state:
            self._kept[name] = found = (state, make())
        return found[1]
