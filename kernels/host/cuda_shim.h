// Runs CUDA kernels on the host, slowly: for tests on machines without a device. The same source as for the device is
// compiled as C++ behind this header and kernels/cuda.h.
//
// Blocks run one after the other. The threads of a block are fibers that take turns: one runs until it comes to a
// barrier of its block, or to an exchange among its warp, and waits there for the others. So a barrier that some
// threads do not reach is found, and reported, instead of hanging. Memory is the host's. A fiber is made once and goes
// through the blocks of all launches; its turns pass by _longjmp, which asks nothing of the system.
#pragma once
#define MOSS_SHIM 1

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

struct Exchange {  // of a warp: what each lane shows the others
    unsigned words[WARP][8];
};

struct Meeting {  // of a warp or a block
    int expected = 0, here = 0;
    long turn = 0;
};

struct Fiber {
    ucontext_t context;  // of its first turn
    jmp_buf turn;
    bool has_begun = false;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Dim3 thread;
    int lane = 0, warp = 0;
    bool is_over = false;
};

struct State {
    jmp_buf scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Meeting> warps;
    std::vector<Exchange> exchanges;
    Meeting block;
    Fiber* current = nullptr;
    long progress = 0;
    std::function<void()> body;
    Dim3 block_index, block_size, grid_size;
    const char* kernel = "";
};

inline State& state() {
    static State one;
    return one;
}

inline void yield() {
    if (_setjmp(state().current->turn) == 0) _longjmp(state().scheduler, 1);
}

inline void meet(Meeting& at) {
    const long turn = at.turn;
    state().progress++;
    if (++at.here == at.expected) {
        at.here = 0;
        at.turn++;
    }
    while (at.turn == turn) yield();
}

inline void leave(Meeting& at) {  // a thread that has ended no longer comes
    if (--at.expected > 0 && at.here == at.expected) {
        at.here = 0;
        at.turn++;
    }
}

inline void run_fiber() {
    State& s = state();
    while (true) {
        s.body();
        s.current->is_over = true;
        s.progress++;
        leave(s.warps[s.current->warp]);
        leave(s.block);
        yield();  // until there is another block
    }
}

inline void resume(Fiber& fiber) {
    State& s = state();
    s.current = &fiber;
    if (_setjmp(s.scheduler) != 0) return;
    if (fiber.has_begun) _longjmp(fiber.turn, 1);
    fiber.has_begun = true;
    setcontext(&fiber.context);
}

inline std::unique_ptr<Fiber> new_fiber() {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_fiber, 0);
    return fiber;
}

inline void run_block() {
    State& s = state();
    const int threads = (int)(s.block_size.x * s.block_size.y * s.block_size.z), warps = (threads + WARP - 1) / WARP;
    while ((int)s.fibers.size() < threads) s.fibers.push_back(new_fiber());
    s.warps.assign(warps, Meeting{});
    s.exchanges.resize(warps);
    s.block = Meeting{};
    s.block.expected = threads;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = *s.fibers[i];
        fiber.thread = {(unsigned)i % s.block_size.x, (unsigned)i / s.block_size.x % s.block_size.y,
                        (unsigned)i / s.block_size.x / s.block_size.y};
        fiber.lane = i % WARP;
        fiber.warp = i / WARP;
        fiber.is_over = false;
        s.warps[fiber.warp].expected++;
    }
    for (int left = threads; left > 0;) {
        const long before = s.progress;
        left = 0;
        for (int i = 0; i < threads; i++) {
            if (s.fibers[i]->is_over) continue;
            resume(*s.fibers[i]);
            left += !s.fibers[i]->is_over;
        }
        if (left > 0 && s.progress == before) {
            fprintf(stderr, "%s: %d threads wait for others that never come\n", s.kernel, left);
            abort();
        }
    }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}

// As cuLaunchKernel: each argument by its address.
template <class... A>
void launch(const char* name, void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** arguments) {
    State& s = state();
    s.kernel = name;
    s.grid_size = {grid[0], grid[1], grid[2]};
    s.block_size = {block[0], block[1], block[2]};
    s.body = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                s.block_index = {x, y, z};
                run_block();
            }
}

// Every lane shows some words, and looks at those of others before it goes on.
template <class Look>
auto exchange(const unsigned* shown, int count, const Look& look) {
    State& s = state();
    Exchange& all = s.exchanges[s.current->warp];
    std::memcpy(all.words[s.current->lane], shown, count * sizeof(unsigned));
    meet(s.warps[s.current->warp]);
    const auto seen = look(all, s.current->lane);
    meet(s.warps[s.current->warp]);
    return seen;
}

}  // namespace shim

