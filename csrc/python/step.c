/* The sparse call of a patched layer, decided once and then run many times.
 *
 * A video makes thousands of calls of a few kinds. What decides a call (shapes, strides, dtype,
 * device, stream) is a short string of bytes, facts(); the arguments of such a call are checked
 * once, by plan_step(); sparse_step() compares the facts, fills in the addresses, and runs pooling,
 * selection and attention. Only tensors with a DLPack exchange table come this way. */
#include "numbers.h"
#include "ops.h"
#include <string.h>

typedef struct {
    int64_t shape[3][4], stride[3][4];  // q, k, v
    void *stream;
    int64_t kernels;  // of forced_kernels
    int32_t device, dtype[3], aligned[3];
} call_facts;

typedef struct {
    call_facts facts;
    lf_select_params select;
    lf_attend_params attend;
    int64_t list_words, select_words,
        words;  // of the workspace, 32 bits each: list, select, attend
} call_plan;

static const char *const plan_name = "lightforcing.step";
static int64_t forced_kernels;  // plans made before another attention kernel was chosen are stale

void lf_expire_plans(void) { forced_kernels++; }

/* 1 with the facts of q, k and v; 0 if one of them has no exchange table or is no 4-D float tensor
 * in reach; -1 with an exception that is not about the tensors. */
static int read_facts(PyObject *const *objects, lf_arg tensors[3], call_facts *facts)
{
    static const char *const names[] = {"q", "k", "v"};

    memset(facts, 0, sizeof *facts);  // the gaps are compared too
    for (int i = 0; i < 3; i++) {
        lf_arg *x = &tensors[i];
        if (!lf_has_table(objects[i])) return 0;
        if (lf_borrow(objects[i], names[i], x) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
            PyErr_Clear();
            return 0;
        }
        if (x->ndim != 4 || x->dtype == LF_I32 || x->device != tensors[0].device) return 0;
        memcpy(facts->shape[i], x->shape, sizeof facts->shape[i]);
        memcpy(facts->stride[i], x->stride, sizeof facts->stride[i]);
        facts->dtype[i] = x->dtype;
        facts->aligned[i] = (uintptr_t)x->data % 16 == 0;
    }
    facts->stream = tensors[0].stream;
    facts->kernels = forced_kernels;
    facts->device = tensors[0].device;
    return 1;
}

/* facts(q, k, v, keys | None) -> (bytes, address, capture), or None
 *
 * Calls with equal bytes can share a plan. `address` is that of k if it lies inside `keys`, else 0;
 * `capture` is the number of the CUDA graph that the stream is being captured in, else 0. */
PyObject *py_facts(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    lf_arg tensors[3] = {0}, keys = {0};
    lf_place place;
    call_facts facts;
    uint64_t address = 0, capture = 0;

    if (lf_arguments("facts", 4, nargs) < 0) return NULL;
    const int known = read_facts(args, tensors, &facts);
    if (known < 0) return NULL;
    if (known == 0) return Py_NewRef(Py_None);
    if (args[3] != Py_None && lf_has_table(args[3])) {
        if (lf_borrow(args[3], "keys", &keys) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_Exception)) return NULL;
            PyErr_Clear();
        } else if (keys.device == facts.device && lf_inside(&tensors[1], &keys)) {
            address = (uint64_t)(uintptr_t)tensors[1].data;
        }
    }
    place = (lf_place){facts.device, facts.stream};
    if (place.device >= 0) capture = lf_cuda_capture(place);

    // Most calls are like the one before: its object has been hashed already. Under the GIL.
    static PyObject *last;
    if (!last || memcmp(PyBytes_AsString(last), &facts, sizeof facts) != 0) {
        PyObject *bytes = PyBytes_FromStringAndSize((const char *)&facts, (Py_ssize_t)sizeof facts);
        PyObject *before = last;
        if (!bytes) return NULL;
        last = bytes;
        Py_XDECREF(before);
    }
    return Py_BuildValue("(OKK)", last, (unsigned long long)address, (unsigned long long)capture);
}

static void free_plan(PyObject *capsule) { PyMem_Free(PyCapsule_GetPointer(capsule, plan_name)); }

