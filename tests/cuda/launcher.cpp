// csrc/launch.h, its CUDA side, on as much of the CUDA runtime as it calls, for two devices that are not there: every
// call is a line on stdout, which test_launcher.py reads. `launcher [call that fails]`
#include <cstdio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct dim3 {
    unsigned x, y, z = 1;
    dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

static std::string failing;  // the call, as it is printed, that fails
static int current_device = 0;
static thread_local cudaError_t last = cudaSuccess;

template <typename... Numbers>
cudaError_t called(const char* format, Numbers... numbers) {
    char line[200];
    snprintf(line, sizeof line, format, numbers...);
    puts(line);
    if (failing.empty() || std::string(line).find(failing) == std::string::npos) return cudaSuccess;
    return last = cudaErrorUnknown;
}

static char name_of(const void* kernel) {
    char name = 0;
    reinterpret_cast<void (*)(char&)>(const_cast<void*>(kernel))(name);
    return name;
}

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "the driver's reason"; }
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return called("device");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const bool is_count = attribute == cudaDevAttrMultiProcessorCount;
    *value = is_count ? 100 : 232448;
    return called(is_count ? "multiprocessors of %d" : "shared bytes of %d", device);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    attributes->sharedSizeBytes = 448;
    return called("attributes of %c", name_of(kernel));
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    const bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    const char* const format = is_size ? "dynamic bytes of %c on %d: %d" : "carve-out of %c on %d: %d";
    return called(format, name_of(kernel), current_device, value);
}
template <typename Kernel, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel* kernel, const Arguments&...) {
    const char name = name_of(reinterpret_cast<const void*>(kernel));
    return called("launch of %c with %d bytes", name, static_cast<int>(config->dynamicSmemBytes));
}

#define __CUDACC__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#include "launch.h"

static void kernel_a(char& name) { name = 'a'; }
static void kernel_b(char& name) { name = 'b'; }

template <typename Function>
static void launch(Function* function, int shared_bytes) {
    const gpsa::Launcher launch(nullptr);
    const char* error = launch.error;
    if (!error) error = launch.start(function, {7, 128, shared_bytes}, 0);
    if (error) printf("error: %s\n", error);
    if (cudaGetLastError() != cudaSuccess) puts("an error is left behind");
}

int main(int count, char** arguments) {
    if (count > 1) failing = arguments[1];
    for (current_device = 0; current_device < 2; ++current_device) {
        std::vector<std::thread> threads;
        for (int bytes : {50000, 1000}) threads.emplace_back([=] { launch(kernel_a, bytes); });
        for (auto& thread : threads) thread.join();
        launch(kernel_b, 0);
    }
    failing.clear();  // what failed is tried again
    current_device = 0;
    launch(kernel_a, 3000);
}
