/* Numbers and names that several operators take. As in borrow.h, -1 means an exception is set. */
#ifndef LF_NUMBERS_H
#define LF_NUMBERS_H

#include "borrow.h"

/* `tokens` must be a whole number of frames; `letter` names them in the sentence. */
int lf_whole_frames(const char *name, const char *letter, int64_t tokens, int64_t frame_tokens);

/* A power of two from `low` to 128; a multiple of 8 up to 256. */
int lf_block_size(PyObject *object, const char *name, int64_t low, int64_t *block);
int lf_head_size(const lf_arg *arg, int64_t dim);

/* None is D^-0.5; else a finite number above 0. */
int lf_softmax_scale(PyObject *object, int64_t dim, double *scale);

/* "mean", "mass" or "lse". */
int lf_read_score(PyObject *object, lf_score *score);

/* The budget of a selection. */
typedef struct {
    int64_t keep_frames, sink_frames, near_frames;
    double sparsity;
    int hierarchy;
} lf_budget_arguments;

int lf_read_budget(PyObject *sparsity, PyObject *keep, PyObject *sink, PyObject *near,
                   PyObject *hierarchy, lf_budget_arguments *b);

#endif
