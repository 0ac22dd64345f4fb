/* Facts about arguments: each is checked here, once, and answered with a sentence. */
#include "borrow.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const dtype_names[] = {"float32", "float16", "bfloat16", "int32"};

/* Lengths are letters of their own, since q and k differ in them. */
static const char *letter_name(char letter, char buffer[2])
{
    if (letter == 'Q') return "Lq";
    if (letter == 'K') return "Lk";
    if (letter == 'M') return "Kmax";
    buffer[0] = letter;
    buffer[1] = '\0';
    return buffer;
}

static void letter_list(const char *letters, char *text, size_t size)
{
    char buffer[2];

    text[0] = '\0';
    for (int i = 0; letters[i]; i++) {
        if (i) strncat(text, ", ", size - strlen(text) - 1);
        strncat(text, letter_name(letters[i], buffer), size - strlen(text) - 1);
    }
}

int lf_shape(const lf_arg *arg, const char *letters, lf_dims *dims)
{
    const int ndim = (int)strlen(letters);
    char names[64], buffer[2];

    if (arg->ndim != ndim) {
        letter_list(letters, names, sizeof names);
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions (%s), got %d", arg->name, ndim,
                     names, arg->ndim);
        return -1;
    }
    for (int i = 0; i < ndim; i++) {
        const int c = letters[i] - 'A';
        const char *name = letter_name(letters[i], buffer);
        if (dims->from[c] == NULL) {
            dims->from[c] = arg->name;
            dims->size[c] = arg->shape[i];
        } else if (dims->size[c] != arg->shape[i]) {
            PyErr_Format(PyExc_ValueError, "%s: dimension %d (%s) is %lld, but %s has %s = %lld",
                         arg->name, i, name, (long long)arg->shape[i], dims->from[c], name,
                         (long long)dims->size[c]);
            return -1;
        }
    }
    if (ndim > 0 && arg->shape[ndim - 1] > 1 && arg->stride[ndim - 1] != 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected a last stride of 1, got %lld", arg->name,
                     (long long)arg->stride[ndim - 1]);
        return -1;
    }
    return 0;
}

int lf_contiguous(const lf_arg *arg)
{
    int64_t expected = 1;

    for (int i = 0; i < arg->ndim; i++)
        if (arg->shape[i] == 0) return 0;
    for (int i = arg->ndim - 1; i >= 0; i--) {
        if (arg->shape[i] > 1 && arg->stride[i] != expected) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected contiguous memory, got stride %lld in "
                         "dimension %d",
                         arg->name, (long long)arg->stride[i], i);
            return -1;
        }
        expected *= arg->shape[i] > 0 ? arg->shape[i] : 1;
    }
    return 0;
}

/* First and last byte that a tensor of at least one element covers. */
static void byte_range(const lf_arg *arg, uintptr_t *first, uintptr_t *last)
{
    const int64_t size = arg->dtype == LF_F32 || arg->dtype == LF_I32 ? 4 : 2;

    *first = *last = (uintptr_t)arg->data;
    for (int i = 0; i < arg->ndim; i++) {
        const int64_t reach = (arg->shape[i] - 1) * arg->stride[i] * size;
        *(reach < 0 ? first : last) += (uintptr_t)reach;
    }
    *last += (uintptr_t)size - 1;
}

static int is_empty(const lf_arg *arg)
{
    for (int i = 0; i < arg->ndim; i++)
        if (arg->shape[i] == 0) return 1;
    return 0;
}

int lf_inside(const lf_arg *part, const lf_arg *whole)
{
    uintptr_t first, last, from, to;

    if (is_empty(part) || is_empty(whole)) return 0;
    byte_range(part, &first, &last);
    byte_range(whole, &from, &to);
    return from <= first && last <= to;
}

int lf_apart(const lf_arg *out, int count, const lf_arg *const inputs[])
{
    uintptr_t first, last, from, to;
    int64_t reach = 0;  // elements that the dimensions of smaller stride cover
    int done[LF_MAX_NDIM] = {0};

    if (is_empty(out)) return 0;
    for (int i = 0; i < out->ndim; i++) {
        int least = -1;
        for (int j = 0; j < out->ndim; j++)
            if (!done[j] && (least < 0 || llabs(out->stride[j]) < llabs(out->stride[least])))
                least = j;
        done[least] = 1;
        if (out->shape[least] > 1 && llabs(out->stride[least]) <= reach) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected a place for every element, got strides that overlap",
                         out->name);
            return -1;
        }
        reach += (out->shape[least] - 1) * llabs(out->stride[least]);
    }
    byte_range(out, &first, &last);
    for (int i = 0; i < count; i++) {
        if (!inputs[i]->name || !inputs[i]->data || is_empty(inputs[i])) continue;
        byte_range(inputs[i], &from, &to);
        if (from > last || to < first) continue;
        PyErr_Format(PyExc_ValueError, "%s: expected memory apart from that of %s, got an overlap",
                     out->name, inputs[i]->name);
        return -1;
    }
    return 0;
}

int lf_expect_dtype(const lf_arg *arg, lf_dtype dtype)
{
    if (arg->dtype == dtype) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s", arg->name, dtype_names[dtype],
                 dtype_names[arg->dtype]);
    return -1;
}

