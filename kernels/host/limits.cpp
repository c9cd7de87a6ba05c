// What this machine can do at best: reading memory, arithmetic, reading a file. It runs in a process of its
// own, so that its memory and its threads are not those of the process that is measured beside it.
//
// moss_limits() answers each line of its input with one line, up to the end of the input:
//
//   memory THREADS SECONDS MIB          read MIB of huge pages over and over      -> bytes
//   fp32 THREADS SECONDS                multiply and add in registers             -> operations, two a pair
//   int8 THREADS SECONDS                the same, 8-bit products summed in 32     -> operations
//   disk THREADS SECONDS PIECE OFFSET PATH   read pieces of a file past the page cache -> bytes
//
// The answer is "ok AMOUNT SECONDS CPU_SECONDS HOW" or "error WHY". CPU seconds are the sum over the threads.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(MOSS_PLAIN)
#define MOSS_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define MOSS_X86 0
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point began) {
    return std::chrono::duration<double>(Clock::now() - began).count();
}

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

struct Answer {
    double amount = 0, seconds = 0, cpu = 0;
};

// Runs work(thread) -> amount done again and again in every thread until the time is over.
Answer measure(int threads, double seconds, const std::function<double(int)>& work) {
    std::vector<Answer> parts((size_t)threads);
    std::vector<std::thread> running;
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    Clock::time_point began;
    for (int i = 0; i < threads; i++)
        running.emplace_back([&, i] {
            ready++;
            while (!go) std::this_thread::yield();
            double cpu = cpu_seconds();
            Answer part;
            do part.amount += work(i);
            while (seconds_since(began) < seconds);
            part.cpu = cpu_seconds() - cpu;
            part.seconds = seconds_since(began);
            parts[(size_t)i] = part;
        });
    while (ready < threads) std::this_thread::yield();
    began = Clock::now();
    go = true;
    Answer sum;
    for (int i = 0; i < threads; i++) {
        running[(size_t)i].join();
        const Answer& part = parts[(size_t)i];
        sum.amount += part.amount;
        sum.cpu += part.cpu;
        if (part.seconds > sum.seconds) sum.seconds = part.seconds;
    }
    return sum;
}

// ---- memory -------------------------------------------------------------------------------------

volatile uint64_t sink;  // what is read must be used

void read_plain(const char* data, size_t count) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < count; i += 64) {
        const uint64_t* words = (const uint64_t*)(data + i);
        for (int k = 0; k < 8; k++) sums[k] += words[k];
    }
    for (uint64_t sum : sums) sink = sum;
}

#if MOSS_X86
__attribute__((target("avx2"))) void read_avx2(const char* data, size_t count) {
    __m256i sums[8];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i += 256)
        for (size_t k = 0; k < 8; k++)
            sums[k] = _mm256_add_epi64(sums[k], _mm256_load_si256((const __m256i*)(data + i + 32 * k)));
    for (const auto& sum : sums) sink = (uint64_t)_mm256_extract_epi64(sum, 0);
}

__attribute__((target("avx512f"))) void read_avx512(const char* data, size_t count) {
    __m512i sums[8];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (size_t i = 0; i < count; i += 512)
        for (size_t k = 0; k < 8; k++)
            sums[k] = _mm512_add_epi64(sums[k], _mm512_load_si512(data + i + 64 * k));
    alignas(64) uint64_t words[8];
    for (const auto& sum : sums) {
        _mm512_store_si512(words, sum);
        sink = words[0];
    }
}
#endif

// ---- arithmetic ---------------------------------------------------------------------------------

constexpr int64_t ROUNDS = 200000;  // of one call: some milliseconds

#if MOSS_X86
// Twelve independent sums hide the latency of the instruction; registers 12 to 15 hold the inputs.
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CLOBBERS                                                                                              \
    "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"
#define LOOP(NAME, BODY)                                                           \
    void NAME() {                                                                  \
        int64_t left = ROUNDS;                                                     \
        asm volatile("vzeroall\n1:\n" BODY "dec %0\njnz 1b\nvzeroupper\n" : "+r"(left) : : CLOBBERS); \
    }

