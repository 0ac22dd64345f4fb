/* Float32 vectors as sums of a float16 and an 8-bit part, for products on the tensor cores.
 *
 * A vector x is scaled by a power of two so that its largest element is in [1, 2). Then
 *     x = hi + lo,  hi = float16(x),  lo8 = round(lo * LO),  hi8 = round(hi * HI)
 *     <x, y> = <hi_x, hi_y> + (<hi8_x, lo8_y> + <lo8_x, hi8_y>) / (HI LO) + error:
 * one float16 product with float32 sums and two 8-bit products with exact integer sums, at twice
 * its rate each: 2/3 of the time of three float16 products. Every element of lo8 and hi8 is off
 * by at most 1/2, which leaves about 2^-21 |x||y| of error (root mean square; 18 bits at worst).
 *
 * The order of d is free as long as both sides agree: lane 4 g + t of a warp holds, of row g,
 * the elements 32 i + 8 t .. + 7, i = 0, 1 ..., as the operands of k-step i. */
#pragma once

#include "launch.cuh"

namespace lf {

constexpr float SPLIT_HI = 63.0f, SPLIT_LO = 127.0f * 2048.0f;
constexpr float SPLIT_CROSS = 1.0f / (SPLIT_HI * SPLIT_LO);

// Sums of 8-bit products stay within 2^22: added to these bits they are the float 1.5 2^23 + sum,
// so no conversion is needed. SPLIT_START takes the constant off beforehand.
constexpr int SPLIT_BITS = 0x4B400000;
constexpr float SPLIT_START = -12582912.0f * SPLIT_CROSS;

struct SplitOctet {
    uint32_t hi[4], lo8[2];
};

/* The exponent e for a largest magnitude; 2^-e scales, 2^e is the factor that undoes it. The
 * bounds keep both finite, and the largest finite float within float16. */
__device__ __forceinline__ int split_exponent(float largest)
{
    const int e = int(__float_as_uint(largest) >> 23) - 127;
    return min(max(e, -100), 113);
}

__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float((e + 127) << 23); }

/* Four integers in the low bytes as one register. */
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ SplitOctet split(const float (&x)[8], float scale)
{
    SplitOctet s;
    uint32_t low[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = x[2 * i] * scale, b = x[2 * i + 1] * scale;
        s.hi[i] = pack2<__half>(a, b);
        const float2 hi = __half22float2(*reinterpret_cast<const __half2 *>(&s.hi[i]));
        low[2 * i] = __float_as_uint(fmaf(a - hi.x, SPLIT_LO, 12582912.0f));
        low[2 * i + 1] = __float_as_uint(fmaf(b - hi.y, SPLIT_LO, 12582912.0f));
    }
    s.lo8[0] = pack_bytes(low[0], low[1], low[2], low[3]);
    s.lo8[1] = pack_bytes(low[4], low[5], low[6], low[7]);
    return s;
}

/* hi8 of four elements: 1536 + hi * HI has the integer in its low byte. */
__device__ __forceinline__ uint32_t split_hi8(uint32_t hi01, uint32_t hi23)
{
    const __half2 scale = __float2half2_rn(SPLIT_HI), shift = __float2half2_rn(1536.0f);
    const __half2 a = __hfma2(*reinterpret_cast<const __half2 *>(&hi01), scale, shift);
    const __half2 b = __hfma2(*reinterpret_cast<const __half2 *>(&hi23), scale, shift);
    return __byte_perm(*reinterpret_cast<const uint32_t *>(&a),
                       *reinterpret_cast<const uint32_t *>(&b), 0x6420);
}

/* A tile is 8 rows, first hi as [D / 32][32 lanes] of 16 bytes, then lo8 as [D / 64][32 lanes] of
 * 16 bytes (two k-steps together). Here in units of 16 bytes. */
template <int DIM> constexpr int SPLIT_TILE = DIM * 24 / 16;
template <int DIM> constexpr int SPLIT_LO_AT = DIM * 16 / 16;

}  // namespace lf
