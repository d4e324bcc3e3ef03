"""Evaluation inputs: torch tensors or numpy arrays of any precision become checked float64 arrays."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

ArrayLike: TypeAlias = npt.NDArray[Any] | torch.Tensor
FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]
Shape: TypeAlias = tuple[int | str, ...]  # a string is a free size, named for the error message


def to_numpy(value: ArrayLike) -> npt.NDArray[Any]:
    """The values on the host; bfloat16, which numpy lacks, becomes float32."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    host = value.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


def float64_array(value: ArrayLike, name: str, shape: Shape | None = None) -> FloatArray:
    """The values in float64, possibly non-finite.

    Raises:
        ValueError: the array has another shape than `shape`.
    """
    array = to_numpy(value).astype(np.float64)
    if shape is not None:
        check_shape(array, name, shape)
    return array


def finite_array(value: ArrayLike, name: str, shape: Shape | None = None) -> FloatArray:
    """The values in float64.

    Raises:
        ValueError: the array has another shape than `shape`, or holds NaN or infinity.
    """
    array = float64_array(value, name, shape)
    check_finite(array, name)
    return array


def bool_array(value: ArrayLike, name: str, shape: Shape | None = None) -> BoolArray:
    """A mask.

    Raises:
        ValueError: the array is not boolean or has another shape than `shape`.
    """
    array = to_numpy(value)
    if array.dtype != np.bool_:
        raise ValueError(f"{name}: expected a boolean mask, given dtype {array.dtype}")
    if shape is not None:
        check_shape(array, name, shape)
    return array


def check_shape(array: npt.NDArray[Any], name: str, shape: Shape) -> None:
    """Raise ValueError unless every integer of `shape` matches; strings match any size."""
    same_rank = array.ndim == len(shape)
    if not same_rank or any(
        isinstance(want, int) and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({expected}), given {array.shape}")


def check_finite(array: npt.NDArray[Any], name: str) -> None:
    """Raise ValueError when the array holds NaN or infinity."""
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{name}: {bad} of {array.size} values are NaN or infinite, all must be finite")