#define FMA_ZMM(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA_YMM(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define DOT_ZMM(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
// "{vex} vpdpbusd %ymm15, %ymm14, %ymm0..7" as bytes: assemblers before 2.36 do not know the VEX form
#define DOT_VEX(i) ".byte 0xc4, 0xc2, 0x0d, 0x50, 0xc7 + 8 * " #i "\n"
#define EIGHT(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
// without a dot product: pairs to 16 bits, pairs of those to 32, then the sum
#define DOT_YMM(sum, t)                                   \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #t "\n"          \
    "vpmaddwd %%ymm13, %%ymm" #t ", %%ymm" #t "\n"        \
    "vpaddd %%ymm" #t ", %%ymm" #sum ", %%ymm" #sum "\n"
#define EIGHT_DOTS \
    DOT_YMM(0, 8) DOT_YMM(1, 9) DOT_YMM(2, 10) DOT_YMM(3, 11) DOT_YMM(4, 8) DOT_YMM(5, 9) DOT_YMM(6, 10) DOT_YMM(7, 11)

LOOP(fp32_avx512, TWELVE(FMA_ZMM))
LOOP(fp32_avx2, TWELVE(FMA_YMM))
LOOP(int8_avx512vnni, TWELVE(DOT_ZMM))
LOOP(int8_avxvnni, EIGHT(DOT_VEX))
LOOP(int8_avx2, EIGHT_DOTS)

bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

template <class Number, class Sum>
void multiply_plain() {
    Number a[64], b[64];
    Sum sums[64] = {};
    for (int k = 0; k < 64; k++) a[k] = b[k] = (Number)1;
    for (int64_t round = 0; round < ROUNDS / 4; round++) {
        asm volatile("" : : "r"(a), "r"(b) : "memory");
        for (int k = 0; k < 64; k++) sums[k] += (Sum)a[k] * (Sum)b[k];
    }
    sink = (uint64_t)sums[0];
}

struct Kind {
    const char* name;
    void (*run)();
    double operations;  // of one call
};

Kind fp32_kind() {
#if MOSS_X86
    if (__builtin_cpu_supports("avx512f")) return {"avx512", fp32_avx512, 12.0 * 16 * 2 * ROUNDS};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", fp32_avx2, 12.0 * 8 * 2 * ROUNDS};
#endif
    return {"plain", multiply_plain<float, float>, 64.0 * 2 * (ROUNDS / 4)};
}

Kind int8_kind() {
#if MOSS_X86
    if (__builtin_cpu_supports("avx512vnni")) return {"avx512vnni", int8_avx512vnni, 12.0 * 64 * 2 * ROUNDS};
    if (has_avxvnni()) return {"avxvnni", int8_avxvnni, 8.0 * 32 * 2 * ROUNDS};
    if (__builtin_cpu_supports("avx2")) return {"avx2", int8_avx2, 8.0 * 32 * 2 * ROUNDS};
#endif
    return {"plain", multiply_plain<int8_t, int32_t>, 64.0 * 2 * (ROUNDS / 4)};
}

// ---- orders -------------------------------------------------------------------------------------

void reply(const Answer& answer, const char* how) {
    printf("ok %.0f %.9f %.9f %s\n", answer.amount, answer.seconds, answer.cpu, how);
}

