// As much of the CUDA runtime as csrc/launch.h calls, for two devices that are not there: every call is a line on
// stdout.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace fake {
inline std::string failing;  // the call, as it is printed, that fails
inline int device = 0;
inline thread_local cudaError_t last = cudaSuccess;

template <typename... Numbers>
cudaError_t call(const char* format, Numbers... numbers) {
    char line[200];
    snprintf(line, sizeof line, format, numbers...);
    puts(line);
    if (failing.empty() || std::string(line).find(failing) == std::string::npos) return cudaSuccess;
    return last = cudaErrorUnknown;
}
}  // namespace fake

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = fake::last;
    fake::last = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "the driver's reason"; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = fake::device;
    return fake::call("device");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const bool is_count = attribute == cudaDevAttrMultiProcessorCount;
    *value = is_count ? 100 : 232448;
    return fake::call(is_count ? "multiprocessors of %d" : "shared bytes of %d", device);
}
template <typename... Parameters>
char name_of(void (*kernel)(Parameters...)) {
    char name = 0;
    kernel(name);
    return name;
}
inline char name_of(const void* kernel) { return name_of(reinterpret_cast<void (*)(char&)>(kernel)); }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    attributes->sharedSizeBytes = 448;
    return fake::call("attributes of %c", name_of(kernel));
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    const bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    const char* const format = is_size ? "dynamic bytes of %c on %d: %d" : "carve-out of %c on %d: %d";
    return fake::call(format, name_of(kernel), fake::device, value);
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&...) {
    const char name = name_of(reinterpret_cast<const void*>(kernel));
    return fake::call("launch of %c with %d bytes", name, static_cast<int>(config->dynamicSmemBytes));
}