/* plan_step(q, k, v, frame_tokens, sparsity, keep_frames, sink_frames, near_frames, score,
 *           hierarchy, block_q, block_k)
 * -> (plan, kept, words of workspace) */
PyObject *py_plan_step(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    lf_arg tensors[3] = {0};
    lf_dims dims = {0};
    lf_place place;
    lf_budget_arguments b = {0};
    call_plan *plan = NULL;
    PyObject *capsule = NULL, *result = NULL;
    const lf_arg *q = &tensors[0], *k = &tensors[1], *v = &tensors[2];

    if (lf_arguments("plan_step", 12, nargs) < 0) return NULL;
    plan = PyMem_Calloc(1, sizeof *plan);
    if (!plan) return PyErr_NoMemory();
    capsule = PyCapsule_New(plan, plan_name, free_plan);
    if (!capsule) {
        PyMem_Free(plan);
        return NULL;
    }
    const int known = read_facts(args, tensors, &plan->facts);
    if (known < 0) goto done;
    if (known == 0) {
        PyErr_SetString(PyExc_TypeError, "q, k, v: expected 4-D float tensors of one device, of a "
                                         "type with a DLPack exchange table");
        goto done;
    }
    lf_select_params *s = &plan->select;
    lf_attend_params *a = &plan->attend;
    if (lf_shape(q, "BQHD", &dims) < 0 || lf_shape(k, "BKHD", &dims) < 0) goto done;
    if (lf_shape(v, "BKHD", &dims) < 0) goto done;
    if (lf_same_dtype(k, q) < 0 || lf_same_dtype(v, q) < 0) goto done;
    if (lf_placed("sparse_step", 3, (const lf_arg *[]){q, k, v}, Py_None, &place) < 0) goto done;
    if (lf_head_size(q, LF_DIM(dims, 'D')) < 0) goto done;
    if (lf_integer(args[3], "frame_tokens", 1, INT32_MAX, &s->frame_tokens) < 0) goto done;
    if (lf_whole_frames("q", "Lq", LF_DIM(dims, 'Q'), s->frame_tokens) < 0) goto done;
    if (lf_whole_frames("k", "Lk", LF_DIM(dims, 'K'), s->frame_tokens) < 0) goto done;
    if (LF_DIM(dims, 'Q') < 1 || LF_DIM(dims, 'K') < LF_DIM(dims, 'Q')) {
        PyErr_Format(PyExc_ValueError, "q: expected 1 to Lk = %lld tokens, got %lld",
                     (long long)LF_DIM(dims, 'K'), (long long)LF_DIM(dims, 'Q'));
        goto done;
    }
    if (lf_read_budget(args[4], args[5], args[6], args[7], args[9], &b) < 0) goto done;
    if (lf_read_score(args[8], &s->score) < 0) goto done;
    if (lf_integer(args[10], "block_q", 16, 128, &s->block_q) < 0) goto done;
    if (lf_block_size(args[11], "block_k", 16, &s->block_k) < 0) goto done;
    if (lf_softmax_scale(Py_None, LF_DIM(dims, 'D'), &s->scale) < 0) goto done;

    s->q_frames = LF_DIM(dims, 'Q') / s->frame_tokens;
    s->k_frames = LF_DIM(dims, 'K') / s->frame_tokens;
    const lf_select_budget budget =
        lf_select_plan(s->q_frames, s->k_frames, s->frame_tokens, s->block_k, b.sparsity,
                       b.keep_frames, b.hierarchy);
    s->q = lf_view(q);
    s->k = lf_view(k);
    s->batch = LF_DIM(dims, 'B');
    s->heads = LF_DIM(dims, 'H');
    s->dim = LF_DIM(dims, 'D');
    s->kept = budget.kept;
    s->keep_frames = budget.keep_frames;
    s->sink_frames = b.sink_frames;
    s->near_frames = b.near_frames;
    s->hierarchy = b.hierarchy;
    s->dtype = q->dtype;

    const int64_t rows = lf_ceil_div(LF_DIM(dims, 'Q'), s->block_q);
    a->q = lf_view(q);
    a->k = lf_view(k);
    a->v = lf_view(v);
    a->out.head = s->dim;
    a->out.token = s->heads * s->dim;
    a->out.batch = LF_DIM(dims, 'Q') * a->out.token;
    a->batch = s->batch;
    a->heads = s->heads;
    a->dim = s->dim;
    a->q_len = LF_DIM(dims, 'Q');
    a->k_len = LF_DIM(dims, 'K');
    a->frame_tokens = s->frame_tokens;
    a->block_q = s->block_q;
    a->block_k = s->block_k;
    a->max_count = s->kept;
    a->scale = (float)s->scale;
    a->dtype = s->dtype;
    a->indices = (const int32_t *)q->data;  // not NULL: a list, for the question about its room

    // Whole 256-byte pieces, as the allocators of GPU memory give them.
    plan->list_words = lf_ceil_div(s->batch * s->heads * rows * s->kept, 64) * 64;
    if (place.device >= 0) {
        plan->select_words = lf_ceil_div(lf_select_cuda_workspace(s), 256) * 64;
        plan->words = lf_ceil_div(lf_attend_cuda_workspace(a, place.device), 4);
    }
    plan->words += plan->list_words + plan->select_words;
    result = Py_BuildValue("(OLL)", capsule, (long long)s->kept, (long long)plan->words);

done:
    Py_DECREF(capsule);
    return result;
}