void* take(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

constexpr size_t HUGE_PAGE = 2 << 20;

// The first `bytes` of huge pages within memory from take(bytes + HUGE_PAGE), there from now on.
char* in_huge_pages(void* memory, size_t bytes) {
    char* start = (char*)(((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#if defined(MADV_HUGEPAGE)
    madvise(start, bytes, MADV_HUGEPAGE);
#endif
    memset(start, 1, bytes);
    return start;
}

void memory_order(int threads, double seconds, size_t mib) {
    static char* start = nullptr;
    static size_t held = 0;
    if (mib > held) {
        char* memory = (char*)take((mib << 20) + HUGE_PAGE);
        if (!memory) {
            printf("error no memory for %zu MiB\n", mib);
            return;
        }
        start = in_huge_pages(memory, mib << 20);
        held = mib;
    }
    void (*read)(const char*, size_t) = read_plain;
    const char* how = "plain";
#if MOSS_X86
    if (__builtin_cpu_supports("avx512f"))
        read = read_avx512, how = "avx512";
    else if (__builtin_cpu_supports("avx2"))
        read = read_avx2, how = "avx2";
#endif
    const size_t step = 1 << 20, share = (mib << 20) / (size_t)threads / step * step;
    std::vector<size_t> at((size_t)threads, 0);
    reply(measure(threads, seconds,
                  [&](int i) {
                      size_t& place = at[(size_t)i];
                      read(start + share * (size_t)i + place, step);
                      place = place + step < share ? place + step : 0;
                      return (double)step;
                  }),
          how);
}

void arithmetic_order(int threads, double seconds, const Kind& kind) {
    reply(measure(threads, seconds, [&](int) { return kind.run(), kind.operations; }), kind.name);
}

void disk_order(int threads, double seconds, size_t piece, int64_t offset, const char* path) {
    bool direct = true;
    int file = -1;
#if defined(O_DIRECT)
    file = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    if (file < 0) direct = false, file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        printf("error %s\n", strerror(errno));
        return;
    }
    const int64_t pieces = (int64_t)lseek(file, 0, SEEK_END) / (int64_t)piece;
    const size_t bytes = piece * (size_t)threads;
    void* taken = take(bytes + HUGE_PAGE);
    if (pieces < 1 || !taken) {
        printf("error %s\n", taken ? "the file is smaller than a piece" : "no memory");
        close(file);
        return;
    }
    char* memory = in_huge_pages(taken, bytes);  // direct reads into small pages reach half the speed
    std::atomic<int64_t> next{offset / (int64_t)piece};
    std::atomic<int> failed{0};
    Answer answer = measure(threads, seconds, [&](int i) {
        const off_t at = (off_t)(next++ % pieces * (int64_t)piece);
        if (!direct) posix_fadvise(file, at, (off_t)piece, POSIX_FADV_DONTNEED);
        const ssize_t got = pread(file, memory + piece * (size_t)i, piece, at);
        if (got != (ssize_t)piece) failed = got < 0 ? errno : EIO;
        return got < 0 ? 0.0 : (double)got;
    });
    munmap(taken, bytes + HUGE_PAGE);
    close(file);
    if (failed)
        printf("error %s\n", strerror(failed));
    else
        reply(answer, direct ? "direct" : "buffered");
}

bool obey(const std::string& line) {
    int threads = 0, used = 0;
    double seconds = 0;
    unsigned long long size = 0;
    long long offset = 0;
    const char* text = line.c_str();
    if (sscanf(text, "memory %d %lf %llu", &threads, &seconds, &size) == 3 && threads > 0 && size >= (unsigned)threads)
        memory_order(threads, seconds, (size_t)size);
    else if (sscanf(text, "fp32 %d %lf", &threads, &seconds) == 2 && threads > 0)
        arithmetic_order(threads, seconds, fp32_kind());
    else if (sscanf(text, "int8 %d %lf", &threads, &seconds) == 2 && threads > 0)
        arithmetic_order(threads, seconds, int8_kind());
    else if (sscanf(text, "disk %d %lf %llu %lld %n", &threads, &seconds, &size, &offset, &used) == 4 && threads > 0 &&
             size >= 4096 && size % 4096 == 0 && offset >= 0)
        disk_order(threads, seconds, (size_t)size, offset, text + used);
    else
        return false;
    return true;
}

}  // namespace

extern "C" void moss_limits() {
    std::string line;
    for (int c; (c = getchar()) != EOF;) {
        if (c != '\n') {
            line.push_back((char)c);
            continue;
        }
        if (!obey(line)) printf("error not an order: %s\n", line.c_str());
        fflush(stdout);
        line.clear();
    }
}
