/* Private to csrc/cpu: the products and exponentials behind the block scores. */
#ifndef LF_CPU_LOGITS_H
#define LF_CPU_LOGITS_H

#include <stdint.h>

enum { LF_PANEL = 16 };  // keys of a panel: panels[j / 16][d][j % 16]

/* out[i * stride + j] = sum over d of q[i * dim + d] * panels[j / 16][d][j % 16], one fused
 * multiply-add after the other in ascending d from 0: the same bits on every processor.
 * `stride` is a multiple of LF_PANEL and at least the number of keys. */
void lf_logits(const float *q, int64_t rows, const float *panels, int64_t keys, int64_t dim,
               float *out, int64_t stride);

/* x[j] = exp(x[j] - shift) for x[j] <= shift, and 0 below exp(-87): the same bits everywhere. */
void lf_exp_shifted(float *x, int64_t n, float shift);

#endif
