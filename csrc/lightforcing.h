/* lightforcing: the core's whole C interface. Read this first.
 *
 * Letters used in every shape: B batch, L tokens (Lq, Lk), H heads, D head size,
 * T tokens of a frame, F frames, R query blocks, J key blocks, K kept blocks.
 * Tensors are [B, L, H, D] with free batch, token and head strides and a last
 * stride of 1. Sizes, strides and offsets are 64-bit and count elements.
 *
 * Every operator takes one const struct and returns 0, or -1 with `err` filled.
 * It allocates no device memory, never prints, exits or synchronises. Argument
 * facts (shapes, dtypes, devices, ranges) are checked once, in csrc/python/ops.c;
 * here they are preconditions. */
#ifndef LIGHTFORCING_H
#define LIGHTFORCING_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LF_F32, LF_F16, LF_BF16, LF_I32 } lf_dtype;

/* Filled by the callee when it returns -1; `kind` picks the Python exception. */
typedef enum { LF_OK, LF_UNSUPPORTED, LF_CUDA, LF_NO_MEMORY } lf_error_kind;
typedef struct {
    lf_error_kind kind;
    char text[256];
} lf_error;

int lf_fail(lf_error *err, lf_error_kind kind, const char *format, ...)
    __attribute__((format(printf, 3, 4), cold));

/* Where a call runs. device < 0 is the CPU; `stream` is a cudaStream_t, NULL the default. */
typedef struct {
    int device;
    void *stream;
} lf_place;

/* A [B, L, H, D] tensor: element strides of batch, token and head; last stride 1. */
typedef struct {
    void *data;
    int64_t batch, token, head;
} lf_tensor;

/* ---- geometry: key blocks never straddle a frame, the last of a frame is short ---- */

static inline int64_t lf_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Blocks of `block` tokens in a frame of T tokens. */
static inline int64_t lf_frame_blocks(int64_t frame_tokens, int64_t block)
{
    return lf_ceil_div(frame_tokens, block);
}

/* First token of key block j, and the number of its tokens. */
static inline int64_t lf_block_start(int64_t j, int64_t frame_tokens, int64_t block)
{
    const int64_t per_frame = lf_frame_blocks(frame_tokens, block);
    return j / per_frame * frame_tokens + j % per_frame * block;
}

static inline int64_t lf_block_tokens(int64_t j, int64_t frame_tokens, int64_t block)
{
    const int64_t in_frame = j % lf_frame_blocks(frame_tokens, block) * block;
    return frame_tokens - in_frame < block ? frame_tokens - in_frame : block;
}

/* ---- CAG: the sparsity of every chunk ------------------------------------------- */

typedef enum { LF_LAW_LINEAR, LF_LAW_EXPONENTIAL, LF_LAW_CONSTANT, LF_LAW_COUNT } lf_law;

/* sparsity[c] such that the mean over the chunks that are not dense, weighted by
 * resident frames, is `target`. A chunk is dense when fewer than `dense_frames`
 * frames precede it (the first always is): it gets 0 and is outside the budget. */
typedef struct {
    const int64_t *chunk_ends;  // [chunks] frames of the video once the chunk exists, ascending
    double *sparsity;           // [chunks]
    int64_t chunks;
    int64_t dense_frames;
    int64_t window;  // resident frames at most; 0: no window
    double target, base;
    lf_law law;
} lf_cag_params;

/* The solved parameter goes to *solved: beta (linear, exponential), the target
 * (constant), or the kept frames (count): it continues the law past the plan. */
int lf_cag(const lf_cag_params *p, double *solved, lf_error *err);

/* ---- compress: float32 means of the blocks of every frame ----------------------- */

typedef struct {
    lf_tensor x;    // [B, F*T, H, D] of `dtype`
    lf_tensor out;  // [B, F*ceil(T/block), H, D] float32
    int64_t batch, heads, dim, frames, frame_tokens;
    int64_t block;  // 4, 8, 16, 32, 64 or 128
    lf_dtype dtype;
} lf_compress_params;

int lf_compress_cpu(const lf_compress_params *p, lf_error *err);
int lf_compress_cuda(const lf_compress_params *p, lf_place place, lf_error *err);

/* ---- select: which key blocks each query block keeps ----------------------------- */

typedef enum { LF_SCORE_MEAN, LF_SCORE_MASS, LF_SCORE_LSE } lf_score;

typedef struct {
    lf_tensor q;        // [B, q_frames*T, H, D]: the last tokens of the key sequence
    lf_tensor k;        // [B, k_frames*T, H, D]
    lf_tensor k_means;  // float32 means of the first `means_frames` frames; data NULL if none
    int store_means;   // 1: k_means has rows for all frames, and the missing ones are written there
    int32_t *indices;  // [B, H, R, kept] contiguous, ascending in a row
    float *scores;     // [B, H, R, J] contiguous block scores; NULL: not wanted
    int64_t batch, heads, dim, q_frames, k_frames, frame_tokens, means_frames;
    int64_t block_q, block_k;
    int64_t kept, keep_frames, sink_frames, near_frames;  // as lf_select_plan() answers
    int hierarchy;                                        // 0: no frame stage
    double scale;                                         // mass and lse only
    lf_score score;
    lf_dtype dtype;  // of q and k
} lf_select_params;

