// csrc/launch.h, its CUDA side, on a runtime that only writes calls down: test_launcher.py reads them.
// `launcher [call that fails]`
#define __CUDACC__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#include "launch.h"

#include <thread>
#include <vector>

static void kernel_a(char& name) { name = 'a'; }
static void kernel_b(char& name) { name = 'b'; }

template <typename Function>
static void launch(Function* function, int shared_bytes) {
    const gpsa::Launcher launch(nullptr);
    char name = 0;
    const char* error = launch.error;
    if (!error) error = launch.start(function, {7, 128, shared_bytes}, name);
    if (error) printf("error: %s\n", error);
    if (cudaGetLastError() != cudaSuccess) puts("an error is left behind");
}

int main(int count, char** arguments) {
    if (count > 1) fake::failing = arguments[1];
    for (fake::device = 0; fake::device < 2; ++fake::device) {
        std::vector<std::thread> threads;
        for (int bytes : {50000, 1000}) threads.emplace_back([=] { launch(kernel_a, bytes); });
        for (auto& thread : threads) thread.join();
        launch(kernel_b, 0);
    }
    fake::failing.clear();  // what failed is tried again
    fake::device = 0;
    launch(kernel_a, 3000);
}