int lf_same_dtype(const lf_arg *arg, const lf_arg *like)
{
    if (arg->dtype == like->dtype) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %s as %s has, got %s", arg->name,
                 dtype_names[like->dtype], like->name, dtype_names[arg->dtype]);
    return -1;
}

int lf_is_float(const lf_arg *arg)
{
    if (arg->dtype != LF_I32) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected float32, float16 or bfloat16, got int32",
                 arg->name);
    return -1;
}

void lf_place_name(int device, char text[24])
{
    if (device < 0)
        memcpy(text, "the CPU", 8);
    else
        PyOS_snprintf(text, 24, "cuda:%d", device);
}

int lf_placed(const char *op, int count, const lf_arg *const args[], PyObject *stream,
              lf_place *place)
{
    char here[24], there[24];

    place->device = args[0]->device;
    place->stream = args[0]->stream;
    lf_place_name(args[0]->device, there);
    for (int i = 1; i < count; i++) {
        if (args[i]->device == args[0]->device || !args[i]->name) continue;
        lf_place_name(args[i]->device, here);
        PyErr_Format(PyExc_ValueError, "%s: is on %s, but %s is on %s", args[i]->name, here,
                     args[0]->name, there);
        return -1;
    }
    if (place->device < 0) return 0;
    if (!lf_cuda_built()) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s: expected tensors on the CPU, got %s: this build has no CUDA half; put "
                     "nvcc on PATH and run pip install --force-reinstall --no-cache-dir .",
                     op, there);
        return -1;
    }
    if (args[0]->has_stream) return 0;
    if (stream == Py_None) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a library whose current CUDA stream is known (torch, CuPy)",
                     args[0]->name);
        return -1;
    }
    place->stream = PyLong_AsVoidPtr(stream);
    return PyErr_Occurred() ? -1 : 0;
}

lf_tensor lf_view(const lf_arg *arg)
{
    return (lf_tensor){arg->data, arg->stride[0], arg->stride[1], arg->stride[2]};
}

int lf_integer(PyObject *object, const char *name, int64_t low, int64_t high, int64_t *value)
{
    PyObject *whole = PyBool_Check(object) ? NULL : PyNumber_Index(object);
    int overflow = 0;

    if (!whole) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %R", name, object);
        return -1;
    }
    *value = PyLong_AsLongLongAndOverflow(whole, &overflow);
    Py_DECREF(whole);
    if (!overflow && *value >= low && *value <= high) return 0;
    if (high == INT64_MAX || (high == INT32_MAX && low <= 1))
        PyErr_Format(PyExc_ValueError, "%s: expected %lld or more, got %R", name, (long long)low,
                     object);
    else
        PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, got %R", name, (long long)low,
                     (long long)high, object);
    return -1;
}

int lf_number(PyObject *object, const char *name, double *value)
{
    *value = PyBool_Check(object) ? -1.0 : PyFloat_AsDouble(object);
    if (PyBool_Check(object) || (*value == -1.0 && PyErr_Occurred())) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected a number, got %R", name, object);
        return -1;
    }
    if (isfinite(*value)) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected a finite number, got %R", name, object);
    return -1;
}

int lf_arguments(const char *op, Py_ssize_t expected, Py_ssize_t got)
{
    if (expected == got) return 0;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", op, expected, got);
    return -1;
}

int lf_borrow_out(PyObject *object, PyObject *empty, const char *name, const char *letters,
                  lf_dtype dtype, lf_dims *dims, lf_arg *arg)
{
    const int ndim = (int)strlen(letters);
    PyObject *made = NULL;

    if (dtype == LF_I32) arg->wants = "int32";
    if (object && object != Py_None) {
        made = Py_NewRef(object);
    } else {
        PyObject *shape = PyTuple_New(ndim);
        if (!shape) return -1;
        for (int i = 0; i < ndim; i++) {
            PyObject *n = PyLong_FromLongLong(LF_DIM(*dims, letters[i]));
            if (!n || PyTuple_SetItem(shape, i, n) < 0) {
                Py_DECREF(shape);
                return -1;
            }
        }
        made = PyObject_CallFunction(empty, "Os", shape, dtype_names[dtype]);
        Py_DECREF(shape);
        if (!made) return -1;
    }
    if (lf_borrow(made, name, arg) < 0) {
        Py_DECREF(made);
        return -1;
    }
    arg->owner = made;
    if (arg->is_copy) {
        PyErr_Format(PyExc_ValueError, "%s: expected memory to write in place, got a copy of it",
                     name);
        return -1;
    }
    if (arg->is_readonly) {
        PyErr_Format(PyExc_ValueError, "%s: expected writable memory, got a read-only array", name);
        return -1;
    }
    return lf_shape(arg, letters, dims) < 0 || lf_expect_dtype(arg, dtype) < 0 ? -1 : 0;
}

PyObject *lf_raise(const lf_error *err)
{
    PyObject *type = PyExc_RuntimeError;

    if (err->kind == LF_UNSUPPORTED) type = PyExc_NotImplementedError;
    if (err->kind == LF_NO_MEMORY) type = PyExc_MemoryError;
    PyErr_SetString(type, err->text);
    return NULL;
}
