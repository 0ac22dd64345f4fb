/* The operators on tensors: one function each. Check every fact, fill the struct, call the core.
 *
 * Arguments are positional; lightforcing/ops.py is the public face. `empty` is the caller's
 * allocator, empty(shape, dtype name), so that memory comes from where the inputs came from. */
#include "numbers.h"
#include "ops.h"

/* compress(x, out | None, empty, frame_tokens, block, stream | None) -> out */
PyObject *py_compress(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    lf_arg x = {0}, out = {0};
    lf_dims dims = {0};
    lf_error err = {0};
    lf_compress_params p = {0};
    lf_place place;
    PyObject *result = NULL;
    int status;

    if (lf_arguments("compress", 6, nargs) < 0) goto done;
    if (lf_borrow(args[0], "x", &x) < 0 || lf_shape(&x, "BLHD", &dims) < 0) goto done;
    if (lf_is_float(&x) < 0) goto done;
    if (lf_placed("compress", 1, (const lf_arg *[]){&x}, args[5], &place) < 0) goto done;
    if (lf_head_size(&x, LF_DIM(dims, 'D')) < 0) goto done;
    if (lf_integer(args[3], "frame_tokens", 1, INT32_MAX, &p.frame_tokens) < 0) goto done;
    if (lf_block_size(args[4], "block", 4, &p.block) < 0) goto done;
    if (lf_whole_frames("x", "L", LF_DIM(dims, 'L'), p.frame_tokens) < 0) goto done;

    p.frames = LF_DIM(dims, 'L') / p.frame_tokens;
    LF_DIM(dims, 'J') = p.frames * lf_frame_blocks(p.frame_tokens, p.block);
    dims.from['J' - 'A'] = "x, in blocks,";
    if (lf_borrow_out(args[1], args[2], "out", "BJHD", LF_F32, &dims, &out) < 0) goto done;
    if (lf_placed("compress", 2, (const lf_arg *[]){&x, &out}, args[5], &place) < 0) goto done;
    if (lf_apart(&out, 1, (const lf_arg *[]){&x}) < 0) goto done;

    p.x = lf_view(&x);
    p.out = lf_view(&out);
    p.batch = LF_DIM(dims, 'B');
    p.heads = LF_DIM(dims, 'H');
    p.dim = LF_DIM(dims, 'D');
    p.dtype = x.dtype;
    Py_BEGIN_ALLOW_THREADS
    status = place.device < 0 ? lf_compress_cpu(&p, &err) : lf_compress_cuda(&p, place, &err);
    Py_END_ALLOW_THREADS
    result = status < 0 ? lf_raise(&err) : Py_NewRef(out.owner);

done:
    lf_release(&x);
    lf_release(&out);
    return result;
}

/* select_plan(q_frames, k_frames, frame_tokens, block_k, sparsity, keep_frames, hierarchy)
 * -> (blocks, kept, keep_frames) */
PyObject *py_select_plan(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int64_t q_frames, k_frames, frame_tokens, block_k;
    lf_budget_arguments b = {0};
    PyObject *zero = PyLong_FromLong(0), *result = NULL;
    lf_select_budget budget;

    if (!zero || lf_arguments("select_plan", 7, nargs) < 0) goto done;
    if (lf_integer(args[0], "q_frames", 1, INT32_MAX, &q_frames) < 0) goto done;
    if (lf_integer(args[1], "k_frames", q_frames, INT32_MAX, &k_frames) < 0) goto done;
    if (lf_integer(args[2], "frame_tokens", 1, INT32_MAX, &frame_tokens) < 0) goto done;
    if (lf_block_size(args[3], "block_k", 16, &block_k) < 0) goto done;
    if (lf_read_budget(args[4], args[5], zero, zero, args[6], &b) < 0) goto done;
    budget = lf_select_plan(q_frames, k_frames, frame_tokens, block_k, b.sparsity, b.keep_frames,
                            b.hierarchy);
    result = Py_BuildValue("(LLL)", (long long)budget.blocks, (long long)budget.kept,
                           (long long)budget.keep_frames);

done:
    Py_XDECREF(zero);
    return result;
}

