// The tensors that the tests hand to a kernel.
#pragma once

#include "kernels.h"

namespace gpsa::emulator {

/// The tensors of a launch, known to the machine by name and by their first byte.
class Memory {
public:
    Memory(Machine& machine, const Arguments& arguments) : arguments(arguments) {
        for (const auto& [name, argument] : arguments) {
            auto& region = machine.regions[argument.data];
            if (!region) region = std::make_shared<Region>(name, argument.output ? Use::output : Use::input);
            region->add(argument.data, argument.element, argument.sizes, argument.strides);
        }
    }

    Tensor tensor(const std::string& name) const {
        const auto found = arguments.find(name);
        if (found == arguments.end()) return {};
        const auto& strides = found->second.strides;
        return {reinterpret_cast<void*>(found->second.data), strides[0], strides[1], strides[2]};
    }

    template <typename T>
    T* find(const std::string& name) const {
        const auto found = arguments.find(name);
        return found == arguments.end() ? nullptr : reinterpret_cast<T*>(found->second.data);
    }
    float* floats(const std::string& name) const { return find<float>(name); }

private:
    const Arguments& arguments;
};

}  // namespace gpsa::emulator
