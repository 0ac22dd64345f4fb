/* Private to csrc/cpu: float32 means of consecutive rows, shared by compress.c and select.c. */
#ifndef LF_CPU_MEANS_H
#define LF_CPU_MEANS_H

#include "../lightforcing.h"

enum { LF_MAX_DIM = 256 };

/* Mean of rows [0, n), n >= 1, at `rows` (token stride in elements) into out[dim]. The rows are cut
 * into parts of `part` rows (the last one short), each part's mean is found the same way with parts
 * a quarter as long, and the mean is the token-weighted sum of the parts' means, in ascending
 * order, divided by n. So a block's mean is bit-equal to the one that its quarter blocks' means
 * give, whoever computed those. */
void lf_mean_rows(const void *rows, lf_dtype dtype, int64_t token_stride, int64_t n, int64_t part,
                  int64_t dim, float *out);

#endif
