// The host's side of csrc/launch.h: kernels run on an emulated machine, whose address stands in the stream's place.
#pragma once

#include <type_traits>
#include <typeinfo>

#include "emulator.h"
#include "primitives.h"

namespace gpsa {
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

    template <typename Kernel>
    const char* operator()(Kernel, const Shape& shape, const typename Kernel::Call& call) const {
        const unsigned x = shape.blocks, y = shape.blocks_y;
        const int threads = shape.threads, bytes = shape.shared_bytes;
        if (x < 1 || shape.blocks > 0x7fffffff || y < 1 || y > 65535 || threads < 1 || threads > 1024 ||
            bytes > device.shared_bytes) {
            return "invalid argument";
        }
        machine.launches.push_back({typeid(Kernel).name(), x, y, threads, bytes});
        if (machine.options.only_recorded) return nullptr;
        if constexpr (emulator::has_kernel<Kernel>) {
            machine.launch(x, y, threads, bytes, [&] { Kernel::run(call); });
            return nullptr;
        } else {
            return "this build has one kernel of each kind";
        }
    }

private:
    emulator::Machine& machine;
};

}  // namespace gpsa
