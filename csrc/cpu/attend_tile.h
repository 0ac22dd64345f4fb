/* One tile of attention in GCC vector code: the body of attend_vector.c, attend_avx2.c and
 * attend_avx512.c. The including file defines
 *
 *   VEC      floats of a vector                 ROWS   rows of a micro-kernel
 *   TILE_FN  static, inlined, with the target   ENGINE the lf_attend_engine to define
 *   vf, vi   VEC floats, VEC int32 (may_alias)  vec_splat  vec_fma  vec_max  vec_any
 *   widen_f16(const uint16_t *, float *, n)
 *
 * Everything runs along the queries: a vector holds VEC queries, a panel 2 VEC of them.
 * No horizontal sum is needed, K and V are read as they lie, and only Q and O, which are
 * touched once a tile, change their layout:
 *
 *   q, o [panels][dim][LANES]      s [KEY_STEP][LANES]      k, v [KEY_STEP][LD]
 *
 * For each KEY_STEP keys of the list, copied (and widened) into k and v, and for each panel:
 * s = k q, the running maximum and sum, s = exp2(s - max), o = o alpha + v^T s. k and v stay
 * in L2, s and the panel in L1. A step is filled across the ends of key blocks, so a list
 * costs what the same number of keys costs when dense, short blocks or not.
 *
 * Bound by the FMA units: a micro-kernel keeps 2 ROWS sums in registers and needs 2 loads and
 * ROWS broadcasts for 2 ROWS FMAs. Next comes the latency of K and V, which is why the rows
 * of the next step are prefetched. */
#include "attend.h"

enum {
    LANES = 2 * VEC,
    KEY_STEP = 96,  // whole micro-kernels of 6 and 8 rows; at D 256, k and v take half of 512 kB
};

typedef struct {
    vf most[2];          // of the logits so far, in units of log 2
    vf sum[2], lost[2];  // of the exponentials; what rounding took from it
} softmax_state;

typedef struct {
    float *q, *o;          // [panels][dim][LANES]
    softmax_state *state;  // [panels]
    float *s;              // [KEY_STEP][LANES]
    float *k, *v;          // [KEY_STEP][ld]
    int64_t ld;
} workspace;

/* Rows of a buffer that are a power of two apart would share a few L1 sets: one line more. */
static int64_t leading(int64_t dim) { return dim + 16; }

static int64_t work_floats(int64_t rows, int64_t dim)
{
    const int64_t panel = 2 * dim * LANES + (int64_t)(sizeof(softmax_state) / sizeof(float));
    return lf_ceil_div(rows, LANES) * panel + KEY_STEP * (LANES + 2 * leading(dim));
}

static workspace divide(float *work, int64_t panels, int64_t dim)
{
    workspace w = {.ld = leading(dim)};
    w.q = work;
    w.o = w.q + panels * dim * LANES;
    w.state = (softmax_state *)(w.o + panels * dim * LANES);
    w.s = (float *)(w.state + panels);
    w.k = w.s + KEY_STEP * LANES;
    w.v = w.k + KEY_STEP * w.ld;
    return w;
}

/* ---- rows in and out ------------------------------------------------------------------ */

TILE_FN void widen(const void *from, lf_dtype dtype, float *to, int64_t n)
{
    const uint16_t *half = from;

    switch (dtype) {
    case LF_F16: widen_f16(half, to, n); break;
    case LF_BF16:
        for (int64_t i = 0; i < n; i++) to[i] = lf_from_bf16(half[i]);
        break;
    default: memcpy(to, from, (size_t)n * sizeof *to); break;
    }
}

/* The keys of a step, and how many of their rows were prefetched. */
typedef struct {
    int64_t n, fetched;
    const char *row[2 * KEY_STEP];  // key 0, value 0, key 1, ...
} key_rows;

/* Takes the next keys of the tile, KEY_STEP unless they end, and touches each row.
 *
 * NOTE: rows of a token-major cache lie a page or more apart. A prefetch whose page walk is
 * pending cannot retire, so one row here and there would stall the FMAs for a walk each; all
 * at once the walks overlap. Measured on Zen 3 with 4 kB pages at H 12, D 128: 72 GFLOP/s a
 * core without prefetching or with it row by row, 77 like this. */
TILE_FN void take_keys(const lf_attend_tile *tile, lf_key_cursor *at, key_rows *keys)
{
    const lf_attend_params *p = tile->p;
    const int64_t size = lf_dtype_size(p->dtype);
    int64_t start, count;

    keys->n = keys->fetched = 0;
    while (keys->n < KEY_STEP && (count = lf_next_keys(tile, at, KEY_STEP - keys->n, &start)) > 0) {
        const char *k = lf_at(&p->k, p->dtype, tile->b, start, tile->h);
        const char *v = lf_at(&p->v, p->dtype, tile->b, start, tile->h);
        for (; count > 0; count--, k += p->k.token * size, v += p->v.token * size) {
            keys->row[2 * keys->n] = k;
            keys->row[2 * keys->n++ + 1] = v;
        }
    }
    for (int64_t i = 0; i < 2 * keys->n; i++) __builtin_prefetch(keys->row[i], 0, 2);
}

