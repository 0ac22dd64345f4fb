/* Tensors in: NumPy arrays through the NumPy C API, torch (2.10 and later) through the exchange
 * table of its type (about 50 ns), everybody else through __dlpack__ (about 4 us). */
#include "borrow.h"
#include "../common/dlpack.h"
#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL lf_array_api
#include <numpy/arrayobject.h>
#include <string.h>

static const char *type_name(PyObject *object, PyObject **holder)
{
    const char *text = NULL;

    *holder = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    if (*holder) text = PyUnicode_AsUTF8AndSize(*holder, NULL);
    if (!text) PyErr_Clear();
    return text ? text : "an unnamed type";
}

/* Prefixes the first line of the pending exception with the argument's name. What torch raises
 * for a tensor that DLPack cannot describe (RuntimeError, BufferError) is a wrong kind of input. */
static int blame(const char *name)
{
    PyObject *type, *value, *traceback, *text = NULL, *lines = NULL, *line = NULL;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (PyErr_GivenExceptionMatches(type, PyExc_Exception)) {
        const int is_kind = PyErr_GivenExceptionMatches(type, PyExc_BufferError) ||
                            PyErr_GivenExceptionMatches(type, PyExc_RuntimeError);
        text = value ? PyObject_Str(value) : NULL;
        lines = text ? PyUnicode_Splitlines(text, 0) : NULL;
        line = lines && PyList_Size(lines) > 0 ? PyList_GetItem(lines, 0) : NULL;
        PyErr_Clear();
        PyErr_Format(is_kind ? PyExc_TypeError : type, "%s: cannot be read through DLPack: %S",
                     name, line ? line : type);
        Py_XDECREF(text);
        Py_XDECREF(lines);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
    } else {
        PyErr_Restore(type, value, traceback);  // KeyboardInterrupt and its like
    }
    return -1;
}

static const char *wanted(const lf_arg *arg)
{
    return arg->wants ? arg->wants : "float32, float16 or bfloat16";
}

/* ---- checks common to all three ways in ------------------------------------------------------ */

static int normalise(lf_arg *arg, int64_t itemsize)
{
    int64_t count = 1, expected = 1;

    for (int i = arg->ndim - 1; i >= 0; i--) {
        const int64_t n = arg->shape[i];
        if (n < 0) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected sizes of 0 or more, got %lld (dimension %d)", arg->name,
                         (long long)n, i);
            return -1;
        }
        if (n <= 1) arg->stride[i] = expected;
        const int64_t step = arg->stride[i] < 0 ? -arg->stride[i] : arg->stride[i];
        if (arg->stride[i] == INT64_MIN || (n > 1 && step > INT64_MAX / 16 / n)) {
            PyErr_Format(PyExc_ValueError, "%s: expected strides below 2^59 elements, got %lld",
                         arg->name, (long long)arg->stride[i]);
            return -1;
        }
        if (n > 0 && (count > INT64_MAX / 16 / n || expected > INT64_MAX / 16 / n)) {
            PyErr_Format(PyExc_ValueError, "%s: expected a size below 2^59 elements, got more",
                         arg->name);
            return -1;
        }
        count *= n;
        expected = n > 0 ? arg->stride[i] * n : expected;
    }
    if (count > 0 && !arg->data) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected memory behind it, got none (a fake, meta or "
                     "freed tensor)",
                     arg->name);
        return -1;
    }
    if (count > 0 && (uintptr_t)arg->data % (uintptr_t)itemsize) {
        PyErr_Format(PyExc_ValueError, "%s: expected data aligned to its %lld-byte elements",
                     arg->name, (long long)itemsize);
        return -1;
    }
    return 0;
}

static int check_rank(const lf_arg *arg)
{
    if (arg->ndim >= 0 && arg->ndim <= LF_MAX_NDIM) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected at most %d dimensions, got %d", arg->name,
                 LF_MAX_NDIM, arg->ndim);
    return -1;
}

/* ---- NumPy ----------------------------------------------------------------------------------- */

