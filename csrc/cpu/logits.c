/* The products and exponentials behind the block scores, alike to the bit on every processor.
 *
 * Each logit is one chain of fused multiply-adds over d, so the width of a vector (which runs
 * over keys) cannot change it. The plain loops are the definition; the AVX2 versions are the same
 * operations, 8 keys at once. */
#include "logits.h"
#include "isa.h"
#include <math.h>
#include <string.h>

static void panel_scalar(const float *q, int64_t rows, const float *panel, int64_t dim, float *out,
                         int64_t stride)
{
    for (int64_t i = 0; i < rows; i++) {
        float sum[LF_PANEL] = {0};
        for (int64_t d = 0; d < dim; d++)
            for (int j = 0; j < LF_PANEL; j++)
                sum[j] = fmaf(q[i * dim + d], panel[d * LF_PANEL + j], sum[j]);
        memcpy(out + i * stride, sum, sizeof sum);
    }
}

/* exp by 2^n * 2^f, |f| <= 1/2, with a degree 6 polynomial: relative error under 2e-7. */
static inline __attribute__((always_inline)) float exp_negative(float x)
{
    const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const float t = fmaf(x, 0x1.715476p0f, round);
    const float n = t - round;
    float r = fmaf(n, -0x1.62e400p-1f, x), y;  // x - n log 2, log 2 in two parts
    uint32_t bits;

    r = fmaf(n, -0x1.7f7d1cp-20f, r);
    y = fmaf(r, 0x1.6c16c2p-10f, 0x1.111112p-7f);
    y = fmaf(y, r, 0x1.555556p-5f);
    y = fmaf(y, r, 0x1.555556p-3f);
    y = fmaf(y, r, 0.5f);
    y = fmaf(y, r, 1.0f);
    y = fmaf(y, r, 1.0f);
    memcpy(&bits, &t, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // 2^n; the shift drops what `round` put above
    float power;
    memcpy(&power, &bits, sizeof power);
    return x >= -87.0f ? y * power : 0.0f;
}

static void exp_scalar(float *x, int64_t n, float shift)
{
    for (int64_t j = 0; j < n; j++) x[j] = exp_negative(x[j] - shift);
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Four rows by one panel: 8 accumulators cover the 4-cycle latency of two FMA ports. */
__attribute__((target("avx2,fma"))) static void panel_avx2(const float *q, int64_t rows,
                                                           const float *panel, int64_t dim,
                                                           float *out, int64_t stride)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float *row = q + i * dim;
        __m256 s0[4], s1[4];
        for (int r = 0; r < 4; r++) s0[r] = s1[r] = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d++) {
            const __m256 k0 = _mm256_loadu_ps(panel + d * LF_PANEL);
            const __m256 k1 = _mm256_loadu_ps(panel + d * LF_PANEL + 8);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const __m256 x = _mm256_broadcast_ss(row + r * dim + d);
                s0[r] = _mm256_fmadd_ps(x, k0, s0[r]);
                s1[r] = _mm256_fmadd_ps(x, k1, s1[r]);
            }
        }
        for (int r = 0; r < 4; r++) {
            _mm256_storeu_ps(out + (i + r) * stride, s0[r]);
            _mm256_storeu_ps(out + (i + r) * stride + 8, s1[r]);
        }
    }
    for (; i < rows; i++) {
        __m256 s0 = _mm256_setzero_ps(), s1 = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d++) {
            const __m256 x = _mm256_broadcast_ss(q + i * dim + d);
            s0 = _mm256_fmadd_ps(x, _mm256_loadu_ps(panel + d * LF_PANEL), s0);
            s1 = _mm256_fmadd_ps(x, _mm256_loadu_ps(panel + d * LF_PANEL + 8), s1);
        }
        _mm256_storeu_ps(out + i * stride, s0);
        _mm256_storeu_ps(out + i * stride + 8, s1);
    }
}

__attribute__((target("avx2,fma"))) static void exp_avx2(float *x, int64_t n, float shift)
{
    for (int64_t j = 0; j < n; j++) x[j] = exp_negative(x[j] - shift);
}
#endif

void lf_logits(const float *q, int64_t rows, const float *panels, int64_t keys, int64_t dim,
               float *out, int64_t stride)
{
    void (*panel)(const float *, int64_t, const float *, int64_t, float *, int64_t) = panel_scalar;
#if defined(__x86_64__)
    if (lf_isa_active() >= LF_ISA_AVX2) panel = panel_avx2;
#endif
    for (int64_t j = 0; j < keys; j += LF_PANEL)
        panel(q, rows, panels + j * dim, dim, out + j, stride);
}

void lf_exp_shifted(float *x, int64_t n, float shift)
{
#if defined(__x86_64__)
    if (lf_isa_active() >= LF_ISA_AVX2) {
        exp_avx2(x, n, shift);
        return;
    }
#endif
    exp_scalar(x, n, shift);
}
