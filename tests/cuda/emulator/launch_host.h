// The host's side of csrc/launch.h: kernels run on an emulated machine, whose address stands in the stream's place.
#pragma once

#include <type_traits>
#include <typeinfo>

#include "emulator.h"
#include "primitives.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace gpsa {

struct dim3 {
    unsigned x, y;
    explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};

namespace emulator {

inline Device device{132, 227 * 1024};  // what every query answers: an H100's

/// Whether this build has a kernel.
template <typename Kernel, typename = void>
constexpr bool has_kernel = true;

#ifdef GPSA_ONE_KERNEL  // one of each kind, which the planted bugs are compiled for, in a fraction of the time
template <typename Kernel>
constexpr bool is_smallest(decltype(Kernel::key_tiles)*) {
    return Kernel::key_tiles == 4;
}
template <typename Kernel>
constexpr bool is_smallest(...) {
    return true;
}
template <typename Kernel>
constexpr bool has_kernel<Kernel, std::void_t<typename Kernel::E>> =
    std::is_same_v<typename Kernel::E, Half> && Kernel::channels == 48 && is_smallest<Kernel>(nullptr);
#endif

}  // namespace emulator

inline const char* find_device(int, Device& device) {
    device = emulator::device;
    return nullptr;
}

class Launcher {
public:
    Device device = emulator::device;
    const char* error = nullptr;

    explicit Launcher(cudaStream_t stream) : machine(*reinterpret_cast<emulator::Machine*>(stream)) {}

    template <typename Kernel, typename Entry, typename... Arguments>
    const char* operator()(
        Kernel kernel, Entry entry, dim3 grid, int threads, int shared_bytes, const Arguments&... arguments) const {
        if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || threads < 1 || threads > 1024 ||
            shared_bytes > device.shared_bytes) {
            return "invalid argument";
        }
        machine.launches.push_back({typeid(Kernel).name(), grid.x, grid.y, threads, shared_bytes});
        if (machine.options.only_recorded) return nullptr;
        if constexpr (emulator::has_kernel<Kernel>) {
            machine.launch(grid.x, grid.y, threads, shared_bytes, [&] { entry(kernel)(arguments...); });
            return nullptr;
        } else {
            return "this build has one kernel of each kind";
        }
    }

private:
    emulator::Machine& machine;
};

}  // namespace gpsa
