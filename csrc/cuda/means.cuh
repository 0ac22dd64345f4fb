/* Means of consecutive rows, bit-equal to the CPU's (csrc/cpu/compress.c): the same additions in
 * the same order, none contracted. A thread holds 8 neighbouring elements of every row. */
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace lf {

/* Elements d .. d + 7 of rows `stride` elements apart; `vectors`: 16-byte loads are allowed, and
 * a stride is below MOST_STRIDE, so that 32 of them are a 32-bit number. */
constexpr int64_t MOST_STRIDE = 1 << 26;

template <typename T> struct Rows {
    const T *at;
    int64_t stride;
    bool vectors;
};

template <typename T> struct alignas(16) Octet {
    T x[8];
};

template <typename T> __device__ __forceinline__ Octet<T> load_octet(const Rows<T> &rows, int row)
{
    const T *at = rows.at + row * int(rows.stride);
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

/* Eight elements as floats: of bfloat16 by one instruction each, where converting a 16-bit value
 * that is first cut out of a register takes one and a half. */
template <typename T> __device__ __forceinline__ void widen(const Octet<T> &octet, float (&to)[8])
{
#pragma unroll
    for (int d = 0; d < 8; d++) to[d] = to_float(octet.x[d]);
}
template <> __device__ __forceinline__ void widen(const Octet<__nv_bfloat16> &octet, float (&to)[8])
{
    const uint4 all = reinterpret_cast<const uint4 &>(octet);
    const uint32_t pairs[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(pairs[i] << 16);
        to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

/* sum += weight * mean, rounded twice. */
__device__ __forceinline__ void add_scaled(float (&sum)[8], float weight, const float (&mean)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, mean[i]));
}

/* x / n for n a power of two, 0 for n = 0: the product with 1 / n is the same, bit for bit. */
__device__ __forceinline__ void divide_exactly(float (&x)[8], int n)
{
    const float inverse = n > 0 ? __uint_as_float(uint32_t(96 + __clz(n)) << 23) : 0.0f;
#pragma unroll
    for (int d = 0; d < 8; d++) x[d] = __fmul_rn(x[d], inverse);
}

__device__ __forceinline__ void divide(float (&x)[8], int n)
{
    if ((n & (n - 1)) == 0) {
        divide_exactly(x, n);
    } else {
#pragma unroll
        for (int d = 0; d < 8; d++) x[d] = __fdiv_rn(x[d], float(n));
    }
}

/* Whether every inner mean of the first n of ROWS rows is of 0, 1, 2, 4 or 8 rows. */
template <int ROWS> __device__ __forceinline__ bool divides_exactly(int n)
{
    if constexpr (ROWS <= 8) return true;
    const int rest = n % (ROWS / 4);
    return (rest & (rest - 1)) == 0;
}

/* Sum of rows [first, min(first + ROWS, n)), n >= 1, as the weighed means of its quarters, plainly
 * up to 4 rows, if n divides_exactly(). No branch, so that many rows are asked for at once: those
 * past the last as the last, to count as zeros, which a sum that begins with +0 does not feel.
 * Full parts run the same code: the few short ones, fetching instructions of their own, took
 * longer than all the others (3 of 14 us on an H100). */
template <typename T, int ROWS>
__device__ __forceinline__ void vector_sum(const Rows<T> &rows, int first, int n, float (&out)[8])
{
    clear(out);
    if constexpr (ROWS <= 4) {
        Octet<T> octet[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) octet[i] = load_octet(rows, min(first + i, n - 1));
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (first + i >= n) octet[i] = {};
            float row[8];
            widen(octet[i], row);
#pragma unroll
            for (int d = 0; d < 8; d++) out[d] = __fadd_rn(out[d], row[d]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = first + i * (ROWS / 4), here = min(max(n - at, 0), ROWS / 4);
            float mean[8];
            vector_sum<T, ROWS / 4>(rows, at, n, mean);
            divide_exactly(mean, here);
            // A power of two times what it divided is exact: fused, this rounds as twice.
#pragma unroll
            for (int d = 0; d < 8; d++) out[d] = fmaf(float(here), mean[d], out[d]);
        }
    }
}

/* An element of the mean of n of `part` rows (a power of 2 up to 32) whatever n and the alignment:
 * slow, and only once in the code. By value: an array whose address left for a call would live in
 * memory on every path (32 us instead of 14 for a call's queries and keys). */
template <typename T>
__device__ __noinline__ float plain_mean(const T *at, int64_t stride, int part, int n)
{
    const int outer = part <= 4 ? 1 : part / 4, inner = outer <= 4 ? 1 : outer / 4;
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < n; i += outer) {
        const int here = min(outer, n - i);
        float mean = 0.0f;
#pragma unroll 1
        for (int j = i; j < i + here; j += inner) {
            const int rows = min(inner, i + here - j);
            float least = 0.0f;
            for (int row = j; row < j + rows; row++)
                least = __fadd_rn(least, to_float(at[row * stride]));
            if (inner > 1) least = __fmul_rn(float(rows), __fdiv_rn(least, float(rows)));
            mean = __fadd_rn(mean, least);
        }
        if (outer > 1) mean = __fmul_rn(float(here), __fdiv_rn(mean, float(here)));
        sum = __fadd_rn(sum, mean);
    }
    return __fdiv_rn(sum, float(n));
}

/* Mean of the first n rows (0: zeros), n <= ROWS. */
template <typename T, int ROWS>
__device__ __forceinline__ void mean_rows(const Rows<T> &rows, int n, float (&out)[8])
{
    n = min(n, ROWS);
    if (n > 0 && rows.vectors && divides_exactly<ROWS>(n)) {
        vector_sum<T, ROWS>(rows, 0, n, out);
        divide(out, n);
    } else if (n > 0) {
#pragma unroll
        for (int d = 0; d < 8; d++) out[d] = plain_mean(rows.at + d, rows.stride, ROWS, n);
    } else {
        clear(out);
    }
}

}  // namespace lf