/* An array for the step to write to or read: `dtype`, on the plan's device. */
static int borrow_own(PyObject *object, const char *name, lf_dtype dtype, const call_plan *plan,
                      lf_arg *arg)
{
    char here[24], there[24];

    arg->wants = dtype == LF_I32 ? "int32" : NULL;
    if (!lf_has_table(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tensor as q is one, got %R", name,
                     (PyObject *)Py_TYPE(object));
        return -1;
    }
    if (lf_borrow(object, name, arg) < 0 || lf_expect_dtype(arg, dtype) < 0) return -1;
    if (arg->device == plan->facts.device) return 0;
    lf_place_name(plan->facts.device, here);
    lf_place_name(arg->device, there);
    PyErr_Format(PyExc_ValueError, "%s: expected the device of q, %s, got %s", name, here, there);
    return -1;
}

static const char *shape_text(char text[192], int ndim, const int64_t *shape)
{
    int used = 0;

    for (int i = 0; i < ndim; i++)  // 8 sizes of 22 characters at most
        used += PyOS_snprintf(text + used, (size_t)(192 - used), "%s%lld", i ? ", " : "",
                              (long long)shape[i]);
    text[used] = 0;
    return text;
}

static int sized(const lf_arg *arg, int ndim, const int64_t *shape)
{
    int same = arg->ndim == ndim;
    char here[192], there[192];

    for (int i = 0; same && i < ndim; i++) same = arg->shape[i] == shape[i];
    if (same) return lf_contiguous(arg);
    PyErr_Format(PyExc_ValueError, "%s: expected shape [%s], as the plan has it, got [%s]",
                 arg->name, shape_text(here, ndim, shape),
                 shape_text(there, arg->ndim, arg->shape));
    return -1;
}

/* What of a call differs from the plan's facts, in words; `known` as read_facts() answered. */
static void other_facts(int known, const call_facts *got, const call_facts *made)
{
    static const char *const names[] = {"q", "k", "v"};
    const char *which = "q, k, v", *what = "stream";

    if (known == 0)
        what = "kind of tensor";
    else if (got->kernels != made->kernels)
        which = "the process", what = "attention kernel";
    else if (got->device != made->device)
        what = "device";
    else
        for (int i = 2; i >= 0; i--) {
            const int resized = memcmp(got->shape[i], made->shape[i], sizeof got->shape[i]);
            const int moved = memcmp(got->stride[i], made->stride[i], sizeof got->stride[i]);
            const int recast = got->dtype[i] != made->dtype[i];
            if (!resized && !moved && !recast && got->aligned[i] == made->aligned[i]) continue;
            which = names[i];
            what = resized ? "shape" : recast ? "dtype" : moved ? "strides" : "alignment";
        }
    PyErr_Format(PyExc_ValueError,
                 "plan: expected tensors like those it was made for, got another %s of %s", what,
                 which);
}

