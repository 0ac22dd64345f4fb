/* Every function that module.c puts into lightforcing._core. */
#ifndef LF_OPS_H
#define LF_OPS_H

#include "borrow.h"

/* ops.c: tensors */
PyObject *py_compress(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_select_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_select_blocks(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_block_sparse_attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

/* step.c: calls decided beforehand */
PyObject *py_facts(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_plan_step(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_sparse_step(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
void lf_expire_plans(void);

/* arrays.c: NumPy arrays */
PyObject *py_cag_schedule(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_lists_to_bool(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_lists_to_csr(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *py_bool_to_lists(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

#endif
