/* select_blocks on the CPU: which key blocks each query block keeps (arXiv 2602.04789, HSA).
 *
 * Two passes. First the float32 means of the keys, one vector a key block (score mean) or a
 * sub-block of block_k / 4 tokens (mass, lse), are laid out in panels of 16. Then, for each
 * (batch, head, query block): logits, block scores, frames, blocks. Threads share the items of
 * each pass; an item is computed alone, so results do not depend on their number. */
#include "means.h"
#include "convert.h"
#include "isa.h"
#include "logits.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>

typedef struct {
    int64_t blocks;        // J: key blocks
    int64_t frame_blocks;  // key blocks of a frame
    int64_t part;          // tokens of a scored part: block_k (mean) or block_k / 4 (mass, lse)
    int64_t parts;         // scored parts of all frames
    int64_t frame_parts;   // scored parts of a frame
    int64_t block_parts;   // scored parts of a full key block: 1 or 4
    int64_t stride;        // parts, rounded up to whole panels
    int64_t rows_max;      // scored rows of a full query block
    int64_t q_blocks;      // R
} geometry;

static geometry measure(const lf_select_params *p)
{
    geometry g = {0};
    const int64_t rows = p->q_frames * p->frame_tokens;

    g.frame_blocks = lf_frame_blocks(p->frame_tokens, p->block_k);
    g.blocks = p->k_frames * g.frame_blocks;
    g.block_parts = p->score == LF_SCORE_MEAN ? 1 : 4;
    g.part = p->block_k / g.block_parts;
    g.frame_parts = lf_ceil_div(p->frame_tokens, g.part);
    g.parts = p->k_frames * g.frame_parts;
    g.stride = lf_ceil_div(g.parts, LF_PANEL) * LF_PANEL;
    g.rows_max = p->score == LF_SCORE_MEAN ? 1 : lf_ceil_div(p->block_q, g.part);
    g.q_blocks = lf_ceil_div(rows, p->block_q);
    return g;
}

lf_select_budget lf_select_plan(int64_t q_frames, int64_t k_frames, int64_t frame_tokens,
                                int64_t block_k, double sparsity, int64_t keep_frames,
                                int hierarchy)
{
    const int64_t per_frame = lf_frame_blocks(frame_tokens, block_k);
    const int64_t past = k_frames - q_frames;
    lf_select_budget budget = {.blocks = k_frames * per_frame, .keep_frames = keep_frames};

    budget.kept = (int64_t)floor((1.0 - sparsity) * (double)budget.blocks + 1e-9);
    if (budget.kept < 1) budget.kept = 1;
    if (past == 0 || budget.kept > budget.blocks) budget.kept = budget.blocks;
    if (hierarchy && past > keep_frames && budget.kept > (keep_frames + q_frames) * per_frame)
        budget.keep_frames = lf_ceil_div(budget.kept, per_frame) - q_frames;
    return budget;
}

/* ---- scores ------------------------------------------------------------------------------- */

/* Means of one frame's key parts into the panels of its (batch, head). */
static void pack_frame(const lf_select_params *p, const geometry *g, int64_t batch, int64_t head,
                       int64_t frame, float *panels)
{
    float pooled[LF_MAX_DIM];

    for (int64_t i = 0; i < g->frame_parts; i++) {
        const int64_t part = frame * g->frame_parts + i;
        const float *mean = pooled;
        if (frame < p->means_frames) {
            mean = lf_at(&p->k_means, LF_F32, batch, part, head);
        } else {
            const int64_t start = lf_block_start(part, p->frame_tokens, g->part);
            lf_mean_rows(lf_at(&p->k, p->dtype, batch, start, head), p->dtype, p->k.token,
                         lf_block_tokens(part, p->frame_tokens, g->part), g->part / 4, p->dim,
                         pooled);
        }
        float *column = panels + part / LF_PANEL * LF_PANEL * p->dim + part % LF_PANEL;
        for (int64_t d = 0; d < p->dim; d++) column[d * LF_PANEL] = mean[d];
    }
}

static int64_t part_tokens(const lf_select_params *p, const geometry *g, int64_t part)
{
    return lf_block_tokens(part, p->frame_tokens, g->part);
}

