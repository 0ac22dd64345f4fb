/* Stands in for csrc/cuda where there is no nvcc. */
#include "../lightforcing.h"

int lf_cuda_built(void) { return 0; }

const char *lf_cuda_archs(void) { return ""; }

int lf_cuda_versions(int *driver, int *runtime, int *devices)
{
    *driver = *runtime = *devices = 0;
    return 0;
}