/* The rest of the next `rows` rows: called between micro-kernels, to hide in their FMAs. */
TILE_FN void fetch(key_rows *keys, int64_t rows, int64_t bytes)
{
    for (; rows > 0 && keys->fetched < 2 * keys->n; rows--, keys->fetched++)
        for (int64_t i = 64; i < bytes; i += 64)
            __builtin_prefetch(keys->row[keys->fetched] + i, 0, 2);
}

TILE_FN void copy_keys(const lf_attend_params *p, const key_rows *keys, const workspace *w)
{
    for (int64_t j = 0; j < keys->n; j++) {
        widen(keys->row[2 * j], p->dtype, w->k + j * w->ld, p->dim);
        widen(keys->row[2 * j + 1], p->dtype, w->v + j * w->ld, p->dim);
    }
}

/* Panels of the tile's queries, times scale / log 2; lanes past the last row are 0. */
TILE_FN void load_queries(const lf_attend_tile *tile, const workspace *w)
{
    const lf_attend_params *p = tile->p;
    const float factor = (float)(p->scale * 1.44269504088896340736);
    float row[LF_ATTEND_MAX_DIM];

    memset(w->q, 0, (size_t)(lf_ceil_div(tile->rows, LANES) * p->dim * LANES) * sizeof *w->q);
    for (int64_t i = 0; i < tile->rows; i++) {
        float *q = w->q + i / LANES * p->dim * LANES + i % LANES;  // [dim][LANES]
        widen(lf_at(&p->q, p->dtype, tile->b, tile->row + i, tile->h), p->dtype, row, p->dim);
        for (int64_t d = 0; d < p->dim; d++) q[d * LANES] = factor * row[d];
    }
}

TILE_FN void store_outputs(const lf_attend_tile *tile, const workspace *w)
{
    const lf_attend_params *p = tile->p;
    float *lse = p->lse ? p->lse + (tile->b * p->heads + tile->h) * p->q_len + tile->row : NULL;

    for (int64_t i = 0; i < tile->rows; i++) {
        const float *o = w->o + i / LANES * p->dim * LANES + i % LANES;  // [dim][LANES]
        const float *most = (const float *)w->state[i / LANES].most;     // [LANES]
        const float sum = ((const float *)w->state[i / LANES].sum)[i % LANES] +
                          ((const float *)w->state[i / LANES].lost)[i % LANES];
        void *out = lf_out_row(p, tile->b, tile->h, tile->row + i);
        for (int64_t d = 0; d < p->dim; d++)  // no key: zeros, and log 0 below
            lf_store(out, p->dtype, d, sum == 0.0f ? 0.0f : o[d * LANES] / sum);
        if (lse) lse[i] = (float)(most[i % LANES] * 0.693147180559945309417 + log((double)sum));
    }
}

/* ---- arithmetic ----------------------------------------------------------------------- */

/* 2^x for x <= 0: exactly 1 at 0, 0 below -126.5, NaN for NaN, else within 0.7 ulp. */
TILE_FN vf exp2_negative(vf x)
{
    const vf shift = vec_splat(0x1.8p23f + 127.0f);  // the low bits then hold round(x) + 127
    const vf clamped = vec_max(vec_splat(-127.0f), x);
    const vf shifted = clamped + shift;
    const vf f = clamped - (shifted - shift);  // in [-1/2, 1/2]
    vf y = vec_splat(0x1.41fbbcp-13f);
    y = vec_fma(y, f, vec_splat(0x1.5f3e54p-10f));
    y = vec_fma(y, f, vec_splat(0x1.3b2d4cp-7f));
    y = vec_fma(y, f, vec_splat(0x1.c6aee8p-5f));
    y = vec_fma(y, f, vec_splat(0x1.ebfbdcp-3f));
    y = vec_fma(y, f, vec_splat(0x1.62e430p-1f));
    y = vec_fma(y, f, vec_splat(1.0f));
    return y * (vf)((vi)shifted << 23);
}

