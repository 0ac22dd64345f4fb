/* Stands in for csrc/cuda where there is no nvcc. */
#include "../lightforcing.h"

int lf_cuda_built(void) { return 0; }

const char *lf_cuda_archs(void) { return ""; }

static int absent(lf_error *err)
{
    return lf_fail(err, LF_UNSUPPORTED, "this build has no CUDA half");
}

int lf_compress_cuda(const lf_compress_params *p, lf_place place, lf_error *err)
{
    (void)p, (void)place;
    return absent(err);
}

int64_t lf_select_cuda_workspace(const lf_select_params *p)
{
    (void)p;
    return 0;
}

int lf_select_cuda(const lf_select_params *p, void *workspace, lf_place place, lf_error *err)
{
    (void)p, (void)workspace, (void)place;
    return absent(err);
}

int64_t lf_attend_cuda_workspace(const lf_attend_params *p, int device)
{
    (void)p, (void)device;
    return 0;
}

int lf_attend_cuda(const lf_attend_params *p, void *workspace, lf_place place, lf_error *err)
{
    (void)p, (void)workspace, (void)place;
    return absent(err);
}

int lf_attend_sm90_can_run(const lf_attend_params *p, int device, lf_error *err)
{
    (void)p, (void)device;
    absent(err);
    return 0;
}

uint64_t lf_cuda_capture(lf_place place)
{
    (void)place;
    return 0;
}

int lf_cuda_warmup(int device, lf_error *err)
{
    (void)device;
    return absent(err);
}

int lf_cuda_force_kernel(const char *name)
{
    (void)name;
    return -1;
}

int lf_cuda_versions(int *driver, int *runtime, int *devices)
{
    *driver = *runtime = *devices = 0;
    return 0;
}
