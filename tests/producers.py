"""DLPack producers made by hand, so that every field can be wrong."""

import ctypes
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import numpy as np

FLOAT, INT, BFLOAT, COMPLEX = 2, 0, 4, 5
READ_ONLY = 1


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", ctypes.POINTER(c_int64)),
        ("strides", ctypes.POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("dl_tensor", DLTensor), ("context", c_void_p), ("deleter", c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("dl_tensor", DLTensor),
    ]


_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]


def _array(values):
    return (c_int64 * max(len(values), 1))(*values)


class Producer:
    """A float32 array behind a hand-made capsule; keywords overwrite what it says.

    `name` is the capsule's name, `version` None makes an unversioned tensor, `device` is what
    `__dlpack_device__` answers, `strides=None` leaves them out, `error` is raised instead.
    """

    def __init__(
        self, array, *, name=None, version=(1, 0), flags=0, device=(1, 0), error=None, **said
    ):
        self.array = np.ascontiguousarray(array, np.float32)
        self.version, self.flags, self.device, self.error = version, flags, device, error
        self.name = name or (b"dltensor" if version is None else b"dltensor_versioned")
        self.said = dict(
            data=self.array.ctypes.data,
            device_type=device[0],
            device_id=device[1],
            ndim=self.array.ndim,
            code=FLOAT,
            bits=32,
            lanes=1,
            shape=list(self.array.shape),
            strides=[s // 4 for s in self.array.strides],
            byte_offset=0,
        )
        self.said.update(said)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        if self.error:
            raise self.error
        self.managed = Managed() if self.version is None else Versioned()
        if self.version is not None:
            self.managed.major, self.managed.minor = self.version
            self.managed.flags = self.flags
        for field, value in self.said.items():
            if field in ("shape", "strides"):
                value = None if value is None else _array(value)
            setattr(self.managed.dl_tensor, field, value)
        return _new(ctypes.addressof(self.managed), self.name, None)


class Old(Producer):
    """As before DLPack had versions: `__dlpack__` takes no `max_version`."""

    def __init__(self, array, **said):
        super().__init__(array, version=None, **said)

    def __dlpack__(self, stream=None):
        return super().__dlpack__()


class Shared:
    """Exports a NumPy array and nothing else: no shape, no dtype, no exchange table."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Answers:
    """`__dlpack__` and `__dlpack_device__` give (or raise) whatever they are told to."""

    def __init__(self, capsule=None, device=(1, 0)):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **keywords):
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule

    def __dlpack_device__(self):
        if isinstance(self.device, Exception):
            raise self.device
        return self.device


class NoDevice:
    """Has `__dlpack__` but not `__dlpack_device__`."""

    def __dlpack__(self, **keywords):
        raise AssertionError("asked for the capsule before the device")