/* Parts [first, last) of key block j. */
static void block_parts(const geometry *g, int64_t j, int64_t *first, int64_t *last)
{
    const int64_t in_frame = j % g->frame_blocks * g->block_parts;
    const int64_t here = g->frame_parts - in_frame;

    *first = j / g->frame_blocks * g->frame_parts + in_frame;
    *last = *first + (here < g->block_parts ? here : g->block_parts);
}

/* logits = clamp(scale * logits + log tokens); a NaN becomes -inf and marks its block. */
static float finish_logits(const geometry *g, float *logits, const float *log_tokens, float scale,
                           uint8_t *is_nan)
{
    float highest = -INFINITY;
    int any_nan = 0;

    for (int64_t b = 0; b < g->parts; b++) {
        float x = logits[b] * scale + log_tokens[b];
        x = x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
        any_nan |= x != x;
        logits[b] = x;
        highest = x > highest ? x : highest;
    }
    if (!any_nan) return highest;
    for (int64_t j = 0; j < g->blocks; j++) {
        int64_t first, last;
        block_parts(g, j, &first, &last);
        for (int64_t b = first; b < last; b++) {
            if (logits[b] == logits[b]) continue;
            logits[b] = -INFINITY;
            is_nan[j] = 1;
        }
    }
    return highest;
}

/* scores[j] += rows * (softmax over all parts, summed over the parts of j). */
static void add_mass(const geometry *g, float *logits, float highest, double rows, double *scores)
{
    double total = 0;

    if (highest == -INFINITY) return;  // every logit is NaN, every block is marked
    lf_exp_shifted(logits, g->parts, highest);
    for (int64_t b = 0; b < g->parts; b++) total += logits[b];
    for (int64_t j = 0; j < g->blocks; j++) {
        int64_t first, last;
        double sum = 0;
        block_parts(g, j, &first, &last);
        for (int64_t b = first; b < last; b++) sum += logits[b];
        scores[j] += rows * (sum / total);
    }
}

/* scores[j] = log of the sum over rows and the parts of j of exp(logit), each with its own shift.
 */
static void log_sum_exp(const geometry *g, float *logits, int64_t rows, double *scores)
{
    for (int64_t j = 0; j < g->blocks; j++) {
        int64_t first, last;
        float highest = -INFINITY;
        block_parts(g, j, &first, &last);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t b = first; b < last; b++)
                highest = fmaxf(highest, logits[i * g->stride + b]);
        scores[j] = highest;
        if (highest == -INFINITY) highest = 0;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t b = first; b < last; b++) logits[i * g->stride + b] -= highest;
    }
    for (int64_t i = 0; i < rows; i++) lf_exp_shifted(logits + i * g->stride, g->parts, 0);
    for (int64_t j = 0; j < g->blocks; j++) {
        int64_t first, last;
        double sum = 0;
        block_parts(g, j, &first, &last);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t b = first; b < last; b++) sum += logits[i * g->stride + b];
        scores[j] += log(sum);
    }
}

typedef struct {
    float *means;       // [rows_max, D] of the query block
    float *logits;      // [rows_max, stride]
    float *log_tokens;  // [stride]
    double *scores;     // [J] block scores
    double *frames;     // [F] frame scores
    uint64_t *keys;     // [max(J, F)] for the top-k
    uint64_t *scratch;  // [max(J, F)]
    uint8_t *is_nan;    // [J]
    uint8_t *frame_in;  // [F]
} workspace;