/* sparse_step(plan, q, k, v, out, workspace, means | None, held, lse | None)
 *
 * Writes out [B, Lq, H, D] and lse [B, H, Lq]; the workspace begins with the list, [B, H, R, kept].
 * means is float32 [B, rows, H, D] with room for the means of all frames of k, of which the first
 * `held` are there; the others are written. */
PyObject *py_sparse_step(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    lf_arg tensors[3] = {0}, out = {0}, work = {0}, means = {0}, lse = {0};
    lf_error err = {0};
    call_facts facts;
    int64_t held = 0;
    int status;
    char text[192];

    if (lf_arguments("sparse_step", 9, nargs) < 0) return NULL;
    const call_plan *plan = PyCapsule_GetPointer(args[0], plan_name);
    if (!plan) return NULL;
    const int known = read_facts(args + 1, tensors, &facts);
    if (known < 0) return NULL;
    if (known == 0 || memcmp(&facts, &plan->facts, sizeof facts) != 0) {
        other_facts(known, &facts, &plan->facts);
        return NULL;
    }
    lf_select_params s = plan->select;
    lf_attend_params a = plan->attend;
    const lf_place place = {facts.device, facts.stream};

    if (borrow_own(args[4], "out", s.dtype, plan, &out) < 0) return NULL;
    if (sized(&out, 4, facts.shape[0]) < 0) return NULL;
    if (borrow_own(args[5], "workspace", LF_I32, plan, &work) < 0) return NULL;
    if (work.ndim != 1 || work.shape[0] < plan->words || work.stride[0] != 1) {
        PyErr_Format(
            PyExc_ValueError,
            "workspace: expected at least %lld words in a row, as the plan has, got [%s]%s",
            (long long)plan->words, shape_text(text, work.ndim, work.shape),
            work.ndim == 1 && work.stride[0] != 1 ? " with gaps" : "");
        return NULL;
    }
    if (args[8] != Py_None) {
        if (borrow_own(args[8], "lse", LF_F32, plan, &lse) < 0) return NULL;
        if (sized(&lse, 3, (const int64_t[]){s.batch, s.heads, a.q_len}) < 0) return NULL;
    }
    if (args[6] != Py_None) {
        const int64_t part = s.score == LF_SCORE_MEAN ? s.block_k : s.block_k / 4;
        const int64_t per_frame = lf_frame_blocks(s.frame_tokens, part);
        if (borrow_own(args[6], "means", LF_F32, plan, &means) < 0) return NULL;
        if (lf_integer(args[7], "held", 0, s.k_frames, &held) < 0) return NULL;
        if (means.ndim != 4 || means.shape[0] != s.batch || means.shape[2] != s.heads ||
            means.shape[3] != s.dim || means.shape[1] < s.k_frames * per_frame ||
            means.stride[3] != 1) {
            PyErr_Format(PyExc_ValueError,
                         "means: expected room for all frames of k, [%lld, at least %lld, %lld, "
                         "%lld], got [%s]%s",
                         (long long)s.batch, (long long)(s.k_frames * per_frame),
                         (long long)s.heads, (long long)s.dim,
                         shape_text(text, means.ndim, means.shape),
                         means.ndim == 4 && means.stride[3] != 1 ? " with gaps" : "");
            return NULL;
        }
        s.k_means = lf_view(&means);
        s.means_frames = held;
        s.store_means = held < s.k_frames;
    }
    s.q.data = a.q.data = tensors[0].data;
    s.k.data = a.k.data = tensors[1].data;
    a.v.data = tensors[2].data;
    a.out.data = out.data;
    a.lse = (float *)lse.data;
    s.indices = (int32_t *)work.data;
    a.indices = s.indices;

    Py_BEGIN_ALLOW_THREADS
    if (place.device < 0) {
        status = lf_select_cpu(&s, &err);
        if (status == 0) status = lf_attend_cpu(&a, &err);
    } else {
        status = lf_select_cuda(&s, s.indices + plan->list_words, place, &err);
        if (status == 0)
            status =
                lf_attend_cuda(&a, s.indices + plan->list_words + plan->select_words, place, &err);
    }
    Py_END_ALLOW_THREADS
    return status < 0 ? lf_raise(&err) : Py_NewRef(Py_None);
}
