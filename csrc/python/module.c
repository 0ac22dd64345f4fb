/* lightforcing._core: the module, and what it says of its own build. */
#include "ops.h"
#define PY_ARRAY_UNIQUE_SYMBOL lf_array_api
#include <numpy/arrayobject.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static PyObject *py_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(lf_threads());
}

/* set_threads(n): threads of every CPU operator; 0 is OpenMP's default. */
static PyObject *py_set_threads(PyObject *Py_UNUSED(module), PyObject *count)
{
    int64_t threads;

    if (lf_integer(count, "threads", 0, 1024, &threads) < 0) return NULL;
    lf_set_threads((int)threads);
    return Py_NewRef(Py_None);
}

static PyObject *py_isa(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(lf_isa());
}

/* force_isa(name): "scalar", "vector", "avx2" or "avx512"; "best" undoes it. */
static PyObject *py_force_isa(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;

    if (!text) {
        PyErr_Clear();
        return PyErr_Format(PyExc_TypeError, "isa: expected a name, got %R", name);
    }
    if (lf_force_isa(strcmp(text, "best") == 0 ? NULL : text) < 0)
        return PyErr_Format(
            PyExc_ValueError,
            "isa: expected 'best' or one that this processor and build have, got %R", name);
    return Py_NewRef(Py_None);
}

/* cuda_warmup(device): loads every kernel there. */
static PyObject *py_cuda_warmup(PyObject *Py_UNUSED(module), PyObject *device)
{
    lf_error err = {0};
    int64_t index;
    int status;

    if (lf_integer(device, "device", 0, 1023, &index) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = lf_cuda_warmup((int)index, &err);
    Py_END_ALLOW_THREADS
    return status < 0 ? lf_raise(&err) : Py_NewRef(Py_None);
}

/* is_disabled(): does LIGHTFORCING_DISABLE say so? Anything but nothing, 0, false, no, off does. */
static PyObject *py_is_disabled(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    static const char *const no[] = {"", "0", "false", "no", "off"};
    const char *value = getenv("LIGHTFORCING_DISABLE");
    int disabled = value != NULL;

    for (size_t i = 0; disabled && i < sizeof no / sizeof *no; i++)
        disabled = strcasecmp(value, no[i]) != 0;
    return PyBool_FromLong(disabled);
}

/* force_kernel(name): "auto", "portable" or "sm90" for the attention of later CUDA calls. */
static PyObject *py_force_kernel(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;

    if (!text) {
        PyErr_Clear();
        return PyErr_Format(PyExc_TypeError, "kernel: expected a name, got %R", name);
    }
    if (lf_cuda_force_kernel(text) < 0)
        return PyErr_Format(PyExc_ValueError,
                            "kernel: expected 'auto', 'portable' or 'sm90' in a build with CUDA, "
                            "got %R",
                            name);
    lf_expire_plans();
    return Py_NewRef(Py_None);
}

/* why_portable(device): what keeps the Hopper kernel from the usual call there, or None. The usual
 * call is that of the video models: bfloat16, D 128, 128 query rows to blocks of 64 keys. */
static PyObject *py_why_portable(PyObject *Py_UNUSED(module), PyObject *device)
{
    const lf_tensor row = {.batch = 128, .token = 128, .head = 128};
    const int32_t list = 0;  // only that there is one is asked
    const lf_attend_params usual = {.q = row,
                                    .k = row,
                                    .v = row,
                                    .out = row,
                                    .indices = &list,
                                    .batch = 1,
                                    .heads = 1,
                                    .dim = 128,
                                    .q_len = 1,
                                    .k_len = 1,
                                    .frame_tokens = 1,
                                    .block_q = 128,
                                    .block_k = 64,
                                    .max_count = 1,
                                    .scale = 1,
                                    .dtype = LF_BF16};
    lf_error reason = {0};
    int64_t index;

    if (lf_integer(device, "device", 0, 1023, &index) < 0) return NULL;
    if (lf_attend_sm90_can_run(&usual, (int)index, &reason)) return Py_NewRef(Py_None);
    return PyUnicode_FromString(reason.text);
}

/* build_info() -> dict of what this binary holds and what its CUDA half finds. */
static PyObject *py_build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    int driver, runtime, devices;
    const int status = lf_cuda_versions(&driver, &runtime, &devices);
    PyObject *isas = PyList_New(0), *result = NULL;

    if (!isas) return NULL;
    for (int level = 0; lf_isa_name(level); level++) {
        PyObject *name = PyUnicode_FromString(lf_isa_name(level));
        if (!name || PyList_Append(isas, name) < 0) {
            Py_XDECREF(name);
            goto done;
        }
        Py_DECREF(name);
    }
    result =
        Py_BuildValue("{s:s,s:O,s:i,s:O,s:s,s:i,s:i,s:i,s:i}", "isa", lf_isa(), "isas", isas,
                      "threads", lf_threads(), "cuda_built", lf_cuda_built() ? Py_True : Py_False,
                      "cuda_archs", lf_cuda_archs(), "cuda_status", status, "cuda_driver", driver,
                      "cuda_runtime", runtime, "cuda_devices", devices);
done:
    Py_DECREF(isas);
    return result;
}

#define LF_FAST(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    LF_FAST(cag_schedule),
    LF_FAST(compress),
    LF_FAST(select_plan),
    LF_FAST(select_blocks),
    LF_FAST(block_sparse_attention),
    LF_FAST(facts),
    LF_FAST(plan_step),
    LF_FAST(sparse_step),
    LF_FAST(lists_to_bool),
    LF_FAST(lists_to_csr),
    LF_FAST(bool_to_lists),
    {"threads", py_threads, METH_NOARGS, NULL},
    {"set_threads", py_set_threads, METH_O, NULL},
    {"isa", py_isa, METH_NOARGS, NULL},
    {"force_isa", py_force_isa, METH_O, NULL},
    {"cuda_warmup", py_cuda_warmup, METH_O, NULL},
    {"is_disabled", py_is_disabled, METH_NOARGS, NULL},
    {"force_kernel", py_force_kernel, METH_O, NULL},
    {"why_portable", py_why_portable, METH_O, NULL},
    {"build_info", py_build_info, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *Py_UNUSED(module))
{
    static int watching;  // a second import of the module must not register again

    if (!watching && lf_watch_forks() != 0) {
        PyErr_SetString(PyExc_MemoryError, "lightforcing: no memory to watch for forks");
        return -1;
    }
    watching = 1;
    return PyArray_ImportNumPyAPI();
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lightforcing._core",
    .m_doc = "The C core of lightforcing; use the functions of `lightforcing`.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