static void score_blocks(const lf_select_params *p, const geometry *g, const workspace *w,
                         const float *panels, int64_t batch, int64_t head, int64_t r)
{
    const int64_t rows = p->q_frames * p->frame_tokens;
    const int64_t n = rows - r * p->block_q < p->block_q ? rows - r * p->block_q : p->block_q;
    const void *q = lf_at(&p->q, p->dtype, batch, r * p->block_q, head);
    const int64_t sub = p->block_k / 4;  // rows of a query sub-block, whatever the score

    if (p->score == LF_SCORE_MEAN) {
        lf_mean_rows(q, p->dtype, p->q.token, n, sub, p->dim, w->means);
        lf_logits(w->means, 1, panels, g->parts, p->dim, w->logits, g->stride);
        for (int64_t j = 0; j < g->blocks; j++) w->scores[j] = w->logits[j];
        return;
    }

    const int64_t parts = lf_ceil_div(n, sub);
    for (int64_t i = 0; i < parts; i++) {
        const int64_t here = n - i * sub < sub ? n - i * sub : sub;
        lf_mean_rows((const char *)q + i * sub * p->q.token * lf_dtype_size(p->dtype), p->dtype,
                     p->q.token, here, sub / 4, p->dim, w->means + i * p->dim);
    }
    lf_logits(w->means, parts, panels, g->parts, p->dim, w->logits, g->stride);
    for (int64_t j = 0; j < g->blocks; j++) {
        w->scores[j] = 0;
        w->is_nan[j] = 0;
    }
    for (int64_t i = 0; i < parts; i++) {
        const int64_t here = n - i * sub < sub ? n - i * sub : sub;
        float *logits = w->logits + i * g->stride;
        const float highest = finish_logits(g, logits, w->log_tokens, (float)p->scale, w->is_nan);
        if (p->score == LF_SCORE_MASS) {
            add_mass(g, logits, highest, (double)here, w->scores);
        } else {
            const float log_rows = logf((float)here);
            for (int64_t b = 0; b < g->parts; b++) logits[b] += log_rows;
        }
    }
    if (p->score == LF_SCORE_LSE) log_sum_exp(g, w->logits, parts, w->scores);
    for (int64_t j = 0; j < g->blocks; j++)
        if (w->is_nan[j]) w->scores[j] = NAN;
}

/* Frame scores: mass adds up, mean is the token-weighted mean, lse the log-sum-exp. */
static void score_frames(const lf_select_params *p, const geometry *g, const workspace *w)
{
    for (int64_t t = 0; t < p->k_frames; t++) {
        const double *scores = w->scores + t * g->frame_blocks;
        double sum = 0, highest = -INFINITY;
        for (int64_t j = 0; j < g->frame_blocks; j++) {
            const double tokens = (double)lf_block_tokens(j, p->frame_tokens, p->block_k);
            if (p->score == LF_SCORE_MASS) sum += scores[j];
            if (p->score == LF_SCORE_MEAN) sum += tokens * scores[j];
            if (scores[j] > highest) highest = scores[j];
        }
        if (p->score == LF_SCORE_MEAN) sum /= (double)p->frame_tokens;
        if (p->score == LF_SCORE_LSE) {
            const double shift = highest == -INFINITY ? 0 : highest;
            for (int64_t j = 0; j < g->frame_blocks; j++) sum += exp(scores[j] - shift);
            sum = shift + log(sum);
        }
        w->frames[t] = sum;
    }
}

/* ---- top-k -------------------------------------------------------------------------------- */

/* Larger for a higher score, then for a lower index; -0 equals +0, NaN is below everything. */
static uint64_t sort_key(double score, int64_t index)
{
    const float x = (float)score + 0.0f;
    uint32_t bits = 0;

    if (x == x) {
        memcpy(&bits, &x, sizeof bits);
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)index;
}

/* The k-th largest of n distinct keys (1 <= k <= n), by quickselect over a copy. */
static uint64_t kth_largest(const uint64_t *keys, int64_t n, int64_t k, uint64_t *scratch)
{
    int64_t low = 0, high = n - 1;
    const int64_t want = k - 1;

    memcpy(scratch, keys, (size_t)n * sizeof *keys);
    while (low < high) {
        const uint64_t a = scratch[low], b = scratch[(low + high) / 2], c = scratch[high];
        const uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) {
            while (scratch[i] > pivot) i++;
            while (scratch[j] < pivot) j--;
            if (i > j) break;
            const uint64_t t = scratch[i];
            scratch[i++] = scratch[j];
            scratch[j--] = t;
        }
        if (want <= j)
            high = j;
        else if (want >= i)
            low = i;
        else
            break;
    }
    return scratch[want];
}

static void choose_frames(const lf_select_params *p, const geometry *g, const workspace *w)
{
    const int64_t past = p->k_frames - p->q_frames;
    const int64_t first = p->sink_frames, last = past - p->near_frames;
    const int64_t wanted = p->keep_frames - p->sink_frames - p->near_frames;
    const int every = !p->hierarchy || past <= p->keep_frames;

    for (int64_t t = 0; t < p->k_frames; t++) w->frame_in[t] = every || t < first || t >= last;
    if (every || wanted == 0) return;
    score_frames(p, g, w);
    for (int64_t t = first; t < last; t++) w->keys[t - first] = sort_key(w->frames[t], t);
    const uint64_t cut = kth_largest(w->keys, last - first, wanted, w->scratch);
    for (int64_t t = first; t < last; t++) w->frame_in[t] = w->keys[t - first] >= cut;
}

