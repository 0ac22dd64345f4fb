/* What the files of the CPU attention share: private to csrc/cpu/attend*.
 *
 * A tile is a run of queries of one (batch, head) that read the same keys: a row of the
 * block list, or, when dense, up to 384 queries that read them all. */
#ifndef LIGHTFORCING_CPU_ATTEND_H
#define LIGHTFORCING_CPU_ATTEND_H

#include "../lightforcing.h"
#include "convert.h"

#include <math.h>
#include <string.h>

enum { LF_ATTEND_MAX_DIM = 256, LF_ATTEND_MAX_ROWS = 384 };

typedef struct {
    const lf_attend_params *p;
    int64_t b, h, row, rows;  // queries [row, row + rows) of batch b, head h
    const int32_t *blocks;    // [block_count]; NULL: all keys
    int64_t block_count;
} lf_attend_tile;

/* One implementation. `work` is 64-byte aligned and holds work_floats(rows, dim) floats;
 * nothing in it outlives a tile. A tile's result depends on its keys alone, not on its neighbours.
 */
typedef struct {
    int64_t (*work_floats)(int64_t rows, int64_t dim);  // for tiles of up to `rows`
    void (*run)(const lf_attend_tile *tile, float *work);
} lf_attend_engine;

extern const lf_attend_engine lf_attend_vector;
#if defined(__x86_64__)
extern const lf_attend_engine lf_attend_avx2;
extern const lf_attend_engine lf_attend_avx512;
#endif

/* ---- the keys of a tile, as runs of consecutive tokens --------------------------- */

typedef struct {
    int64_t next;         // next entry of the list
    int64_t start, left;  // tokens of the current run that were not handed out
} lf_key_cursor;

static inline lf_key_cursor lf_first_key(const lf_attend_tile *tile)
{
    return (lf_key_cursor){.left = tile->blocks ? 0 : tile->p->k_len};
}

/* Up to `most` consecutive keys: their number, 0 at the end, and the first in *start. */
static inline int64_t lf_next_keys(const lf_attend_tile *tile, lf_key_cursor *at, int64_t most,
                                   int64_t *start)
{
    const lf_attend_params *p = tile->p;
    int64_t count;

    if (at->left == 0 && at->next < tile->block_count) {
        const int64_t j = tile->blocks[at->next++];
        at->start = lf_block_start(j, p->frame_tokens, p->block_k);
        at->left = lf_block_tokens(j, p->frame_tokens, p->block_k);
    }
    count = at->left < most ? at->left : most;
    *start = at->start;
    at->start += count;
    at->left -= count;
    return count;
}

/* ---- elements --------------------------------------------------------------------- */

static inline uint32_t lf_bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* To nearest, ties to even. */
static inline uint16_t lf_bf16_of_float(float x)
{
    const uint32_t bits = lf_bits_of_float(x);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    const uint32_t quiet = bits | 0x400000;  // a NaN stays one
    return (uint16_t)((x == x ? rounded : quiet) >> 16);
}

static inline uint16_t lf_f16_of_float(float x)
{
    const uint32_t bits = lf_bits_of_float(x), sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    const uint32_t size_bits = bits & 0x7fffffff;

    if (size != size) return (uint16_t)(sign | 0x7e00);
    if (size >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    // Subnormal halves: adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded to even.
    if (size < 0x1p-14f) return (uint16_t)(sign | (lf_bits_of_float(size + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (size_bits - (112u << 23) + 0xfff + (size_bits >> 13 & 1)) >> 13);
}

static inline float lf_load(const void *row, lf_dtype dtype, int64_t d)
{
    switch (dtype) {
    case LF_F16: return lf_from_f16(((const uint16_t *)row)[d]);
    case LF_BF16: return lf_from_bf16(((const uint16_t *)row)[d]);
    default: return ((const float *)row)[d];
    }
}

static inline void lf_store(void *row, lf_dtype dtype, int64_t d, float x)
{
    switch (dtype) {
    case LF_F16: ((uint16_t *)row)[d] = lf_f16_of_float(x); break;
    case LF_BF16: ((uint16_t *)row)[d] = lf_bf16_of_float(x); break;
    default: ((float *)row)[d] = x; break;
    }
}

/* Row `token` of an output. */
static inline void *lf_out_row(const lf_attend_params *p, int64_t b, int64_t h, int64_t token)
{
    const int64_t offset = b * p->out.batch + token * p->out.token + h * p->out.head;
    return (char *)p->out.data + offset * lf_dtype_size(p->dtype);
}

/* A logit is clamped to the finite floats, so that no overflow of q.k makes a NaN; a NaN stays. */
static inline float lf_clamp_logit(double x)
{
    const double most = 3.40282346638528859812e+38;  // FLT_MAX
    return (float)(x > most ? most : x < -most ? -most : x);
}

#endif
