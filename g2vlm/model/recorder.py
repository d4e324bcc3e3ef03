"""Hooks that keep what modules are given and what they return, for the length of one forward."""

from typing import Any

from torch import Tensor, nn


class Recorder:
    """A context: what is asked for before the forward can be read after it; on leaving, every hook is gone.

    The hooks compute nothing. What they would compute inside a checkpointed block would be missing when backward
    recomputes the block without them.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._kept: dict[tuple[nn.Module, str], Any] = {}

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def keep_output(self, module: nn.Module) -> None:
        """Keep what `module` returns."""

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            self._kept[module, "output"] = output

        self._handles.append(module.register_forward_hook(hook))

    def keep_inputs(self, module: nn.Module) -> None:
        """Keep the positional and the keyword arguments of `module`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._kept[module, "inputs"] = args, kwargs

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def replace_rows(self, embedding: nn.Module, rows: tuple[Tensor, ...], values: Tensor) -> None:
        """Let `embedding` return `values` (k, d) at `rows`, index tensors (k,) of its leading axes; the first time."""

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            handle.remove()
            return output.index_put(rows, values.to(output))

        handle = embedding.register_forward_hook(hook)
        self._handles.append(handle)

    def choose_rows(self, module: nn.Module, chosen: Tensor) -> None:
        """Let `module` see only the rows (k, d) of its first argument (..., d) where `chosen` (...) says so."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][chosen], *args[1:])

        self._handles.append(module.register_forward_pre_hook(hook))

    def output(self, module: nn.Module) -> Any:
        """What `module` returned; the last time, if it ran several times (a fused model first reconstructs)."""
        return self._kept[module, "output"]

    def argument(self, module: nn.Module, place: int, name: str) -> Any:
        """What `module` was given as its `place`-th positional argument or under `name`, the last time."""
        args, kwargs = self._kept[module, "inputs"]
        return args[place] if len(args) > place else kwargs[name]