/* k_means of the past frames or of all of them. */
static int read_means(PyObject *object, const lf_dims *dims, lf_arg *means, lf_select_params *p)
{
    lf_dims own = *dims;
    const int64_t part = p->score == LF_SCORE_MEAN ? p->block_k : p->block_k / 4;
    const int64_t per_frame = lf_frame_blocks(p->frame_tokens, part);
    const int64_t past = p->k_frames - p->q_frames;

    own.from['J' - 'A'] = NULL;
    means->wants = "float32";
    if (lf_borrow(object, "k_means", means) < 0 || lf_shape(means, "BJHD", &own) < 0) return -1;
    if (lf_expect_dtype(means, LF_F32) < 0) return -1;
    p->means_frames = LF_DIM(own, 'J') == past * per_frame ? past : p->k_frames;
    if (LF_DIM(own, 'J') != p->means_frames * per_frame) {
        PyErr_Format(PyExc_ValueError,
                     "k_means: expected %lld means (%lld-token blocks of the %lld past frames) or "
                     "%lld (of all frames), got %lld",
                     (long long)(past * per_frame), (long long)part, (long long)past,
                     (long long)(p->k_frames * per_frame), (long long)LF_DIM(own, 'J'));
        return -1;
    }
    p->k_means = lf_view(means);
    return 0;
}

/* select_blocks(q, k, k_means | None, empty, frame_tokens, sparsity, keep_frames, sink_frames,
 *               near_frames, score, hierarchy, block_q, block_k, scale | None, want_scores,
 *               stream | None)
 * -> (indices, scores | None, keep_frames, Lq, Lk) */
