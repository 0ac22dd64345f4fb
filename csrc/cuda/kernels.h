/* Private to csrc/cuda: what every kernel file offers to lf_cuda_warmup().
 *
 * Each loads its kernels on the current device and sets their attributes there, and returns 0,
 * or -1 with `err` filled. Afterwards no launch does either, so all may be captured in a graph. */
#pragma once

#include "../lightforcing.h"

#ifdef __cplusplus
extern "C" {
#endif

int lf_attend_portable_warmup(lf_error *err);
int lf_attend_sm90_warmup(lf_error *err);
int lf_compress_warmup(lf_error *err);
int lf_select_warmup(lf_error *err);
int lf_select_sm90_warmup(lf_error *err);

/* 1 while lf_cuda_force_kernel() or LIGHTFORCING_KERNEL asks for the portable kernels. */
int lf_cuda_portable_only(void);

#ifdef __cplusplus
}
#endif