/* Kept blocks of a row for a sparsity, and keep_frames raised until they fit. */
typedef struct {
    int64_t blocks, kept, keep_frames;
} lf_select_budget;
lf_select_budget lf_select_plan(int64_t q_frames, int64_t k_frames, int64_t frame_tokens,
                                int64_t block_k, double sparsity, int64_t keep_frames,
                                int hierarchy);

/* The pooling that store_means asks for, and the selection that is left when it is done. */
static inline lf_compress_params lf_missing_means(lf_select_params *p)
{
    const int64_t part = p->score == LF_SCORE_MEAN ? p->block_k : p->block_k / 4;
    const int64_t size = p->dtype == LF_F32 ? 4 : 2, token = p->means_frames * p->frame_tokens;
    const int64_t row = p->means_frames * lf_frame_blocks(p->frame_tokens, part);
    lf_compress_params missing = {p->k,
                                  p->k_means,
                                  p->batch,
                                  p->heads,
                                  p->dim,
                                  p->k_frames - p->means_frames,
                                  p->frame_tokens,
                                  part,
                                  p->dtype};

    missing.x.data = (char *)p->k.data + token * p->k.token * size;
    missing.out.data = (float *)p->k_means.data + row * p->k_means.token;
    p->means_frames = p->k_frames;
    p->store_means = 0;
    return missing;
}

int lf_select_cpu(const lf_select_params *p, lf_error *err);

/* Bytes of device memory that lf_select_cuda() works in; their content does not matter. */
int64_t lf_select_cuda_workspace(const lf_select_params *p);
int lf_select_cuda(const lf_select_params *p, void *workspace, lf_place place, lf_error *err);

/* ---- attend: exact softmax attention over the kept key blocks -------------------- */

typedef struct {
    lf_tensor q, k, v, out;  // [B, Lq | Lk, H, D] of `dtype`
    float *lse;              // [B, H, Lq] contiguous, natural log; NULL: not wanted
    const int32_t *indices;  // [B, H, R, max_count] contiguous; NULL: dense
    const int32_t *counts;   // [B, H, R] contiguous; NULL: every row has max_count
    int64_t batch, heads, dim, q_len, k_len;
    int64_t frame_tokens, block_q, block_k, max_count;  // of the list; unused when dense
    float scale;
    lf_dtype dtype;
} lf_attend_params;

/* An empty row gives zeros and LSE -inf. Precondition: indices are in range. */
int lf_attend_cpu(const lf_attend_params *p, lf_error *err);

/* On a GPU the lists cannot be checked beforehand: an index out of range is skipped. `workspace`
 * is device memory of as many bytes as the first function says; its content does not matter. */
int64_t lf_attend_cuda_workspace(const lf_attend_params *p, int device);
int lf_attend_cuda(const lf_attend_params *p, void *workspace, lf_place place, lf_error *err);

/* The kernels behind it. can_run answers 1, or 0 with a reason in words in err->text. */
int lf_attend_portable(const lf_attend_params *p, lf_place place, lf_error *err);
int lf_attend_sm90_can_run(const lf_attend_params *p, int device, lf_error *err);
int64_t lf_attend_sm90_workspace(const lf_attend_params *p, int device);
int lf_attend_sm90(const lf_attend_params *p, void *workspace, lf_place place, lf_error *err);

/* ---- this build -------------------------------------------------------------------- */

/* Threads of every CPU operator; 0 asks for OpenMP's own default. Results do not depend on it. A
 * forked child has one, from the first lf_watch_forks() on, which returns 0 or an error number. */
int lf_watch_forks(void);
void lf_set_threads(int threads);
int lf_threads(void);

/* The instruction set the CPU operators run on: "scalar", "vector" (SSE2 or NEON), "avx2" or
 * "avx512". lf_isa_name(0), (1) ... names what this processor and build have, then gives NULL.
 * lf_force_isa() chooses one of those, NULL the best again; -1: not to be had. */
const char *lf_isa(void);
const char *lf_isa_name(int level);
int lf_force_isa(const char *name);

/* 1 when the CUDA half is in this build; the chips it holds code for, such as "80 90a". */
int lf_cuda_built(void);
const char *lf_cuda_archs(void);

/* Versions as CUDA counts them (13000 is 13.0), 0 if unknown; returns 0 or CUDA's error number. */
int lf_cuda_versions(int *driver, int *runtime, int *devices);

/* The number of the graph that a stream is being captured in, 0 if it is not. */
uint64_t lf_cuda_capture(lf_place place);

/* Loads every kernel on a device and sets its attributes, so that no later call does it (a CUDA
 * graph could not capture that). */
int lf_cuda_warmup(int device, lf_error *err);

/* "auto", "portable" or "sm90": the attention kernel of later calls, process-wide. -1: unknown. */
int lf_cuda_force_kernel(const char *name);

#ifdef __cplusplus
}
#endif
#endif
