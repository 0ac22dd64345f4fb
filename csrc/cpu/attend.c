/* Block-sparse attention on the CPU: softmax(scale q k^T) v over the keys of a block list.
 *
 * run_scalar() is the definition; the vector engines (attend_tile.h, compiled once an
 * instruction set) must agree with it to rounding. Work is split over tiles of queries,
 * never over keys, so results do not depend on the number of threads. */
#include "attend.h"
#include "isa.h"

#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- the definition ---------------------------------------------------------------- */

/* scale <q, k> of one pair of rows. */
static double logit(const lf_attend_params *p, const void *q, const void *k)
{
    double sum = 0.0;
    for (int64_t d = 0; d < p->dim; d++)
        sum += (double)lf_load(q, p->dtype, d) * lf_load(k, p->dtype, d);
    return lf_clamp_logit(p->scale * sum);
}

static void run_scalar(const lf_attend_tile *tile, float *work)
{
    const lf_attend_params *p = tile->p;
    const int64_t b = tile->b, h = tile->h;
    double out[LF_ATTEND_MAX_DIM];  // [dim]
    (void)work;

    for (int64_t i = tile->row; i < tile->row + tile->rows; i++) {
        const void *q = lf_at(&p->q, p->dtype, b, i, h);
        double most = -INFINITY, sum = 0.0;
        lf_key_cursor at;
        int64_t start;

        at = lf_first_key(tile);
        while (lf_next_keys(tile, &at, 1, &start))
            most = fmax(most, logit(p, q, lf_at(&p->k, p->dtype, b, start, h)));

        memset(out, 0, sizeof out);
        at = lf_first_key(tile);
        while (lf_next_keys(tile, &at, 1, &start)) {
            const void *v = lf_at(&p->v, p->dtype, b, start, h);
            const double weight = exp(logit(p, q, lf_at(&p->k, p->dtype, b, start, h)) - most);
            sum += weight;
            for (int64_t d = 0; d < p->dim; d++) out[d] += weight * lf_load(v, p->dtype, d);
        }
        for (int64_t d = 0; d < p->dim; d++)  // no key: zeros, and log 0 below
            lf_store(lf_out_row(p, b, h, i), p->dtype, d,
                     sum == 0.0 ? 0.0f : (float)(out[d] / sum));
        if (p->lse) p->lse[(b * p->heads + h) * p->q_len + i] = (float)(most + log(sum));
    }
}

static int64_t no_work(int64_t rows, int64_t dim)
{
    (void)rows;
    (void)dim;
    return 0;
}

/* ---- the choice -------------------------------------------------------------------- */

static const lf_attend_engine SCALAR = {no_work, run_scalar};

static const lf_attend_engine *pick(void)
{
    switch (lf_isa_active()) {
#if defined(__x86_64__)
    case LF_ISA_AVX512: return &lf_attend_avx512;
    case LF_ISA_AVX2: return &lf_attend_avx2;
#endif
    case LF_ISA_SCALAR: return &SCALAR;
    default: return &lf_attend_vector;
    }
}

/* ---- the loop over tiles ------------------------------------------------------------ */

/* Queries of a dense tile. K and V are fetched and copied once a tile, so larger is better
 * (Zen 3, D 128: 74 GFLOP/s a core with 128 rows, 80 with 256, 83 with 384) until there is
 * too little for every thread to do. */
static int64_t dense_rows(const lf_attend_params *p, int threads)
{
    int64_t rows = LF_ATTEND_MAX_ROWS;
    while (rows > 48 && p->batch * p->heads * lf_ceil_div(p->q_len, rows) < 4 * (int64_t)threads)
        rows /= 2;
    return rows;
}

static int this_thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int lf_attend_cpu(const lf_attend_params *p, lf_error *err)
{
    const lf_attend_engine *engine = pick();
    int threads = lf_threads();
    const int64_t tile_rows = p->indices ? p->block_q : dense_rows(p, threads);
    const int64_t row_tiles = lf_ceil_div(p->q_len, tile_rows);
    const int64_t tiles = p->batch * p->heads * row_tiles;
    // In floats; whole pages, so that every thread is the first to touch its own.
    const int64_t work_stride = lf_ceil_div(engine->work_floats(tile_rows, p->dim), 1024) * 1024;
    float *work = NULL;

    if (p->dim > LF_ATTEND_MAX_DIM || tile_rows > LF_ATTEND_MAX_ROWS)
        return lf_fail(err, LF_UNSUPPORTED,
                       "block_sparse_attention: the CPU kernel takes D up to %d and block_q up to "
                       "%d, got %lld and %lld",
                       LF_ATTEND_MAX_DIM, LF_ATTEND_MAX_ROWS, (long long)p->dim,
                       (long long)tile_rows);
    if (tiles == 0) return 0;
    if (threads > tiles) threads = (int)tiles;
    if (work_stride > 0) {
        work = aligned_alloc(4096, (size_t)(work_stride * threads) * sizeof *work);
        if (!work)
            return lf_fail(err, LF_NO_MEMORY, "block_sparse_attention: no memory for %d threads",
                           threads);
    }

#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t r = i % row_tiles, row = r * tile_rows;
        const int64_t left = p->q_len - row;
        const lf_attend_tile tile = {
            .p = p,
            .b = i / row_tiles / p->heads,
            .h = i / row_tiles % p->heads,
            .row = row,
            .rows = left < tile_rows ? left : tile_rows,
            .blocks = p->indices ? p->indices + i * p->max_count : NULL,
            .block_count = !p->indices ? 0
                           : p->counts ? p->counts[i]
                                       : p->max_count,
        };
        engine->run(&tile, work ? work + this_thread() * work_stride : NULL);
    }
    free(work);
    return 0;
}
