// The launches of the tiled kernels on an emulated machine.
#pragma once

#include "memory.h"
#include "tiled.h"

namespace gpsa::emulator {

/// A workspace as the kernels ask for it, its arrays known to the machine one by one.
class Scratch {
public:
    Scratch(Machine& machine, const tiled::Workspace& workspace) : bytes(workspace.bytes + 256, '\xff') {
        for (int i = 0; i < workspace.count; ++i) {
            auto& region = machine.regions[reinterpret_cast<uintptr_t>(data() + workspace.begin[i])];
            region = std::make_shared<Region>("workspace array " + std::to_string(i), Use::workspace);
            region->add(reinterpret_cast<uintptr_t>(data() + workspace.begin[i]), 2, {workspace.size[i] / 2}, {1});
        }
    }
    char* data() { return bytes.data() + (256 - reinterpret_cast<uintptr_t>(bytes.data()) % 256) % 256; }

private:
    std::vector<char> bytes;
};

template <typename Visit>
void dispatch_tiled(const Problem& problem, Visit visit) {
#ifdef GPSA_ONE_KERNEL  // what the planted bugs are compiled for, in a fraction of the time
    static_cast<void>(problem);
    visit(Tiled<Half, 48>{});
#else
    tiled::dispatch(problem, visit);
#endif
}

/// Launches on a machine what TiledLauncher launches on a GPU.
inline auto launcher(Machine& machine) {
    return [&machine](auto kernel, const auto& call) -> const char* {
        using Kernel = decltype(kernel);
        const int blocks = static_cast<int>(Kernel::blocks(call));
        machine.launch(blocks, 1, tiled_threads, Kernel::shared_bytes(), [&] { Kernel::run(call); });
        return nullptr;
    };
}

}  // namespace gpsa::emulator