static void choose_blocks(const lf_select_params *p, const geometry *g, const workspace *w,
                          int32_t *indices)
{
    int64_t candidates = 0, kept = 0;

    for (int64_t j = 0; j < g->blocks; j++)
        if (w->frame_in[j / g->frame_blocks]) w->keys[candidates++] = sort_key(w->scores[j], j);
    const uint64_t cut = kth_largest(w->keys, candidates, p->kept, w->scratch);
    for (int64_t i = 0; i < candidates; i++)
        if (w->keys[i] >= cut) indices[kept++] = (int32_t)~(uint32_t)w->keys[i];
}

/* ---- entry point -------------------------------------------------------------------------- */

static int make_workspace(const lf_select_params *p, const geometry *g, workspace *w)
{
    const size_t n = (size_t)(g->blocks > p->k_frames ? g->blocks : p->k_frames);

    w->means = malloc((size_t)(g->rows_max * p->dim) * sizeof *w->means);
    w->logits = malloc((size_t)(g->rows_max * g->stride) * sizeof *w->logits);
    w->log_tokens = malloc((size_t)g->stride * sizeof *w->log_tokens);
    w->scores = malloc(n * sizeof *w->scores);
    w->frames = malloc((size_t)p->k_frames * sizeof *w->frames);
    w->keys = malloc(n * sizeof *w->keys);
    w->scratch = malloc(n * sizeof *w->scratch);
    w->is_nan = malloc(n);
    w->frame_in = malloc((size_t)p->k_frames);
    if (!w->means || !w->logits || !w->log_tokens || !w->scores || !w->frames || !w->keys ||
        !w->scratch || !w->is_nan || !w->frame_in)
        return -1;
    for (int64_t b = 0; b < g->parts; b++) w->log_tokens[b] = logf((float)part_tokens(p, g, b));
    return 0;
}

static void free_workspace(workspace *w)
{
    free(w->means);
    free(w->logits);
    free(w->log_tokens);
    free(w->scores);
    free(w->frames);
    free(w->keys);
    free(w->scratch);
    free(w->is_nan);
    free(w->frame_in);
}

int lf_select_cpu(const lf_select_params *p, lf_error *err)
{
    if (p->store_means) {
        lf_select_params rest = *p;
        const lf_compress_params missing = lf_missing_means(&rest);
        return lf_compress_cpu(&missing, err) < 0 ? -1 : lf_select_cpu(&rest, err);
    }
    const geometry g = measure(p);
    const int64_t heads = p->batch * p->heads, panel_size = g.stride * p->dim;
    int failed = 0;

    if (heads * g.q_blocks == 0) return 0;
    // calloc: the last panel's spare columns must be numbers.
    float *panels = calloc((size_t)(heads * panel_size), sizeof *panels);
    if (!panels)
        return lf_fail(err, LF_NO_MEMORY, "select_blocks: no memory for %lld key means",
                       (long long)(heads * g.parts));

#pragma omp parallel num_threads(lf_threads())
    {
        workspace w = {0};
#pragma omp for schedule(static)
        for (int64_t item = 0; item < heads * p->k_frames; item++) {
            const int64_t bh = item / p->k_frames;
            pack_frame(p, &g, bh / p->heads, bh % p->heads, item % p->k_frames,
                       panels + bh * panel_size);
        }
        if (make_workspace(p, &g, &w) < 0) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < heads * g.q_blocks; item++) {
            const int64_t bh = item / g.q_blocks, r = item % g.q_blocks;
            if (failed) continue;
            score_blocks(p, &g, &w, panels + bh * panel_size, bh / p->heads, bh % p->heads, r);
            if (p->scores)
                for (int64_t j = 0; j < g.blocks; j++)
                    p->scores[item * g.blocks + j] = (float)w.scores[j];
            choose_frames(p, &g, &w);
            choose_blocks(p, &g, &w, p->indices + item * p->kept);
        }
        free_workspace(&w);
    }
    free(panels);
    return failed ? lf_fail(err, LF_NO_MEMORY, "select_blocks: no memory for scores") : 0;
}