PyObject *py_select_blocks(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    lf_arg q = {0}, k = {0}, means = {0}, indices = {0}, scores = {0}, workspace = {0};
    lf_dims dims = {0};
    lf_error err = {0};
    lf_select_params p = {0};
    lf_budget_arguments b = {0};
    lf_select_budget budget;
    lf_place place;
    PyObject *result = NULL;
    int status, want_scores;

    if (lf_arguments("select_blocks", 16, nargs) < 0) goto done;
    if (lf_borrow(args[0], "q", &q) < 0 || lf_shape(&q, "BQHD", &dims) < 0) goto done;
    if (lf_borrow(args[1], "k", &k) < 0 || lf_shape(&k, "BKHD", &dims) < 0) goto done;
    if (lf_is_float(&q) < 0 || lf_same_dtype(&k, &q) < 0) goto done;
    if (lf_placed("select_blocks", 2, (const lf_arg *[]){&q, &k}, args[15], &place) < 0) goto done;
    if (lf_head_size(&q, LF_DIM(dims, 'D')) < 0) goto done;
    if (lf_integer(args[4], "frame_tokens", 1, INT32_MAX, &p.frame_tokens) < 0) goto done;
    if (lf_whole_frames("q", "Lq", LF_DIM(dims, 'Q'), p.frame_tokens) < 0) goto done;
    if (lf_whole_frames("k", "Lk", LF_DIM(dims, 'K'), p.frame_tokens) < 0) goto done;
    if (LF_DIM(dims, 'Q') < 1 || LF_DIM(dims, 'K') < LF_DIM(dims, 'Q')) {
        PyErr_Format(PyExc_ValueError,
                     "q: expected 1 to Lk = %lld tokens (q is the last part of k), got %lld",
                     (long long)LF_DIM(dims, 'K'), (long long)LF_DIM(dims, 'Q'));
        goto done;
    }
    if (lf_read_budget(args[5], args[6], args[7], args[8], args[10], &b) < 0) goto done;
    if (lf_read_score(args[9], &p.score) < 0) goto done;
    if (lf_integer(args[11], "block_q", 16, 128, &p.block_q) < 0) goto done;
    if (lf_block_size(args[12], "block_k", 16, &p.block_k) < 0) goto done;
    if (lf_softmax_scale(args[13], LF_DIM(dims, 'D'), &p.scale) < 0) goto done;
    want_scores = PyObject_IsTrue(args[14]);
    if (want_scores < 0) goto done;

    p.q_frames = LF_DIM(dims, 'Q') / p.frame_tokens;
    p.k_frames = LF_DIM(dims, 'K') / p.frame_tokens;
    if (args[2] != Py_None && read_means(args[2], &dims, &means, &p) < 0) goto done;
    if (lf_placed("select_blocks", 3, (const lf_arg *[]){&q, &k, &means}, args[15], &place) < 0)
        goto done;
    budget = lf_select_plan(p.q_frames, p.k_frames, p.frame_tokens, p.block_k, b.sparsity,
                            b.keep_frames, b.hierarchy);
    LF_DIM(dims, 'R') = lf_ceil_div(LF_DIM(dims, 'Q'), p.block_q);
    LF_DIM(dims, 'J') = budget.blocks;
    LF_DIM(dims, 'M') = budget.kept;
    dims.from['R' - 'A'] = dims.from['J' - 'A'] = dims.from['M' - 'A'] = "the call";
    if (lf_borrow_out(NULL, args[3], "indices", "BHRM", LF_I32, &dims, &indices) < 0) goto done;
    if (want_scores && lf_borrow_out(NULL, args[3], "scores", "BHRJ", LF_F32, &dims, &scores) < 0)
        goto done;

    p.q = lf_view(&q);
    p.k = lf_view(&k);
    p.indices = (int32_t *)indices.data;
    p.scores = (float *)scores.data;
    p.batch = LF_DIM(dims, 'B');
    p.heads = LF_DIM(dims, 'H');
    p.dim = LF_DIM(dims, 'D');
    p.kept = budget.kept;
    p.keep_frames = budget.keep_frames;
    p.sink_frames = b.sink_frames;
    p.near_frames = b.near_frames;
    p.hierarchy = b.hierarchy;
    p.dtype = q.dtype;
    if (place.device >= 0) {
        LF_DIM(dims, 'W') = lf_ceil_div(lf_select_cuda_workspace(&p), 4);
        if (lf_borrow_out(NULL, args[3], "workspace", "W", LF_I32, &dims, &workspace) < 0)
            goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = place.device < 0 ? lf_select_cpu(&p, &err)
                              : lf_select_cuda(&p, workspace.data, place, &err);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        result = lf_raise(&err);
        goto done;
    }
    result = Py_BuildValue("(OOLLL)", indices.owner, scores.owner ? scores.owner : Py_None,
                           (long long)budget.keep_frames, (long long)LF_DIM(dims, 'Q'),
                           (long long)LF_DIM(dims, 'K'));

done:
    lf_release(&q);
    lf_release(&k);
    lf_release(&means);
    lf_release(&indices);
    lf_release(&scores);
    lf_release(&workspace);
    return result;
}

/* Counts in [0, Kmax], rows ascending and unique, indices in [0, J). On the CPU only. */
static int check_lists(const lf_arg *indices, const lf_arg *counts, const lf_dims *dims)
{
    const int32_t *row = (const int32_t *)indices->data;
    const int32_t *count = (const int32_t *)counts->data;
    const int64_t rows = LF_DIM(*dims, 'B') * LF_DIM(*dims, 'H') * LF_DIM(*dims, 'R');
    const int64_t width = LF_DIM(*dims, 'M'), blocks = LF_DIM(*dims, 'J');

    for (int64_t r = 0; r < rows; r++, row += width) {
        if (count[r] < 0 || count[r] > width) {
            PyErr_Format(PyExc_ValueError, "counts: expected 0 to Kmax = %lld, got %d (row %lld)",
                         (long long)width, (int)count[r], (long long)r);
            return -1;
        }
        for (int32_t i = 0; i < count[r]; i++) {
            if (row[i] < 0 || row[i] >= blocks) {
                PyErr_Format(PyExc_ValueError,
                             "indices: expected key blocks 0 to %lld, got %d (row %lld)",
                             (long long)blocks - 1, (int)row[i], (long long)r);
                return -1;
            }
            if (i > 0 && row[i] <= row[i - 1]) {
                PyErr_Format(PyExc_ValueError,
                             "indices: expected an ascending row without repeats, got %d after %d "
                             "(row %lld)",
                             (int)row[i], (int)row[i - 1], (long long)r);
                return -1;
            }
        }
    }
    return 0;
}

