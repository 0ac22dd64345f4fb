/* The border: tensors borrowed through NumPy or DLPack, argument checks, errors as sentences.
 *
 * Nothing is owned past a call. Every check that fails sets a Python exception whose text names
 * the argument, what was expected and what came, and returns -1. */
#ifndef LF_BORROW_H
#define LF_BORROW_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "../lightforcing.h"

enum { LF_MAX_NDIM = 8 };

typedef struct {
    const char *name;
    const char *wants;  // set before borrowing where it is not a float tensor: "int32"
    char *data;
    int ndim;
    int64_t shape[LF_MAX_NDIM];
    int64_t stride[LF_MAX_NDIM];  // in elements; of a size-1 dimension as if contiguous
    lf_dtype dtype;
    int device;  // -1: CPU, else the CUDA device
    int is_readonly;
    int is_copy;     // the producer says that this is not its own memory
    int has_stream;  // the producer's exchange table named its current stream
    void *stream;
    PyObject *capsule;  // what __dlpack__ gave, kept as long as the memory is used
    PyObject *owner;    // an output's object: the call's result
} lf_arg;

/* Sizes by letter, and the argument that fixed each: B batch, Q Lq, K Lk, H heads, D head size,
 * R query blocks, J key blocks, M Kmax. */
typedef struct {
    int64_t size[26];
    const char *from[26];
} lf_dims;
#define LF_DIM(dims, letter) ((dims).size[(letter) - 'A'])

/* Fills `arg` from a NumPy array, a type with a DLPack exchange table, or __dlpack__. */
int lf_borrow(PyObject *object, const char *name, lf_arg *arg);
void lf_release(lf_arg *arg);

/* 1 if the type of `object` has a DLPack exchange table: then lf_borrow() takes about 50 ns, asks
 * nothing of Python and leaves nothing to release. */
int lf_has_table(PyObject *object);

/* `object` if it is not None, else empty(shape, dtype) called with the sizes of `letters`. The
 * result must be writable and is kept in arg->owner. A NULL object and None are the same. */
int lf_borrow_out(PyObject *object, PyObject *empty, const char *name, const char *letters,
                  lf_dtype dtype, lf_dims *dims, lf_arg *arg);

/* Ties the sizes of `arg` to letters; the last stride must be 1. */
int lf_shape(const lf_arg *arg, const char *letters, lf_dims *dims);
int lf_contiguous(const lf_arg *arg);

/* An output must not lie over itself, nor over the memory of an input. */
int lf_inside(const lf_arg *part, const lf_arg *whole);  // 1: no byte of part lies elsewhere
int lf_apart(const lf_arg *out, int count, const lf_arg *const inputs[]);

/* dtype must equal `like`'s; or one of f32, f16, bf16. */
int lf_same_dtype(const lf_arg *arg, const lf_arg *like);
int lf_is_float(const lf_arg *arg);
int lf_expect_dtype(const lf_arg *arg, lf_dtype dtype);

/* All arguments on one device, which the operator `op` has kernels for. On a GPU the stream is the
 * producer's current one: asked of the first argument's exchange table, else `stream` (an integer,
 * or None where there is none to name). */
int lf_placed(const char *op, int count, const lf_arg *const args[], PyObject *stream,
              lf_place *place);

/* "the CPU" or "cuda:1", for errors. */
void lf_place_name(int device, char text[24]);

/* The [B, L, H, D] view that the core takes. */
lf_tensor lf_view(const lf_arg *arg);

/* A Python integer (not a bool) in [low, high]; a finite number. */
int lf_integer(PyObject *object, const char *name, int64_t low, int64_t high, int64_t *value);
int lf_number(PyObject *object, const char *name, double *value);
int lf_arguments(const char *op, Py_ssize_t expected, Py_ssize_t got);

/* Sets the exception of a core error; always NULL. */
PyObject *lf_raise(const lf_error *err);

#endif
