"""A model of transformers whose layers are read as they run and dropped after, for models larger than memory.

The class that the configuration names is built with its parameters on the meta device; buffers that no
checkpoint holds (rotary frequencies, Gemma's embedding scale) are real. Each decoder layer reads its tensors
before it runs and drops them after; so does every other module with parameters, the token table by the rows
that are asked for and a linear map outside the layers (the head) in row blocks. Held are one layer, or one
block, and the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from stip_keyservice.protect.equivalence.weights import Weights
from stip_protocol.errors import CheckpointInvalid

ENTRY, FINAL = "entry", "final norm"
"""Names of what is observed before the first layer and after the last norm; between them `layer 0`, `layer 1`, ..."""
BLOCK_BYTES = 16 << 20
"""Bytes of a head's row block, and of its products."""

Observe = Callable[[str, torch.Tensor], None]
"""Told (name, hidden states [samples, length, d]) as a pass goes on."""
Route = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Told (router, scores [positions, experts], experts taken [positions, few]) as a pass goes on."""


class StreamedModel:
    """One model, evaluated a pass at a time. `layers` is their number.

    `table` and `final_norm` are parameters: the token table, and the weight of the norm after the last layer.
    What a table scales its rows by (Gemma) is rounded to `stored`, the checkpoint's dtype, whatever is computed in.
    With `unit`, what is observed after that norm is without its scale and shift: with the stored weight `unit`
    and no bias. `routers` are the weights of the maps that choose experts. Raises `CheckpointInvalid` where
    transformers does not accept the configuration, and what `weights` refuses with.
    """

    def __init__(
        self,
        directory: Path,
        weights: Weights,
        *,
        class_name: str,
        prefix: str,
        table: str,
        stored: torch.dtype,
        final_norm: str | None,
        unit: float | None = None,
        routers: Collection[str] = (),
    ) -> None:
        self._weights = weights
        self._stored = stored
        self._unit = unit
        self._observe: Observe = unseen
        self._route: Route = unrouted
        self._buffers: dict[str, torch.Tensor] = {}
        self._model = _meta_model(directory, class_name, weights.dtype)
        own_prefix = "" if any(name.startswith(prefix) for name, _ in self._model.named_parameters()) else prefix
        parameters = self._model.named_parameters(remove_duplicate=False)
        weights.check({own_prefix + name: parameter.shape for name, parameter in parameters})
        layers = next(module for module in self._model.modules() if isinstance(module, nn.ModuleList))
        self.layers = len(layers)
        """Their number."""
        self.layer_bytes = weights.dtype.itemsize * max(
            sum(parameter.numel() for parameter in layer.parameters()) for layer in layers
        )
        """Of the largest layer, as it is computed with."""
        for index, layer in enumerate(layers):
            if index == 0:
                layer.register_forward_pre_hook(self._entered, with_kwargs=True)
            layer.register_forward_hook(partial(self._left, f"layer {index}"))
        whole = set(layers)
        inside = {module for layer in layers for module in layer.modules()}
        for path, module in self._model.named_modules():
            for own, _ in module.named_parameters(recurse=False):
                (router, *_) = weights.canonical(f"{own_prefix}{path}.{own}")
                if router in routers:
                    module.register_forward_hook(partial(self._routed, router))
        for path, module in self._model.named_modules():
            if module in whole:
                self._stream(module, own_prefix + path)
            elif module not in inside and any(True for _ in module.parameters(recurse=False)):
                self._place(module, own_prefix + path, table, final_norm)

    def __call__(self, observe: Observe, route: Route, **inputs: torch.Tensor) -> torch.Tensor:
        """One pass: logits of a causal class, [samples, length, vocabulary], or the last hidden states of another."""
        self._observe, self._route = observe, route
        try:
            with torch.inference_mode():
                result = self._model(**inputs, use_cache=False)
        finally:
            self._buffers.clear()
        found: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
        return found

    def _place(self, module: nn.Module, name: str, table: str, final_norm: str | None) -> None:
        """Choose how a module outside the layers gets its parameters."""
        owned = {self._weights.canonical(f"{name}.{own}"): own for own, _ in module.named_parameters(recurse=False)}
        if (table,) in owned:
            for own, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, own, buffer.to(self._stored).to(buffer.dtype))
            module.padding_idx = None  # type: ignore[assignment]  # of gradients only, and the rows are others
            module.register_forward_pre_hook(partial(self._look_up, f"{name}.{owned[(table,)]}"))
            module.register_forward_hook(_drop)
        elif isinstance(module, nn.Linear):
            module.forward = partial(self._in_blocks, module, name)  # type: ignore[method-assign]
        else:
            if (final_norm,) in owned:
                module.register_forward_hook(self._normed)
            self._stream(module, name)

    def _stream(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(partial(self._load, name))
        module.register_forward_hook(_drop)

    def _load(self, name: str, module: nn.Module, inputs: Any) -> None:
        for path, owner in module.named_modules(prefix=name):
            for own, parameter in list(owner.named_parameters(recurse=False)):
                buffer = self._buffer(f"{path.removeprefix(name)}.{own}", parameter.shape)
                self._weights.fill(f"{path}.{own}", buffer)
                setattr(owner, own, _parameter(buffer))

    def _buffer(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Memory for a parameter, by its name in its module: that of the same parameter in the layer before.

        Given back and asked for anew, an allocator keeps some of it with every layer: up to the whole model.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = torch.empty(shape, dtype=self._weights.dtype)
        return buffer

    def _look_up(self, parameter: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        """Give a table the rows that are asked for, and the ids their places among them."""
        asked, places = torch.unique(inputs[0], return_inverse=True)
        setattr(module, parameter.rpartition(".")[2], _parameter(self._weights.chosen(parameter, asked)))
        return (places,)

    def _in_blocks(self, module: nn.Linear, name: str, states: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else self._weights.rows(f"{name}.bias", 0, module.out_features)
        step = max(1, BLOCK_BYTES // (module.in_features * states.itemsize))
        out = states.new_empty((*states.shape[:-1], module.out_features))
        for start in range(0, module.out_features, step):
            stop = min(start + step, module.out_features)
            rows = self._weights.rows(f"{name}.weight", start, stop)
            multiply(states, rows, out[..., start:stop])
        return out if bias is None else out.add_(bias)

    def _entered(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._observe(ENTRY, inputs[0] if inputs else named["hidden_states"])

    def _left(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._observe(name, output[0] if isinstance(output, tuple) else output)

    def _routed(self, name: str, router: nn.Module, inputs: Any, output: Any) -> None:
        """Routers of transformers give (scores before softmax, weights, experts)."""
        scores, _, experts = output
        self._route(name, scores, experts)

    def _normed(self, norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._unit is not None:
            for own, parameter in list(norm.named_parameters(recurse=False)):
                setattr(norm, own, _parameter(torch.full_like(parameter, 0.0 if own == "bias" else self._unit)))
            output = norm.forward(*inputs)
        self._observe(FINAL, output)


def _meta_model(directory: Path, class_name: str, dtype: torch.dtype) -> Any:
    """The class of transformers, in evaluation mode, with parameters that have shapes and no values.

    Raises `CheckpointInvalid` where transformers does not accept the configuration: what it then raises is anything.
    """
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
        for name, value in _SETTINGS.items():
            setattr(config, name, value)
        with _parameters_on_meta():
            for kind in (AutoModelForCausalLM, AutoModel):
                model: Any = kind.from_config(config, dtype=dtype, **_IMPLEMENTATIONS)  # type: ignore[no-untyped-call]
                if type(model).__name__ == class_name:
                    return model.eval()
    except Exception as error:
        got = f"one that transformers refuses ({type(error).__name__})"
        raise CheckpointInvalid.because("config.json", got, f"one that {class_name} can be built from") from error
    raise CheckpointInvalid.because("class of transformers", type(model).__name__, class_name)


_SETTINGS: dict[str, Any] = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "use_cache": False,
    "pad_token_id": None,
}
"""Fields of a configuration that change what a call returns, or that an index check reads, and no logit."""
_IMPLEMENTATIONS = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
"""Others need a library or a device; grouped products of experts know neither float64 nor every width."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device at once; buffers stay real."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else _parameter(torch.empty_like(parameter, device="meta"))

    register: Any = register_module_parameter_registration_hook  # torch's own types forget what a hook may return
    hook = register(move)
    try:
        yield
    finally:
        hook.remove()


def _drop(module: nn.Module, inputs: Any, output: Any) -> None:
    for owner in module.modules():
        for own, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, own, _parameter(torch.empty_like(parameter, device="meta")))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def multiply(states: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """states·rowsᵀ into `out`, a view of wider logits: some columns at a time, since products are whole tensors."""
    step = max(1, BLOCK_BYTES * states.shape[-1] // (states.numel() * states.itemsize))
    for start in range(0, len(rows), step):
        out[..., start : start + step] = states @ rows[start : start + step].T


def unseen(name: str, states: torch.Tensor) -> None:
    """Nobody looks."""


def unrouted(router: str, scores: torch.Tensor, experts: torch.Tensor) -> None:
    """Nobody looks."""