/* The list of a block-sparse call: blocks is None or (indices, counts, q_len, k_len,
 * frame_tokens, block_q, block_k). */
static int read_list(PyObject *list, lf_dims *dims, lf_arg *indices, lf_arg *counts,
                     lf_attend_params *p)
{
    int64_t q_len, k_len;

    if (!PyTuple_Check(list) || PyTuple_Size(list) != 7) {
        PyErr_Format(PyExc_TypeError, "blocks: expected a BlockList or None, got %R",
                     (PyObject *)Py_TYPE(list));
        return -1;
    }
    if (lf_integer(PyTuple_GetItem(list, 2), "blocks.q_len", 1, INT64_MAX, &q_len) < 0) return -1;
    if (lf_integer(PyTuple_GetItem(list, 3), "blocks.k_len", 1, INT64_MAX, &k_len) < 0) return -1;
    if (q_len != LF_DIM(*dims, 'Q') || k_len != LF_DIM(*dims, 'K')) {
        PyErr_Format(PyExc_ValueError,
                     "blocks: were made for Lq = %lld and Lk = %lld, but q has Lq = %lld and k has "
                     "Lk = %lld",
                     (long long)q_len, (long long)k_len, (long long)LF_DIM(*dims, 'Q'),
                     (long long)LF_DIM(*dims, 'K'));
        return -1;
    }
    if (lf_integer(PyTuple_GetItem(list, 4), "frame_tokens", 1, INT32_MAX, &p->frame_tokens) < 0)
        return -1;
    if (lf_integer(PyTuple_GetItem(list, 5), "block_q", 16, 128, &p->block_q) < 0) return -1;
    if (lf_block_size(PyTuple_GetItem(list, 6), "block_k", 16, &p->block_k) < 0) return -1;
    if (lf_whole_frames("k", "Lk", k_len, p->frame_tokens) < 0) return -1;

    LF_DIM(*dims, 'R') = lf_ceil_div(q_len, p->block_q);
    LF_DIM(*dims, 'J') = k_len / p->frame_tokens * lf_frame_blocks(p->frame_tokens, p->block_k);
    dims->from['R' - 'A'] = "q, in blocks,";
    indices->wants = counts->wants = "int32";
    if (lf_borrow(PyTuple_GetItem(list, 0), "indices", indices) < 0) return -1;
    if (lf_shape(indices, "BHRM", dims) < 0 || lf_contiguous(indices) < 0) return -1;
    if (lf_borrow(PyTuple_GetItem(list, 1), "counts", counts) < 0) return -1;
    if (lf_shape(counts, "BHR", dims) < 0 || lf_contiguous(counts) < 0) return -1;
    if (lf_expect_dtype(indices, LF_I32) < 0 || lf_expect_dtype(counts, LF_I32) < 0) return -1;
    // Lists of width 0 may have no memory, and NULL means dense: any address will do.
    p->indices = (const int32_t *)(indices->data ? indices->data : counts->data);
    p->counts = (const int32_t *)counts->data;
    p->max_count = LF_DIM(*dims, 'M');
    return 0;
}

/* block_sparse_attention(q, k, v, list | None, out | None, empty, scale | None, want_lse,
 *                        stream | None) -> out, or (out, lse) */
