/* The log-sum-exp of a key block's four logits (scores mass, lse), from products in any scale. */
#pragma once

#include "ptx.cuh"
#include <cfloat>

namespace lf {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* Where a logit is NaN, infinite or large: NaN counts as absent and sets bit 0, infinities as the
 * largest finite float. n: tokens of each part, 0 if there is no such part. */
__device__ __forceinline__ float odd_log_sum_exp(const float (&x)[4], float4 tokens, float q_factor,
                                                 float k_factor)
{
    const float n[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
    float logit[4], most = -FLT_MAX, sum = 0.0f;
    bool any_nan = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        logit[i] = x[i] * q_factor * k_factor;
        any_nan |= isnan(logit[i]) && n[i] > 0.0f;
        if (!isnan(logit[i]) && n[i] > 0.0f) {
            logit[i] = fminf(fmaxf(logit[i], -FLT_MAX), FLT_MAX);
            most = fmaxf(most, logit[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!isnan(logit[i]) && n[i] > 0.0f)
            sum += n[i] * ex2_approx_ftz((logit[i] - most) * LOG2_E);
    if (sum > 0.0f) most += LN_2 * lg2_approx_ftz(sum);
    return __uint_as_float((__float_as_uint(most) & ~1u) | uint32_t(any_nan));
}

/* log sum_i n_i exp(factor (x_i - offset)), bit 0 clear; *odd is set where odd_log_sum_exp() must
 * be asked instead: the caller does so in one branch for many, as a branch a sum would keep their
 * chains of exponentials from running side by side. */
__device__ __forceinline__ float log_sum_exp(const float (&x)[4], float4 n, float factor,
                                             float offset, bool *odd)
{
    const float factor2 = factor * LOG2_E;
    const float largest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    const float most2 = largest * factor2;
    float sum = n.x * ex2_approx_ftz(fmaf(x[0], factor2, -most2));
    sum = fmaf(n.y, ex2_approx_ftz(fmaf(x[1], factor2, -most2)), sum);
    sum = fmaf(n.z, ex2_approx_ftz(fmaf(x[2], factor2, -most2)), sum);
    sum = fmaf(n.w, ex2_approx_ftz(fmaf(x[3], factor2, -most2)), sum);
    // A large maximum is rounded by more than exp2's argument can bear; a NaN reaches the sum.
    *odd = !(fabsf(most2) < 0x1p20f) || isnan(sum);
    const float result = fmaf(LN_2, lg2_approx_ftz(sum), (largest - offset) * factor);
    return __uint_as_float(__float_as_uint(result) & ~1u);
}

}  // namespace lf
