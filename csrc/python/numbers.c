/* Numbers and names that several operators take, each checked with a sentence. */
#include "numbers.h"
#include <math.h>
#include <string.h>

/* A whole number of frames in `tokens`. */
int lf_whole_frames(const char *name, const char *letter, int64_t tokens, int64_t frame_tokens)
{
    if (tokens % frame_tokens == 0) return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: expected whole frames of %lld tokens (frame_tokens), got %s = %lld", name,
                 (long long)frame_tokens, letter, (long long)tokens);
    return -1;
}

int lf_block_size(PyObject *object, const char *name, int64_t low, int64_t *block)
{
    if (lf_integer(object, name, low, 128, block) < 0) return -1;
    if ((*block & (*block - 1)) == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected a power of two from %lld to 128, got %lld", name,
                 (long long)low, (long long)*block);
    return -1;
}

int lf_head_size(const lf_arg *arg, int64_t dim)
{
    if (dim >= 1 && dim <= 256 && dim % 8 == 0) return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: expected a head size D that is a multiple of 8 up to 256, "
                 "got %lld",
                 arg->name, (long long)dim);
    return -1;
}

/* None is D^-0.5; else a finite number above 0. */
int lf_softmax_scale(PyObject *object, int64_t dim, double *scale)
{
    if (object == Py_None) {
        *scale = 1.0 / sqrt((double)dim);
        return 0;
    }
    if (lf_number(object, "scale", scale) < 0) return -1;
    if (*scale > 0 && (float)*scale > 0 && isfinite((float)*scale)) return 0;
    PyErr_Format(PyExc_ValueError, "scale: expected a finite number above 0, got %R", object);
    return -1;
}

/* score name -> lf_score */
int lf_read_score(PyObject *object, lf_score *score)
{
    static const char *const names[] = {"mean", "mass", "lse"};
    const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, NULL) : NULL;

    for (int i = 0; text && i < 3; i++) {
        if (strcmp(text, names[i]) == 0) {
            *score = (lf_score)i;
            return 0;
        }
    }
    PyErr_Clear();
    PyErr_Format(text ? PyExc_ValueError : PyExc_TypeError,
                 "score: expected 'mean', 'mass' or 'lse', got %R", object);
    return -1;
}

int lf_read_budget(PyObject *sparsity, PyObject *keep, PyObject *sink, PyObject *near,
                   PyObject *hierarchy, lf_budget_arguments *b)
{
    if (lf_number(sparsity, "sparsity", &b->sparsity) < 0) return -1;
    if (!(b->sparsity >= 0 && b->sparsity <= 1)) {
        PyErr_Format(PyExc_ValueError, "sparsity: expected a number in [0, 1], got %R", sparsity);
        return -1;
    }
    if (lf_integer(keep, "keep_frames", 0, INT32_MAX, &b->keep_frames) < 0) return -1;
    if (lf_integer(sink, "sink_frames", 0, INT32_MAX, &b->sink_frames) < 0) return -1;
    if (lf_integer(near, "near_frames", 0, INT32_MAX, &b->near_frames) < 0) return -1;
    if (b->sink_frames + b->near_frames > b->keep_frames) {
        PyErr_Format(PyExc_ValueError,
                     "keep_frames: expected at least sink_frames + near_frames = %lld, got %lld",
                     (long long)(b->sink_frames + b->near_frames), (long long)b->keep_frames);
        return -1;
    }
    if (!PyBool_Check(hierarchy)) {
        PyErr_Format(PyExc_TypeError, "hierarchy: expected True or False, got %R", hierarchy);
        return -1;
    }
    b->hierarchy = hierarchy == Py_True;
    return 0;
}
