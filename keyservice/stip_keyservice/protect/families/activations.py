"""Activations by their transformers name (ACT2FN), and what passes through them."""

from __future__ import annotations

from stip_keyservice.protect.architecture import After

ACTIVATIONS: dict[str, After] = {
    **dict.fromkeys(
        (
            "gelu",
            "gelu_10",
            "gelu_accurate",
            "gelu_fast",
            "gelu_new",
            "gelu_python",
            "gelu_python_tanh",
            "gelu_pytorch_tanh",
            "hardswish",
            "laplace",
            "mish",
            "quick_gelu",
            "relu2",
            "relu6",
            "sigmoid",
            "silu",
            "sqrtsoftplus",
            "swish",
            "tanh",
        ),
        After.ELEMENTWISE,
    ),
    **dict.fromkeys(("leaky_relu", "linear", "relu"), After.HOMOGENEOUS),
}
"""Those that act on each value alone and have no parameters; for the homogeneous ones f(s·x) = s·f(x), s > 0."""
