// A disk with faults, for test_reader.py: loaded before the C library (LD_PRELOAD), it stands before pread.
//
// MOSS_FAULTS is a list "KIND FROM TO COUNT AMOUNT;…": the next COUNT reads that touch [FROM, TO) of a file are
//   error   failed with errno AMOUNT          short   cut to AMOUNT bytes
//   delay   held up for AMOUNT milliseconds   direct  failed with errno AMOUNT if they go past the page cache
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Fault {
    std::string kind;
    off64_t from, to;
    std::atomic<long> left;
    long amount;
    Fault(std::string kind_, off64_t from_, off64_t to_, long left_, long amount_)
        : kind(std::move(kind_)), from(from_), to(to_), left(left_), amount(amount_) {}
};

std::vector<Fault*> read_faults() {
    std::vector<Fault*> faults;
    std::istringstream all(std::getenv("MOSS_FAULTS") ? std::getenv("MOSS_FAULTS") : "");
    for (std::string one; std::getline(all, one, ';');) {
        std::istringstream words(one);
        std::string kind;
        long long from = 0, to = 0;
        long left = 0, amount = 0;
        if (words >> kind >> from >> to >> left >> amount) faults.push_back(new Fault(kind, from, to, left, amount));
    }
    return faults;
}

ssize_t faulty(int file, void* to, size_t count, off64_t offset) {
    using Read = ssize_t (*)(int, void*, size_t, off64_t);
    static const Read real = reinterpret_cast<Read>(dlsym(RTLD_NEXT, "pread64"));
    static const std::vector<Fault*> faults = read_faults();
    const bool past_the_cache = (fcntl(file, F_GETFL) & O_DIRECT) != 0;
    for (Fault* fault : faults) {
        if (offset >= fault->to || offset + static_cast<off64_t>(count) <= fault->from) continue;
        if ((fault->kind == "direct" && !past_the_cache) || fault->left.fetch_sub(1) <= 0) continue;
        if (fault->kind == "delay") {
            usleep(fault->amount * 1000);
        } else if (fault->kind == "short") {
            if (static_cast<long>(count) > fault->amount) count = fault->amount;
            if (count == 0) return 0;
            if (past_the_cache && count % 512 != 0) {  // the real one would refuse: read whole blocks, tell less
                const ssize_t got = real(file, to, (count + 4095) / 4096 * 4096, offset);
                return got < static_cast<ssize_t>(count) ? got : static_cast<ssize_t>(count);
            }
        } else {
            errno = static_cast<int>(fault->amount);
            return -1;
        }
    }
    return real(file, to, count, offset);
}

}  // namespace

extern "C" ssize_t pread64(int file, void* to, size_t count, off64_t offset) { return faulty(file, to, count, offset); }
extern "C" ssize_t pread(int file, void* to, size_t count, off_t offset) { return faulty(file, to, count, offset); }
