"""Shares memory with other libraries through DLPack, without a copy: https://dmlc.github.io/dlpack."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

CPU, CUDA = 1, 2  # DLDeviceType
_UINT = 1  # DLDataTypeCode
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_lent: dict[int, tuple[Any, ...]] = {}  # by address: kept alive until the deleter is called


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(managed: int) -> None:
    _lent.pop(managed, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    """Free a capsule that no consumer took. A consumer renames the capsule that it takes."""
    if _is_valid(capsule, _NAME):
        _delete(_pointer_of(capsule, _NAME))


_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))


class Lent:
    """A uint8 array in C order at `pointer` on a device. Its consumers keep `owner` alive.

    All writes to it must be done before: no stream is synchronised.
    """

    def __init__(self, pointer: int, shape: Sequence[int], device: tuple[int, int], owner: Any) -> None:
        self._pointer, self._shape, self._device, self._owner = pointer, tuple(shape), device, owner

    def __dlpack_device__(self) -> tuple[int, int]:
        """(DLDeviceType, device number)."""
        return self._device

    def __dlpack__(self, stream: int | None = None) -> Any:
        """The DLPack capsule."""
        numbers = ctypes.c_int64 * len(self._shape)
        shape = numbers(*self._shape)
        strides = numbers(*(math.prod(self._shape[axis + 1 :]) for axis in range(len(self._shape))))
        tensor = _Tensor(self._pointer, *self._device, len(self._shape), _UINT, 8, 1, shape, strides, 0)
        managed = _ManagedTensor(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _lent[address] = managed, shape, strides, self._owner
        return _new(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))