#define threadIdx (shim::state().current->thread)
#define blockIdx (shim::state().block_index)
#define blockDim (shim::state().block_size)
#define gridDim (shim::state().grid_size)

inline void __syncthreads() { shim::meet(shim::state().block); }
inline void __syncwarp(unsigned = ~0u) { shim::meet(shim::state().warps[shim::state().current->warp]); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4, "four bytes");
    unsigned word;
    std::memcpy(&word, &value, 4);
    word = shim::exchange(&word, 1, [=](const shim::Exchange& all, int lane) { return all.words[lane ^ mask][0]; });
    std::memcpy(&value, &word, 4);
    return value;
}

inline int atomicAdd(int* sum, int value) {  // fibers take turns
    const int before = *sum;
    *sum += value;
    return before;
}
inline int __float_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float value) { return (int)std::nearbyint(value); }
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline)) inline float __fdiv_rn(float a, float b) { return a / b; }
__attribute__((noinline)) inline float __fadd_rn(float a, float b) { return a + b; }
__attribute__((noinline)) inline float __fsub_rn(float a, float b) { return a - b; }

namespace shim {

struct HalfTable {  // every half as float: products ask for them again and again
    float of[1 << 16];

    HalfTable() {
        for (int bits = 0; bits < 1 << 16; bits++) {
            const int exponent = bits >> 10 & 31, fraction = bits & 1023;
            const float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                                : exponent     ? std::ldexp((float)(1024 + fraction), exponent - 25)
                                               : std::ldexp((float)fraction, -24);
            of[bits] = bits >> 15 ? -value : value;
        }
    }
};
static const HalfTable halves;

}  // namespace shim

static inline float half_to_float(unsigned short bits) { return shim::halves.of[bits]; }

static inline unsigned short float_to_half(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);
    const float size = std::fabs(value);
    if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00u);
    if (size < 6.103515625e-05f) return (unsigned short)(sign | (unsigned)std::nearbyint(std::ldexp(size, 24)));
    const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return (unsigned short)(sign | ((rounded - 0x38000000u) >> 13));
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned picked = 0;
    for (int i = 0; i < 4; i++) picked |= (unsigned)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return picked;
}

// See kernels/cuda.h.
static inline unsigned subtract_halves(unsigned a, unsigned b) {
    unsigned difference = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float left = half_to_float((unsigned short)(a >> shift)), right = half_to_float((unsigned short)(b >> shift));
        difference |= (unsigned)float_to_half(left - right) << shift;
    }
    return difference;
}

static inline unsigned multiply_pairs(unsigned a, unsigned b) {
    unsigned product = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float left = half_to_float((unsigned short)(a >> shift)), right = half_to_float((unsigned short)(b >> shift));
        product |= (unsigned)float_to_half(left * right) << shift;  // exact in float, so rounded once
    }
    return product;
}

static inline void multiply_halves(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned shown[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    struct Sums {
        float of[4];
    };
    const Sums sums = shim::exchange(shown, 6, [](const shim::Exchange& all, int lane) {
        Sums s = {};
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, high = i / 2, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                const int part = k % 8 / 2, shift = k % 2 * 16, later = k / 8;
                const unsigned left = all.words[row * 4 + part][high + 2 * later] >> shift & 0xffffu;
                const unsigned right = all.words[column * 4 + part][4 + later] >> shift & 0xffffu;
                s.of[i] += half_to_float((unsigned short)left) * half_to_float((unsigned short)right);
            }
        }
        return s;
    });
    for (int i = 0; i < 4; i++) d[i] += sums.of[i];
}

static inline void multiply_bytes(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned shown[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    struct Sums {
        int of[4];
    };
    const Sums sums = shim::exchange(shown, 6, [](const shim::Exchange& all, int lane) {
        Sums s = {};
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, high = i / 2, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 32; k++) {
                const int part = k % 16 / 4, shift = k % 4 * 8;
                const int left = all.words[row * 4 + part][high + (k < 16 ? 0 : 2)] >> shift & 255;
                const int right = (signed char)(all.words[column * 4 + part][4 + (k < 16 ? 0 : 1)] >> shift & 255);
                s.of[i] += left * right;
            }
        }
        return s;
    });
    for (int i = 0; i < 4; i++) d[i] += sums.of[i];
}
