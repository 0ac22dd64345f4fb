/* What the CUDA half of this build is and finds: chips embedded, driver, runtime, devices. */
#include "kernels.h"
#include "launch.cuh"

extern "C" int lf_cuda_built(void) { return 1; }

extern "C" const char *lf_cuda_archs(void) { return LF_CUDA_ARCHS; }

/* 0, or the cudaError_t of the first question that failed (35: no driver, or one too old; 209: the
 * first device is older than any code in this build). Asks the driver only: no context is made. */
extern "C" int lf_cuda_versions(int *driver, int *runtime, int *devices)
{
    *driver = *runtime = *devices = 0;
    cudaError_t status = cudaRuntimeGetVersion(runtime);
    if (status == cudaSuccess) status = cudaDriverGetVersion(driver);
    if (status == cudaSuccess) status = cudaGetDeviceCount(devices);
    if (status == cudaSuccess && *devices > 0) {
        int major = 0;
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
        if (status == cudaSuccess && major < 8) status = cudaErrorNoKernelImageForDevice;
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