PyObject *py_block_sparse_attention(PyObject *Py_UNUSED(module), PyObject *const *args,
                                    Py_ssize_t nargs)
{
    lf_arg q = {0}, k = {0}, v = {0}, out = {0}, lse = {0}, indices = {0}, counts = {0};
    lf_arg workspace = {0};
    const lf_arg *const all[] = {&q, &k, &v, &out, &indices, &counts};
    lf_dims dims = {0};
    lf_error err = {0};
    lf_attend_params p = {0};
    lf_place place;
    PyObject *result = NULL;
    double scale;
    int status, want_lse;

    if (lf_arguments("block_sparse_attention", 9, nargs) < 0) goto done;
    if (lf_borrow(args[0], "q", &q) < 0 || lf_shape(&q, "BQHD", &dims) < 0) goto done;
    if (lf_borrow(args[1], "k", &k) < 0 || lf_shape(&k, "BKHD", &dims) < 0) goto done;
    if (lf_borrow(args[2], "v", &v) < 0 || lf_shape(&v, "BKHD", &dims) < 0) goto done;
    if (lf_is_float(&q) < 0 || lf_same_dtype(&k, &q) < 0 || lf_same_dtype(&v, &q) < 0) goto done;
    if (lf_placed("block_sparse_attention", 3, all, args[8], &place) < 0) goto done;
    if (lf_head_size(&q, LF_DIM(dims, 'D')) < 0) goto done;
    if (LF_DIM(dims, 'Q') < 1 || LF_DIM(dims, 'K') < 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected 1 token or more, got 0",
                     LF_DIM(dims, 'Q') < 1 ? "q" : "k");
        goto done;
    }
    if (args[3] != Py_None && read_list(args[3], &dims, &indices, &counts, &p) < 0) goto done;
    if (lf_softmax_scale(args[6], LF_DIM(dims, 'D'), &scale) < 0) goto done;
    want_lse = PyObject_IsTrue(args[7]);
    if (want_lse < 0) goto done;
    if (lf_borrow_out(args[4], args[5], "out", "BQHD", q.dtype, &dims, &out) < 0) goto done;
    if (want_lse && lf_borrow_out(NULL, args[5], "lse", "BHQ", LF_F32, &dims, &lse) < 0) goto done;
    if (lf_placed("block_sparse_attention", 6, all, args[8], &place) < 0) goto done;
    if (lf_apart(&out, 3, all) < 0) goto done;
    if (p.indices && place.device < 0 && check_lists(&indices, &counts, &dims) < 0) goto done;

    p.q = lf_view(&q);
    p.k = lf_view(&k);
    p.v = lf_view(&v);
    p.out = lf_view(&out);
    p.lse = (float *)lse.data;
    p.batch = LF_DIM(dims, 'B');
    p.heads = LF_DIM(dims, 'H');
    p.dim = LF_DIM(dims, 'D');
    p.q_len = LF_DIM(dims, 'Q');
    p.k_len = LF_DIM(dims, 'K');
    p.scale = (float)scale;
    p.dtype = q.dtype;
    if (place.device >= 0) {
        LF_DIM(dims, 'W') = lf_ceil_div(lf_attend_cuda_workspace(&p, place.device), 4);
        if (lf_borrow_out(NULL, args[5], "workspace", "W", LF_I32, &dims, &workspace) < 0)
            goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = place.device < 0 ? lf_attend_cpu(&p, &err)
                              : lf_attend_cuda(&p, workspace.data, place, &err);
    Py_END_ALLOW_THREADS
    if (status < 0)
        result = lf_raise(&err);
    else if (want_lse)
        result = Py_BuildValue("(OO)", out.owner, lse.owner);
    else
        result = Py_NewRef(out.owner);

done:
    lf_release(&q);
    lf_release(&k);
    lf_release(&v);
    lf_release(&out);
    lf_release(&lse);
    lf_release(&indices);
    lf_release(&counts);
    lf_release(&workspace);
    return result;
}
