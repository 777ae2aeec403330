// A fiber: a function with a stack of its own, entered and left by hand.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#if defined(__x86_64__)
/// Saves the callee's registers on this stack and its pointer in *from, and goes on with the stack `to`.
extern "C" void gpsa_switch_stack(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace gpsa::emulator {

class Fiber {
public:
    static constexpr size_t stack_bytes = 256 * 1024;

    /// The fiber of whoever constructs it.
    Fiber() = default;
    Fiber(const Fiber&) = delete;

    /// Makes this fiber run `entry` from its start when next switched to. `entry` must not return.
    void prepare(void (*entry)()) {
        if (!stack) stack.reset(new char[stack_bytes]);
#if defined(__x86_64__)
        auto** top = reinterpret_cast<void**>(stack.get() + stack_bytes);
        *--top = nullptr;  // where the entry would return to; leaves the stack aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        pointer = top;
#else
        getcontext(&context);
        context.uc_stack = {stack.get(), 0, stack_bytes};
        makecontext(&context, entry, 0);
#endif
    }

    void switch_to(Fiber& next) {
        const bool has_stack = next.stack != nullptr;
        __sanitizer_start_switch_fiber(
            &shadow, has_stack ? next.stack.get() : next.foreign_bottom, has_stack ? stack_bytes : next.foreign_bytes);
#if defined(__x86_64__)
        gpsa_switch_stack(&pointer, next.pointer);
#else
        swapcontext(&context, &next.context);
#endif
        __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
    }

    /// To be called first in an entry, with the fiber that switched to it.
    static void entered(Fiber& from) {
        __sanitizer_finish_switch_fiber(nullptr, &from.foreign_bottom, &from.foreign_bytes);
    }

private:
    std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
    void* pointer = nullptr;
#else
    ucontext_t context;
#endif
    void* shadow = nullptr;  // these three: what AddressSanitizer wants to know
    const void* foreign_bottom = nullptr;
    size_t foreign_bytes = 0;
};

}  // namespace gpsa::emulator