/* s[rows][LANES] = k[rows][dim] q[dim][LANES]; most[2] rises to their maximum. */
TILE_FN void scores_of_rows(int rows, const float *k, int64_t ld, const float *q, int64_t dim,
                            float *s, vf *most)
{
    vf sum[ROWS][2];

#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = vec_splat(0.0f);
    for (int64_t d = 0; d < dim; d++) {
        const vf *x = (const vf *)(q + d * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const vf y = vec_splat(k[i * ld + d]);
            sum[i][0] = vec_fma(y, x[0], sum[i][0]);
            sum[i][1] = vec_fma(y, x[1], sum[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        vf *to = (vf *)(s + i * LANES);
        to[0] = sum[i][0];
        to[1] = sum[i][1];
        most[0] = vec_max(sum[i][0], most[0]);  // a NaN is passed over here, and found later
        most[1] = vec_max(sum[i][1], most[1]);
    }
}

/* o[rows][LANES] = o alpha + v[n][rows]^T s[n][LANES]. The step's sum starts at zero: adding
 * to the long sum once a step instead of once a key keeps its rounding error down. */
TILE_FN void values_of_rows(int rows, const float *v, int64_t ld, const float *s, int64_t n,
                            const vf *alpha, float *o)
{
    vf sum[ROWS][2];

#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = vec_splat(0.0f);
    for (int64_t j = 0; j < n; j++) {
        const vf *x = (const vf *)(s + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const vf y = vec_splat(v[j * ld + i]);
            sum[i][0] = vec_fma(y, x[0], sum[i][0]);
            sum[i][1] = vec_fma(y, x[1], sum[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        vf *to = (vf *)(o + i * LANES);
        to[0] = vec_fma(to[0], alpha[0], sum[i][0]);
        to[1] = vec_fma(to[1], alpha[1], sum[i][1]);
    }
}

/* Rows of the next micro-kernel: ROWS, but the last two share a remainder, since one or two
 * rows alone would wait for the latency of their FMAs. */
static inline int64_t next_rows(int64_t left)
{
    return left <= ROWS ? left : left >= 2 * ROWS ? ROWS : (left + 1) / 2;
}

/* What the next step needs, and how much of it to prefetch at each micro-kernel. */
typedef struct {
    key_rows *keys;
    int64_t rows, bytes;
} ahead;

/* s[n][LANES] = k[n][dim] q[dim][LANES]; most[2] rises to their maximum. */
TILE_FN void scores(const float *k, int64_t ld, int64_t n, const float *q, int64_t dim, float *s,
                    vf *most, const ahead *next)
{
    for (int64_t j = 0, rows; j < n; j += rows, k += rows * ld, s += rows * LANES) {
        fetch(next->keys, next->rows, next->bytes);
        switch (rows = next_rows(n - j)) {
#if ROWS == 8
        case 8: scores_of_rows(8, k, ld, q, dim, s, most); break;
        case 7: scores_of_rows(7, k, ld, q, dim, s, most); break;
#endif
        case 6: scores_of_rows(6, k, ld, q, dim, s, most); break;
        case 5: scores_of_rows(5, k, ld, q, dim, s, most); break;
        case 4: scores_of_rows(4, k, ld, q, dim, s, most); break;
        case 3: scores_of_rows(3, k, ld, q, dim, s, most); break;
        case 2: scores_of_rows(2, k, ld, q, dim, s, most); break;
        default: scores_of_rows(1, k, ld, q, dim, s, most); break;
        }
    }
}

/* o[dim][LANES] = o alpha + v[n][dim]^T s[n][LANES]. dim is a multiple of 8, of which
 * next_rows() makes 8, 6, 5 and 4. */
TILE_FN void values(const float *v, int64_t ld, int64_t n, const float *s, int64_t dim,
                    const vf *alpha, float *o, const ahead *next)
{
    for (int64_t d = 0, rows; d < dim; d += rows, v += rows, o += rows * LANES) {
        fetch(next->keys, next->rows, next->bytes);
        switch (rows = next_rows(dim - d)) {
#if ROWS == 8
        case 8: values_of_rows(8, v, ld, s, n, alpha, o); break;
#endif
        case 6: values_of_rows(6, v, ld, s, n, alpha, o); break;
        case 5: values_of_rows(5, v, ld, s, n, alpha, o); break;
        default: values_of_rows(4, v, ld, s, n, alpha, o); break;
        }
    }
}

/* s = exp2(s - most), given the maximum of s and what was before: the new state, and in
 * alpha the factor of everything summed so far. */
TILE_FN softmax_state exponentials(float *s, int64_t n, const vf *most, const softmax_state *before,
                                   vf *alpha)
{
    softmax_state after;
    vf sum[2] = {vec_splat(0.0f), vec_splat(0.0f)};

    for (int i = 0; i < 2; i++) {
        after.most[i] = most[i];
        alpha[i] = exp2_negative(before->most[i] - most[i]);
    }
    for (int64_t j = 0; j < n; j++) {
        vf *x = (vf *)(s + j * LANES);
        x[0] = exp2_negative(x[0] - most[0]);
        x[1] = exp2_negative(x[1] - most[1]);
        sum[0] += x[0];
        sum[1] += x[1];
    }
    // Compensated: this one sum is in the error of every output, and costs next to nothing.
    for (int i = 0; i < 2; i++) {
        const vf old = before->sum[i] * alpha[i];
        const vf new = vec_fma(before->lost[i], alpha[i], sum[i]);
        after.sum[i] = old + new;
        const vf part = after.sum[i] - old;
        after.lost[i] = (old - (after.sum[i] - part)) + (new - part);
    }
    return after;
}

/* True when some logit overflowed. The largest exponential is exactly 1, so a sum that is
 * not even 1/2, and that was no NaN before, tells of an infinite or NaN logit, as does the lowest
 * maximum. */
TILE_FN int overflowed(const softmax_state *before, const softmax_state *after)
{
    int any = 0;
    for (int i = 0; i < 2; i++) {
        const vi sound = (after->sum[i] >= 0.5f) & (after->most[i] > -0x1.fffffep127f);
        any |= vec_any(~sound & (before->sum[i] == before->sum[i]));
    }
    return any;
}

/* Replaces what is not finite in a panel of logits by the definition: summed in double,
 * clamped to the finite floats. Rare, and never a change to a finite logit. */
static void repair(const lf_attend_tile *tile, int64_t panel, const float *k, int64_t ld, int64_t n,
                   float *s)
{
    const lf_attend_params *p = tile->p;
    const double factor = p->scale * 1.44269504088896340736;

    for (int64_t i = panel * LANES; i < tile->rows && i < (panel + 1) * LANES; i++) {
        const void *q = lf_at(&p->q, p->dtype, tile->b, tile->row + i, tile->h);
        for (int64_t j = 0; j < n; j++) {
            float *x = s + j * LANES + i % LANES;
            double sum = 0.0;
            if (isfinite(*x)) continue;
            for (int64_t d = 0; d < p->dim; d++)
                sum += (double)lf_load(q, p->dtype, d) * k[j * ld + d];
            *x = lf_clamp_logit(factor * sum);
        }
    }
}

/* One panel against the n keys in w->k and w->v. */
TILE_FN void step(const lf_attend_tile *tile, const workspace *w, int64_t panel, int64_t n,
                  const ahead *next)
{
    const int64_t dim = tile->p->dim;
    const float *q = w->q + panel * dim * LANES;  // [dim][LANES]
    float *o = w->o + panel * dim * LANES;        // [dim][LANES]
    const softmax_state before = w->state[panel];
    softmax_state after;
    vf most[2] = {before.most[0], before.most[1]}, alpha[2];

    scores(w->k, w->ld, n, q, dim, w->s, most, next);
    after = exponentials(w->s, n, most, &before, alpha);
    if (__builtin_expect(overflowed(&before, &after), 0)) {
        scores(w->k, w->ld, n, q, dim, w->s, most, next);
        repair(tile, panel, w->k, w->ld, n, w->s);
        for (int i = 0; i < 2; i++) {
            most[i] = before.most[i];
            for (int64_t j = 0; j < n; j++)
                most[i] = vec_max(((const vf *)(w->s + j * LANES))[i], most[i]);
        }
        after = exponentials(w->s, n, most, &before, alpha);
    }
    values(w->v, w->ld, n, w->s, dim, alpha, o, next);
    w->state[panel] = after;
}

TILE_RUN static void run(const lf_attend_tile *tile, float *work)
{
    const lf_attend_params *p = tile->p;
    const int64_t panels = lf_ceil_div(tile->rows, LANES);
    const workspace w = divide(work, panels, p->dim);
    lf_key_cursor at = lf_first_key(tile);
    key_rows keys[2];

    load_queries(tile, &w);
    memset(w.o, 0, (size_t)(panels * p->dim * LANES) * sizeof *w.o);
    for (int64_t i = 0; i < panels; i++)
        for (int half = 0; half < 2; half++) {
            w.state[i].most[half] = vec_splat(-0x1.fffffep127f);
            w.state[i].sum[half] = w.state[i].lost[half] = vec_splat(0.0f);
        }

    take_keys(tile, &at, &keys[0]);
    for (int turn = 0; keys[turn].n > 0; turn ^= 1) {
        const int64_t n = keys[turn].n;
        ahead next = {.keys = &keys[turn ^ 1], .bytes = p->dim * lf_dtype_size(p->dtype)};

        copy_keys(p, &keys[turn], &w);
        take_keys(tile, &at, next.keys);
        next.rows = lf_ceil_div(2 * next.keys->n * ROWS, panels * (n + p->dim));
        for (int64_t i = 0; i < panels; i++) step(tile, &w, i, n, &next);
    }
    store_outputs(tile, &w);
}

const lf_attend_engine ENGINE = {work_floats, run};
