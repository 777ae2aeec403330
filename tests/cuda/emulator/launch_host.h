// The host's side of csrc/launch.h: launches are carried out by the emulator, or written down where a Record stands in
// the stream's place.
#pragma once

#include <cxxabi.h>

#include <type_traits>
#include <typeinfo>

#include "emulator.h"
#include "primitives.h"

namespace gpsa {
namespace emulator {

/// What a launcher asked for.
struct Launch {
    const char* kernel;  // "TiledForward", without namespace and parameters
    int grid_x, grid_y, threads, shared_bytes;
};
using Record = std::vector<Launch>;

/// Whether this build has a kernel.
template <typename Kernel, typename = void>
constexpr bool has_kernel = true;

#ifdef GPSA_ONE_KERNEL  // one of each kind, which the planted bugs are compiled for, in a fraction of the time
template <typename Kernel, typename = void>
constexpr bool has_few_keys = true;
template <typename Kernel>
constexpr bool has_few_keys<Kernel, std::void_t<decltype(Kernel::key_tiles)>> = Kernel::key_tiles == 4;
template <typename Kernel>
constexpr bool has_kernel<Kernel, std::void_t<typename Kernel::E>> =
    std::is_same_v<typename Kernel::E, Half> && Kernel::channels == 48 && has_few_keys<Kernel>;
#endif

template <typename Kernel>
const char* name_of() {
    static const std::string name = [] {
        char* const demangled = abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, nullptr);
        const std::string full = demangled;
        std::free(demangled);
        return full.substr(std::strlen("gpsa::"), full.find('<') - std::strlen("gpsa::"));
    }();
    return name.c_str();
}

}  // namespace emulator

inline const char* find_device(int, Device& device) {
    device = {emulator::settings.multiprocessors, emulator::settings.shared_bytes};
    return nullptr;
}

class Launcher {
public:
    Device device{};
    const char* error = nullptr;

    explicit Launcher(cudaStream_t stream) : record(reinterpret_cast<emulator::Record*>(stream)) {
        find_device(0, device);
    }

    template <typename Kernel>
    const char* operator()(Kernel, const Shape& shape, const typename Kernel::Call& call) const {
        const auto [blocks, threads, shared_bytes, blocks_y] = shape;
        if (blocks < 1 || blocks > 0x7fffffff || blocks_y < 1 || blocks_y > 65535 || threads < 1 || threads > 1024 ||
            shared_bytes > device.shared_bytes) {
            return "invalid argument";
        }
        if (record) {
            record->push_back({emulator::name_of<Kernel>(), int(blocks), blocks_y, threads, shared_bytes});
            return nullptr;
        }
        if constexpr (emulator::has_kernel<Kernel>) {
            emulator::launch(int(blocks), blocks_y, threads, shared_bytes, [&] { Kernel::run(call); });
            return nullptr;
        } else {
            return "this build has one kernel of each kind";
        }
    }

private:
    emulator::Record* const record;
};

}  // namespace gpsa
