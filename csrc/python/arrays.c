/* Schedules and list conversions: NumPy arrays in and out, through the NumPy C API. */
#include "ops.h"
#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL lf_array_api
#include <numpy/arrayobject.h>
#include <string.h>

/* A new reference to `object` as a C-contiguous array of `type` and `ndim` dimensions. */
static PyArrayObject *as_array(PyObject *object, const char *name, int type, int ndim)
{
    PyArrayObject *array = NULL;

    if (!PyArray_Check(object) || PyArray_TYPE((PyArrayObject *)object) != type) {
        PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array of %s, got %R", name,
                     type == NPY_BOOL    ? "bool"
                     : type == NPY_INT32 ? "int32"
                                         : "int64",
                     PyArray_Check(object) ? (PyObject *)PyArray_DESCR((PyArrayObject *)object)
                                           : (PyObject *)Py_TYPE(object));
        return NULL;
    }
    if (PyArray_NDIM((PyArrayObject *)object) != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions, got %d", name, ndim,
                     PyArray_NDIM((PyArrayObject *)object));
        return NULL;
    }
    array = (PyArrayObject *)PyArray_FROM_OTF(object, type, NPY_ARRAY_IN_ARRAY);
    return array;
}

static int read_law(PyObject *object, lf_law *law)
{
    static const char *const names[] = {"linear", "exponential", "constant", "count"};
    const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, NULL) : NULL;

    for (int i = 0; text && i < 4; i++) {
        if (strcmp(text, names[i]) == 0) {
            *law = (lf_law)i;
            return 0;
        }
    }
    PyErr_Clear();
    PyErr_Format(text ? PyExc_ValueError : PyExc_TypeError,
                 "law: expected 'linear', 'exponential', 'constant' or 'count', got %R", object);
    return -1;
}

/* cag_schedule(chunk_ends, dense_frames, window, sparsity, base, law) -> (sparsity, solved) */
PyObject *py_cag_schedule(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    PyArrayObject *ends = NULL, *out = NULL;
    lf_cag_params p = {0};
    lf_error err = {0};
    PyObject *result = NULL;
    double solved;

    if (lf_arguments("cag_schedule", 6, nargs) < 0) goto done;
    ends = as_array(args[0], "chunk_ends", NPY_INT64, 1);
    if (!ends) goto done;
    p.chunk_ends = PyArray_DATA(ends);
    p.chunks = PyArray_DIM(ends, 0);
    for (int64_t c = 0; c < p.chunks; c++) {
        if (p.chunk_ends[c] > (c ? p.chunk_ends[c - 1] : 0)) continue;
        PyErr_Format(PyExc_ValueError,
                     "chunk_ends: expected ascending frame counts above 0, got %lld at place %lld",
                     (long long)p.chunk_ends[c], (long long)c);
        goto done;
    }
    if (lf_integer(args[1], "dense_frames", 0, INT64_MAX, &p.dense_frames) < 0) goto done;
    if (lf_integer(args[2], "window", 0, INT64_MAX, &p.window) < 0) goto done;
    if (lf_number(args[3], "sparsity", &p.target) < 0) goto done;
    if (lf_number(args[4], "base", &p.base) < 0) goto done;
    if (read_law(args[5], &p.law) < 0) goto done;
    if (!(p.target >= 0 && p.target < 1)) {
        PyErr_Format(PyExc_ValueError, "sparsity: expected a number in [0, 1), got %R", args[3]);
        goto done;
    }
    if (p.law != LF_LAW_COUNT && !(p.base >= p.target && p.base <= 1)) {
        PyErr_Format(PyExc_ValueError, "base: expected a number from sparsity = %R to 1, got %R",
                     args[3], args[4]);
        goto done;
    }
    out = (PyArrayObject *)PyArray_SimpleNew(1, (const npy_intp[]){p.chunks}, NPY_DOUBLE);
    if (!out) goto done;
    p.sparsity = PyArray_DATA(out);
    if (lf_cag(&p, &solved, &err) < 0) {
        lf_raise(&err);
        goto done;
    }
    result = Py_BuildValue("(Od)", out, solved);

done:
    Py_XDECREF(ends);
    Py_XDECREF(out);
    return result;
}

/* The arrays of a list, and its number of rows. */
static int read_lists(PyObject *const *args, PyArrayObject **indices, PyArrayObject **counts,
                      npy_intp *rows)
{
    *indices = as_array(args[0], "indices", NPY_INT32, 4);
    if (!*indices) return -1;
    *counts = as_array(args[1], "counts", NPY_INT32, 3);
    if (!*counts) return -1;
    for (int i = 0; i < 3; i++) {
        if (PyArray_DIM(*indices, i) == PyArray_DIM(*counts, i)) continue;
        PyErr_Format(PyExc_ValueError, "counts: dimension %d is %lld, but indices has %lld", i,
                     (long long)PyArray_DIM(*counts, i), (long long)PyArray_DIM(*indices, i));
        return -1;
    }
    *rows = PyArray_SIZE(*counts);
    const int32_t *count = PyArray_DATA(*counts);
    const int64_t width = PyArray_DIM(*indices, 3);
    for (npy_intp r = 0; r < *rows; r++) {
        if (count[r] >= 0 && count[r] <= width) continue;
        PyErr_Format(PyExc_ValueError, "counts: expected 0 to Kmax = %lld, got %d (row %lld)",
                     (long long)width, (int)count[r], (long long)r);
        return -1;
    }
    return 0;
}

