/* What the files of the CPU attention share: private to csrc/cpu/attend*.
 *
 * A tile is up to 128 queries of one (batch, head) that read the same keys: a row of
 * the block list, or, when dense, a run of queries that read them all. */
#ifndef LIGHTFORCING_CPU_ATTEND_H
#define LIGHTFORCING_CPU_ATTEND_H

#include "../lightforcing.h"

#include <math.h>
#include <string.h>

enum { LF_ATTEND_MAX_DIM = 256, LF_ATTEND_MAX_ROWS = 128 };

typedef struct {
    const lf_attend_params *p;
    int64_t b, h, row, rows;  // queries [row, row + rows) of batch b, head h
    const int32_t *blocks;    // [block_count]; NULL: all keys
    int64_t block_count;
} lf_attend_tile;

/* One implementation. `work` is 64-byte aligned and holds work_floats(dim) floats; nothing
 * in it outlives a tile. A tile's result depends on its keys alone, not on its neighbours. */
typedef struct {
    int64_t (*work_floats)(int64_t dim);
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

static inline float lf_float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t lf_bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float lf_float_of_bf16(uint16_t x) { return lf_float_of_bits((uint32_t)x << 16); }

/* Branch-free selects, so that the loops over it become vector code. */
static inline float lf_float_of_f16(uint16_t x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16;
    const uint32_t low = (uint32_t)(x & 0x7fff) << 13;
    const uint32_t normal = low + (112u << 23);        // exponent bias 15 to 127
    const uint32_t special = low + (224u << 23);       // infinities and NaN: exponent 255
    const float tiny = (float)(x & 0x3ff) * 0x1p-24f;  // subnormal halves
    const uint32_t finite = low < (1u << 23) ? lf_bits_of_float(tiny) : normal;
    return lf_float_of_bits(sign | (low < (31u << 23) ? finite : special));
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

/* Row `token` of x, in elements of the tensor's dtype. */
static inline int64_t lf_row_offset(const lf_tensor *x, int64_t b, int64_t h, int64_t token)
{
    return b * x->batch + token * x->token + h * x->head;
}

static inline float lf_load(const void *data, lf_dtype dtype, int64_t offset)
{
    switch (dtype) {
    case LF_F16: return lf_float_of_f16(((const uint16_t *)data)[offset]);
    case LF_BF16: return lf_float_of_bf16(((const uint16_t *)data)[offset]);
    default: return ((const float *)data)[offset];
    }
}

static inline void lf_store(void *data, lf_dtype dtype, int64_t offset, float x)
{
    switch (dtype) {
    case LF_F16: ((uint16_t *)data)[offset] = lf_f16_of_float(x); break;
    case LF_BF16: ((uint16_t *)data)[offset] = lf_bf16_of_float(x); break;
    default: ((float *)data)[offset] = x; break;
    }
}

/* A logit is clamped to the finite floats, so that no overflow of q.k makes a NaN; a NaN stays. */
static inline float lf_clamp_logit(double x)
{
    const double most = 3.40282346638528859812e+38;  // FLT_MAX
    return (float)(x > most ? most : x < -most ? -most : x);
}

#endif
