/* Means of consecutive rows, bit-equal to the CPU's (csrc/cpu/compress.c): the same additions in
 * the same order, none contracted. A thread holds 8 neighbouring elements of every row. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace lf {

/* Elements d .. d + 7 of rows `stride` elements apart; `vectors`: 16-byte loads are allowed. */
template <typename T> struct Rows {
    const T *at;
    int64_t stride;
    bool vectors;
};

template <typename T> struct Octet {
    T x[8];
};

template <typename T> __device__ __forceinline__ Octet<T> load_octet(const Rows<T> &rows, int row)
{
    const T *at = rows.at + row * rows.stride;
    Octet<T> octet;
#pragma unroll
    for (int i = 0; i < int(sizeof octet / 16); i++)
        reinterpret_cast<uint4 *>(&octet)[i] =
            load_streaming(reinterpret_cast<const uint4 *>(at) + i);
    return octet;
}

__device__ __forceinline__ void clear(float (&sum)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.0f;
}

/* sum += weight * mean, rounded twice. */
__device__ __forceinline__ void add_scaled(float (&sum)[8], float weight, const float (&mean)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, mean[i]));
}

/* Mean of rows [first, first + ROWS): of its quarters' means, of plain sums up to 4 rows.
 * A division by a power of two is the product with its inverse, bit for bit. */
template <typename T, int ROWS>
__device__ __forceinline__ void full_mean(const Rows<T> &rows, int first, float (&out)[8])
{
    clear(out);
    if constexpr (ROWS <= 4) {
        Octet<T> octet[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) octet[i] = load_octet(rows, first + i);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int d = 0; d < 8; d++) out[d] = __fadd_rn(out[d], to_float(octet[i].x[d]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float mean[8];
            full_mean<T, ROWS / 4>(rows, first + i * (ROWS / 4), mean);
            add_scaled(out, float(ROWS / 4), mean);
        }
    }
#pragma unroll
    for (int d = 0; d < 8; d++) out[d] = __fmul_rn(out[d], 1.0f / ROWS);
}

/* x / n, 0 for n = 0: as a product where that is the same, bit for bit. */
__device__ __forceinline__ void divide(float (&x)[8], int n)
{
    if ((n & (n - 1)) == 0) {
        const float inverse = n > 0 ? __uint_as_float(uint32_t(96 + __clz(n)) << 23) : 0.0f;
#pragma unroll
        for (int d = 0; d < 8; d++) x[d] = __fmul_rn(x[d], inverse);
    } else {
#pragma unroll
        for (int d = 0; d < 8; d++) x[d] = __fdiv_rn(x[d], float(n));
    }
}

/* The same of rows [first, min(first + ROWS, n)), n >= 1: the short last part of a frame or of the
 * queries. All rows are asked for at once, those past the last as the last, and count as zeros,
 * which a sum that begins with +0 does not feel: row by row, the few short parts took longer than
 * all the others together (6 of 14 us on an H100). */
template <typename T, int ROWS>
__device__ __forceinline__ void short_mean(const Rows<T> &rows, int first, int n, float (&out)[8])
{
    const int here = min(max(n - first, 0), ROWS);
    clear(out);
    if constexpr (ROWS <= 4) {
        Octet<T> octet[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) octet[i] = load_octet(rows, min(first + i, n - 1));
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int d = 0; d < 8; d++)
                out[d] = __fadd_rn(out[d], i < here ? to_float(octet[i].x[d]) : 0.0f);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = first + i * (ROWS / 4);
            float mean[8];
            short_mean<T, ROWS / 4>(rows, at, n, mean);
            add_scaled(out, float(min(max(n - at, 0), ROWS / 4)), mean);
        }
    }
    divide(out, here);
}

/* The same, an element at a time: tensors that are not aligned to 16 bytes. */
template <typename T, int ROWS>
__device__ __forceinline__ void plain_mean(const Rows<T> &rows, int first, int n, float (&out)[8])
{
    clear(out);
    if constexpr (ROWS <= 4) {
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            const T *at = rows.at + (first + i) * rows.stride;
#pragma unroll
            for (int d = 0; d < 8; d++) out[d] = __fadd_rn(out[d], to_float(at[d]));
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < n; i += ROWS / 4) {
            const int here = min(ROWS / 4, n - i);
            float mean[8];
            plain_mean<T, ROWS / 4>(rows, first + i, here, mean);
            add_scaled(out, float(here), mean);
        }
    }
    divide(out, n);
}

/* Mean of the first n rows (0: zeros), n <= ROWS. */
template <typename T, int ROWS>
__device__ __forceinline__ void mean_rows(const Rows<T> &rows, int n, float (&out)[8])
{
    if (n >= ROWS && rows.vectors)
        full_mean<T, ROWS>(rows, 0, out);
    else if (n > 0 && rows.vectors)
        short_mean<T, ROWS>(rows, 0, n, out);
    else if (n > 0)
        plain_mean<T, ROWS>(rows, 0, min(n, ROWS), out);
    else
        clear(out);
}

}  // namespace lf