/* lists_to_bool(indices, counts, blocks) -> bool [B, H, R, J] */
PyObject *py_lists_to_bool(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    PyArrayObject *indices = NULL, *counts = NULL, *out = NULL;
    PyObject *result = NULL;
    npy_intp rows = 0;
    int64_t blocks;

    if (lf_arguments("lists_to_bool", 3, nargs) < 0) goto done;
    if (read_lists(args, &indices, &counts, &rows) < 0) goto done;
    if (lf_integer(args[2], "blocks", 0, INT32_MAX, &blocks) < 0) goto done;
    const npy_intp shape[4] = {PyArray_DIM(counts, 0), PyArray_DIM(counts, 1),
                               PyArray_DIM(counts, 2), blocks};
    out = (PyArrayObject *)PyArray_ZEROS(4, shape, NPY_BOOL, 0);
    if (!out) goto done;
    const int32_t *row = PyArray_DATA(indices), *count = PyArray_DATA(counts);
    npy_bool *kept = PyArray_DATA(out);
    for (npy_intp r = 0; r < rows; r++, row += PyArray_DIM(indices, 3), kept += blocks) {
        for (int32_t i = 0; i < count[r]; i++) {
            if (row[i] < 0 || row[i] >= blocks) {
                PyErr_Format(PyExc_ValueError,
                             "indices: expected key blocks 0 to %lld, got %d (row %lld)",
                             (long long)blocks - 1, (int)row[i], (long long)r);
                goto done;
            }
            kept[row[i]] = 1;
        }
    }
    result = Py_NewRef((PyObject *)out);

done:
    Py_XDECREF(indices);
    Py_XDECREF(counts);
    Py_XDECREF(out);
    return result;
}

/* lists_to_csr(indices, counts) -> (int64 indptr [B*H*R + 1], int32 indices) */
PyObject *py_lists_to_csr(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    PyArrayObject *indices = NULL, *counts = NULL, *indptr = NULL, *flat = NULL;
    PyObject *result = NULL;
    npy_intp rows = 0;

    if (lf_arguments("lists_to_csr", 2, nargs) < 0) goto done;
    if (read_lists(args, &indices, &counts, &rows) < 0) goto done;
    indptr = (PyArrayObject *)PyArray_SimpleNew(1, (const npy_intp[]){rows + 1}, NPY_INT64);
    if (!indptr) goto done;
    const int32_t *row = PyArray_DATA(indices), *count = PyArray_DATA(counts);
    int64_t *start = PyArray_DATA(indptr);
    start[0] = 0;
    for (npy_intp r = 0; r < rows; r++) start[r + 1] = start[r] + count[r];
    flat = (PyArrayObject *)PyArray_SimpleNew(1, (const npy_intp[]){start[rows]}, NPY_INT32);
    if (!flat) goto done;
    for (npy_intp r = 0; r < rows; r++, row += PyArray_DIM(indices, 3))
        memcpy((int32_t *)PyArray_DATA(flat) + start[r], row, (size_t)count[r] * sizeof *row);
    result = Py_BuildValue("(OO)", indptr, flat);

done:
    Py_XDECREF(indices);
    Py_XDECREF(counts);
    Py_XDECREF(indptr);
    Py_XDECREF(flat);
    return result;
}

/* bool_to_lists(mask [B, H, R, J]) -> (int32 indices [B, H, R, Kmax], int32 counts [B, H, R]);
 * what lies behind a row's count is 0. */
PyObject *py_bool_to_lists(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    PyArrayObject *mask = NULL, *indices = NULL, *counts = NULL;
    PyObject *result = NULL;
    int32_t widest = 0;

    if (lf_arguments("bool_to_lists", 1, nargs) < 0) goto done;
    mask = as_array(args[0], "mask", NPY_BOOL, 4);
    if (!mask) goto done;
    const npy_intp *shape = PyArray_DIMS(mask), blocks = shape[3];
    const npy_bool *kept = PyArray_DATA(mask);
    counts = (PyArrayObject *)PyArray_SimpleNew(3, shape, NPY_INT32);
    if (!counts) goto done;
    const npy_intp rows = PyArray_SIZE(counts);
    int32_t *count = PyArray_DATA(counts);
    for (npy_intp r = 0; r < rows; r++) {
        count[r] = 0;
        for (npy_intp j = 0; j < blocks; j++) count[r] += kept[r * blocks + j] != 0;
        if (count[r] > widest) widest = count[r];
    }
    indices = (PyArrayObject *)PyArray_ZEROS(
        4, ((const npy_intp[]){shape[0], shape[1], shape[2], widest}), NPY_INT32, 0);
    if (!indices) goto done;
    int32_t *row = PyArray_DATA(indices);
    for (npy_intp r = 0; r < rows; r++, row += widest)
        for (npy_intp j = 0, i = 0; j < blocks; j++)
            if (kept[r * blocks + j]) row[i++] = (int32_t)j;
    result = Py_BuildValue("(OO)", indices, counts);

done:
    Py_XDECREF(mask);
    Py_XDECREF(indices);
    Py_XDECREF(counts);
    return result;
}