static int borrow_numpy(PyArrayObject *array, lf_arg *arg)
{
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT: arg->dtype = LF_F32; break;
    case NPY_HALF: arg->dtype = LF_F16; break;
    case NPY_INT32: arg->dtype = LF_I32; break;
    default:
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got NumPy %S", arg->name, wanted(arg),
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    if (!PyArray_ISNOTSWAPPED(array) || !PyArray_CHKFLAGS(array, NPY_ARRAY_ALIGNED)) {
        PyErr_Format(PyExc_ValueError, "%s: expected aligned elements in this machine's byte order",
                     arg->name);
        return -1;
    }
    const int64_t itemsize = arg->dtype == LF_F16 ? 2 : 4;
    arg->data = PyArray_BYTES(array);
    arg->ndim = PyArray_NDIM(array);
    arg->device = -1;
    arg->is_readonly = !PyArray_CHKFLAGS(array, NPY_ARRAY_WRITEABLE);
    if (check_rank(arg) < 0) return -1;
    for (int i = 0; i < arg->ndim; i++) {
        const int64_t bytes = PyArray_STRIDE(array, i);
        arg->shape[i] = PyArray_DIM(array, i);
        arg->stride[i] = bytes / itemsize;
        if (bytes % itemsize && arg->shape[i] > 1) {
            PyErr_Format(PyExc_ValueError, "%s: expected strides of whole elements, got %lld bytes",
                         arg->name, (long long)bytes);
            return -1;
        }
    }
    return normalise(arg, itemsize);
}

/* ---- DLPack ---------------------------------------------------------------------------------- */

static int read_dtype(DLDataType type, lf_arg *arg)
{
    const struct {
        uint8_t code, bits;
        lf_dtype dtype;
    } known[] = {
        {kDLFloat, 32, LF_F32},
        {kDLFloat, 16, LF_F16},
        {kDLBfloat, 16, LF_BF16},
        {kDLInt, 32, LF_I32},
    };
    static const char *const codes[] = {"int",    "uint",    "float", "opaque handles",
                                        "bfloat", "complex", "bool"};

    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (type.code == known[i].code && type.bits == known[i].bits && type.lanes == 1) {
            arg->dtype = known[i].dtype;
            return 0;
        }
    }
    if (type.lanes != 1)
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got vectors of %d values", arg->name,
                     wanted(arg), (int)type.lanes);
    else if (type.code >= sizeof codes / sizeof *codes)
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got DLPack type code %d", arg->name,
                     wanted(arg), (int)type.code);
    else if (type.code == kDLBool || type.code == kDLOpaqueHandle)
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s", arg->name, wanted(arg),
                     codes[type.code]);
    else
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s%d", arg->name, wanted(arg),
                     codes[type.code], (int)type.bits);
    return -1;
}

static int read_dltensor(const DLTensor *t, lf_arg *arg)
{
    int64_t expected = 1;

    arg->ndim = t->ndim;
    if (check_rank(arg) < 0 || read_dtype(t->dtype, arg) < 0) return -1;
    if (t->ndim > 0 && !t->shape) {
        PyErr_Format(PyExc_ValueError, "%s: expected a shape, got a DLPack tensor without one",
                     arg->name);
        return -1;
    }
    switch ((int)t->device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: arg->device = -1; break;
    case kDLCUDA:
    case kDLCUDAManaged: arg->device = t->device.device_id; break;
    default:
        PyErr_Format(PyExc_NotImplementedError,
                     "%s: expected a tensor on the CPU or a CUDA device, got DLPack device type %d",
                     arg->name, (int)t->device.device_type);
        return -1;
    }
    arg->data = t->data ? (char *)t->data + t->byte_offset : NULL;
    for (int i = t->ndim - 1; i >= 0; i--) {
        arg->shape[i] = t->shape[i];
        arg->stride[i] = t->strides ? t->strides[i] : expected;
        if (!t->strides && t->shape[i] > 0 && t->shape[i] <= INT64_MAX / 16 / expected)
            expected *= t->shape[i];
    }
    return normalise(arg, t->dtype.bits / 8);
}

/* The exchange table of a type, or NULL without an exception. */
static const DLPackExchangeAPI *find_table(PyTypeObject *type)
{
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    const DLPackExchangeAPI *table = NULL;

    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        table = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_XDECREF(capsule);  // the table outlives the process's last tensor
    PyErr_Clear();
    while (table && table->header.version.major != DLPACK_MAJOR_VERSION)
        table = (const DLPackExchangeAPI *)table->header.prev_api;
    return table && table->dltensor_from_py_object_no_sync ? table : NULL;
}

/* The same; the last type that has one is remembered (and kept alive), since looking it up takes
 * longer than all the rest. Under the GIL. */
static const DLPackExchangeAPI *exchange_table(PyTypeObject *type)
{
    static PyTypeObject *known;
    static const DLPackExchangeAPI *known_table;
    const DLPackExchangeAPI *table;

    if (type == known) return known_table;
    table = find_table(type);
    if (table) {
        PyTypeObject *before = known;
        known = (PyTypeObject *)Py_NewRef((PyObject *)type);
        known_table = table;
        Py_XDECREF((PyObject *)before);
    }
    return table;
}

