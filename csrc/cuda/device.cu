/* What the CUDA half of this build is and what it finds: chips embedded, driver, runtime, devices.
 *
 * runtime_probe_kernel exists so that the build path (nvcc, static runtime, link, import without a
 * GPU) is exercised by every build; lf_cuda_versions() asks for its attributes, which fails with a
 * plain status where there is no driver or no code for the chip. */
#include "kernels.h"
#include "launch.cuh"

namespace {

__global__ void runtime_probe_kernel(int *out) { *out = int(blockIdx.x); }

}  // namespace

extern "C" int lf_cuda_built(void) { return 1; }

extern "C" const char *lf_cuda_archs(void) { return LF_CUDA_ARCHS; }

/* 0, or the cudaError_t of the first question that failed (35: no driver, or one too old). */
extern "C" int lf_cuda_versions(int *driver, int *runtime, int *devices)
{
    *driver = *runtime = *devices = 0;
    cudaError_t status = cudaRuntimeGetVersion(runtime);
    if (status == cudaSuccess) status = cudaDriverGetVersion(driver);
    if (status == cudaSuccess) status = cudaGetDeviceCount(devices);
    if (status == cudaSuccess && *devices > 0) {
        cudaFuncAttributes attributes;
        status = cudaFuncGetAttributes(&attributes, runtime_probe_kernel);
    }
    if (status != cudaSuccess) (void)cudaGetLastError();
    return int(status);
}

extern "C" uint64_t lf_cuda_capture(lf_place place)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;

    // The legacy stream answers with an error while another one is captured: it is not itself.
    if (cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(place.stream), &status, &id, nullptr,
                                 nullptr, nullptr, nullptr) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return status == cudaStreamCaptureStatusNone ? 0 : id;
}

extern "C" int lf_cuda_warmup(int device, lf_error *err)
{
    int major = 0, minor = 0;

    LF_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    LF_CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    const lf::DeviceGuard guard(device);
    if (lf_compress_warmup(err) < 0 || lf_select_warmup(err) < 0 ||
        lf_attend_portable_warmup(err) < 0)
        return -1;
    return major == 9 && minor == 0 ? lf_attend_sm90_warmup(err) : 0;
}
