/* Private to csrc/cpu: 16-bit floats to float32 without a branch, so that loops vectorise. */
#ifndef LF_CPU_CONVERT_H
#define LF_CPU_CONVERT_H

#include "../lightforcing.h"
#include <string.h>

static inline float lf_from_bf16(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline float lf_from_f16(uint16_t bits)
{
    // Exponent and mantissa moved up are 2^-112 of the value, subnormals included.
    uint32_t wide = (uint32_t)(bits & 0x7fffu) << 13;
    float value;
    memcpy(&value, &wide, sizeof value);
    value *= 0x1p112f;
    memcpy(&wide, &value, sizeof wide);
    wide |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinities and NaNs
    wide |= (uint32_t)(bits & 0x8000u) << 16;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Adds a row of `dim` elements to sum[dim]. */
static inline void lf_add_row(float *sum, const void *row, lf_dtype dtype, int64_t dim)
{
    const float *as_f32 = row;
    const uint16_t *as_16 = row;
    switch (dtype) {
    case LF_F16:
        for (int64_t d = 0; d < dim; d++) sum[d] += lf_from_f16(as_16[d]);
        break;
    case LF_BF16:
        for (int64_t d = 0; d < dim; d++) sum[d] += lf_from_bf16(as_16[d]);
        break;
    default:
        for (int64_t d = 0; d < dim; d++) sum[d] += as_f32[d];
    }
}

static inline int64_t lf_dtype_size(lf_dtype dtype)
{
    return dtype == LF_F32 || dtype == LF_I32 ? 4 : 2;
}

static inline const void *lf_at(const lf_tensor *x, lf_dtype dtype, int64_t b, int64_t l, int64_t h)
{
    return (const char *)x->data +
           (b * x->batch + l * x->token + h * x->head) * lf_dtype_size(dtype);
}

#endif