int lf_has_table(PyObject *object)
{
    return !PyArray_Check(object) && exchange_table(Py_TYPE(object)) != NULL;
}

/* obj.__dlpack__(), asking first for version 1, then as before there were versions. */
static PyObject *export_capsule(PyObject *object, int on_cuda)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *none = PyTuple_New(0), *keywords = NULL, *capsule = NULL;

    if (!method || !none) goto done;
    // -1: no synchronisation, since our kernels join the producer's stream.
    keywords = on_cuda ? Py_BuildValue("{s:i,s:(ii)}", "stream", -1, "max_version", 1, 3)
                       : Py_BuildValue("{s:(ii)}", "max_version", 1, 3);
    if (!keywords) goto done;
    capsule = PyObject_Call(method, none, keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        if (PyDict_DelItemString(keywords, "max_version") < 0) goto done;
        capsule = PyObject_Call(method, none, keywords);
    }
done:
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(keywords);
    return capsule;
}

static int borrow_capsule(PyObject *object, lf_arg *arg)
{
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL), *holder = NULL;
    long kind = -1;

    if (!device) return blame(arg->name);
    if (PyTuple_Check(device) && PyTuple_Size(device) == 2)
        kind = PyLong_AsLong(PyTuple_GetItem(device, 0));
    Py_DECREF(device);
    if (kind == -1) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected __dlpack_device__() to give (type, id)",
                     arg->name);
        return -1;
    }
    arg->capsule = export_capsule(object, kind == kDLCUDA);
    if (!arg->capsule) return blame(arg->name);
    if (PyCapsule_IsValid(arg->capsule, "dltensor_versioned")) {
        const DLManagedTensorVersioned *managed =
            PyCapsule_GetPointer(arg->capsule, "dltensor_versioned");
        if (managed->version.major != DLPACK_MAJOR_VERSION) {
            PyErr_Format(PyExc_TypeError, "%s: expected DLPack version 1, got %u", arg->name,
                         managed->version.major);
            return -1;
        }
        arg->is_readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
        arg->is_copy = (managed->flags & DLPACK_FLAG_BITMASK_IS_COPIED) != 0;
        return read_dltensor(&managed->dl_tensor, arg);
    }
    if (PyCapsule_IsValid(arg->capsule, "dltensor")) {
        const DLManagedTensor *managed = PyCapsule_GetPointer(arg->capsule, "dltensor");
        return read_dltensor(&managed->dl_tensor, arg);
    }
    const char *got = PyCapsule_CheckExact(arg->capsule) ? PyCapsule_GetName(arg->capsule)
                                                         : type_name(arg->capsule, &holder);
    PyErr_Format(PyExc_TypeError,
                 "%s: expected __dlpack__() to give a fresh DLPack capsule, got %s", arg->name,
                 got ? got : "an unnamed capsule");
    Py_XDECREF(holder);
    return -1;
}

int lf_borrow(PyObject *object, const char *name, lf_arg *arg)
{
    const DLPackExchangeAPI *table;
    PyObject *holder;

    arg->name = name;
    if (PyArray_Check(object)) return borrow_numpy((PyArrayObject *)object, arg);
    table = exchange_table(Py_TYPE(object));
    if (table) {
        DLTensor t;
        if (table->dltensor_from_py_object_no_sync(object, &t) != 0) return blame(name);
        if (read_dltensor(&t, arg) < 0) return -1;
        if (arg->device < 0) return 0;
        arg->has_stream = 1;
        if (table->current_work_stream(t.device.device_type, t.device.device_id, &arg->stream) != 0)
            return blame(name);
        return 0;
    }
    if (PyObject_HasAttrString(object, "__dlpack__")) return borrow_capsule(object, arg);
    PyErr_Format(PyExc_TypeError,
                 "%s: expected a torch tensor, a NumPy array or an object with __dlpack__, got %s",
                 name, type_name(object, &holder));
    Py_XDECREF(holder);
    return -1;
}

/* The capsule was never renamed, so dropping it runs the producer's deleter: foreign code, which
 * may run while our own exception is pending. Set that aside meanwhile. */
void lf_release(lf_arg *arg)
{
    PyObject *type, *value, *traceback;

    if (!arg->owner && !arg->capsule) return;
    PyErr_Fetch(&type, &value, &traceback);
    Py_CLEAR(arg->capsule);
    Py_CLEAR(arg->owner);
    PyErr_Restore(type, value, traceback);
}
