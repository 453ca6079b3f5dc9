"""Does autograd keep weights that were computed from the parameters, instead of the parameters themselves?

Under autocast a layer multiplies with a bf16 copy of its weight, under weight_norm with a product of two parameters.
A pending backward pass would use that copy, not the weights of now. The graph shows it: an operation that parameters
go into and the layer's input does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_VIEWS = frozenset(
    [
        "Alias",
        "AsStrided",
        "Diagonal",
        "Expand",
        "Flatten",
        "LiftFresh",
        "Movedim",
        "Narrow",
        "NumpyT",
        "Permute",
        "Real",
        "ReshapeAlias",
        "Select",
        "Slice",
        "Split",
        "SplitWithSizes",
        "Squeeze",
        "Swapdims",
        "T",
        "Transpose",
        "Unbind",
        "Unflatten",
        "Unfold",
        "Unsqueeze",
        "UnsafeView",
        "View",
        "ViewAs",
    ]
)
"""Operations whose result is the same memory, so it holds the weights of now."""
_LOOKUPS = frozenset(["Embedding", "EmbeddingBag", "Gather", "Index", "IndexSelect", "TakeAlong", "Take"])
"""Operations that an input without a gradient (tokens) goes into."""


def derives_weights(outputs: Iterable[torch.Tensor | None], inputs: Iterable[torch.Tensor | None]) -> bool:
    """Whether the graph from ``inputs`` to ``outputs`` holds derived weights.

    ``inputs`` are leaves that require a gradient where they can have one.
    """
    leaves = {id(one) for one in inputs if one is not None}
    from_input: dict[Any, bool] = {}
    from_parameters: dict[Any, bool] = {}
    stack = [one.grad_fn for one in outputs if one is not None and one.grad_fn is not None]
    while stack:
        node = stack[-1]
        if node in from_input:
            stack.pop()
            continue
        below = [one for one, _ in node.next_functions if one is not None]
        waiting = [one for one in below if one not in from_input]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            from_input[node] = id(variable) in leaves
            from_parameters[node] = not from_input[node]
            continue
        kind = node.name().rpartition("Backward")[0]
        from_input[node] = kind in _LOOKUPS or any(from_input[one] for one in below)
        from_parameters[node] = any(from_parameters[one] for one in below)
        if from_parameters[node] and not from_input[node] and kind not in _VIEWS:
            return True
    return False
