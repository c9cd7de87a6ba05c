// Makes the system fail as a test asks, inside a program that is started with it in LD_PRELOAD.
//
//   FAULT_READ=kind,name,from,to,after,times[,ms]   of the reads of files whose path holds `name`, those that touch
//       bytes [from, to): the first `after` are spared, the next `times` fail, the rest are spared again.
//       kind: eio; short (half of what was asked for); slow (waits `ms` first)
//   FAULT_MEMORY=bytes,below,after,times   allocations and mappings of [bytes, below) bytes are refused, likewise
//   FAULT_FULL=folder                nothing can be created or written below it
//   FAULT_LOG=file                   gets a line for every fault
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace {

struct Window {  // which of the matching calls fail
    std::atomic<long> seen{0};
    long after = 0, times = 0;
    bool hit() {
        const long number = seen++;
        return number >= after && number < after + times;
    }
};

struct Faults {
    char kind[16] = "", name[256] = "", full[512] = "", log[512] = "";
    long from = 0, to = 0, milliseconds = 0;
    size_t bytes = 0, below = 0;
    Window reads, memory;
};

Faults faults;
std::atomic<bool> ready{false};

__attribute__((constructor)) void read_environment() {
    const char* text = getenv("FAULT_READ");
    if (text != nullptr) {
        sscanf(text, "%15[^,],%255[^,],%ld,%ld,%ld,%ld,%ld", faults.kind, faults.name, &faults.from, &faults.to,
               &faults.reads.after, &faults.reads.times, &faults.milliseconds);
    }
    text = getenv("FAULT_MEMORY");
    if (text != nullptr) sscanf(text, "%zu,%zu,%ld,%ld", &faults.bytes, &faults.below, &faults.memory.after, &faults.memory.times);
    text = getenv("FAULT_FULL");
    if (text != nullptr) snprintf(faults.full, sizeof faults.full, "%s", text);
    text = getenv("FAULT_LOG");
    if (text != nullptr) snprintf(faults.log, sizeof faults.log, "%s", text);
    ready = true;
}

void tell(const char* what, long amount) {
    if (faults.log[0] == 0) return;
    char line[64];
    const int length = snprintf(line, sizeof line, "%s %ld\n", what, amount);
    const int file = static_cast<int>(syscall(SYS_openat, AT_FDCWD, faults.log, O_WRONLY | O_APPEND | O_CREAT, 0600));
    if (file < 0) return;
    if (syscall(SYS_write, file, line, length) < 0) _exit(99);
    syscall(SYS_close, file);
}

bool is_refused(size_t bytes) {
    if (!ready || bytes < faults.bytes || bytes >= faults.below || !faults.memory.hit()) return false;
    tell("memory", static_cast<long>(bytes));
    errno = ENOMEM;
    return true;
}

// How many bytes may be read: all of them, fewer, or -1 for an error.
ssize_t granted(int file, ssize_t count, off_t offset) {
    if (!ready || faults.kind[0] == 0 || offset + count <= faults.from || offset >= faults.to) return count;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return count;
    path[length] = 0;
    if (strstr(path, faults.name) == nullptr || !faults.reads.hit()) return count;
    tell(faults.kind, offset);
    if (strcmp(faults.kind, "eio") == 0) {
        errno = EIO;
        return -1;
    }
    if (strcmp(faults.kind, "slow") == 0) {
        timespec left{faults.milliseconds / 1000, faults.milliseconds % 1000 * 1000000};
        while (nanosleep(&left, &left) != 0) {
        }
        return count;
    }
    return count > 1 ? count / 2 : count;
}

template <class F>
F next(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool is_full(const char* path, int flags) {
    if (!ready || faults.full[0] == 0 || (flags & O_ACCMODE) == O_RDONLY) return false;
    if (strncmp(path, faults.full, strlen(faults.full)) != 0) return false;
    tell("full", 0);
    errno = ENOSPC;
    return true;
}

}  // namespace

extern "C" {

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

ssize_t pread(int file, void* to, size_t count, off_t offset) {
    const ssize_t some = granted(file, static_cast<ssize_t>(count), offset);
    return some < 0 ? -1 : syscall(SYS_pread64, file, to, some, offset);
}
ssize_t pread64(int file, void* to, size_t count, off64_t offset) { return pread(file, to, count, offset); }

ssize_t preadv(int file, const iovec* parts, int n, off_t offset) {
    if (n == 1) return pread(file, parts[0].iov_base, parts[0].iov_len, offset);
    return next<decltype(&preadv)>("preadv")(file, parts, n, offset);
}
ssize_t preadv64(int file, const iovec* parts, int n, off64_t offset) { return preadv(file, parts, n, offset); }
ssize_t preadv2(int file, const iovec* parts, int n, off_t offset, int) { return preadv(file, parts, n, offset); }
ssize_t preadv64v2(int file, const iovec* parts, int n, off64_t offset, int) { return preadv(file, parts, n, offset); }

void* mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
    if ((flags & MAP_ANONYMOUS) != 0 && is_refused(bytes)) return MAP_FAILED;
    return reinterpret_cast<void*>(syscall(SYS_mmap, at, bytes, protection, flags, file, offset));
}
void* mmap64(void* at, size_t bytes, int protection, int flags, int file, off64_t offset) {
    return mmap(at, bytes, protection, flags, file, offset);
}

void* malloc(size_t bytes) { return is_refused(bytes) ? nullptr : __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) {
    return is_refused(count * bytes) ? nullptr : __libc_calloc(count, bytes);
}
void* realloc(void* at, size_t bytes) { return is_refused(bytes) ? nullptr : __libc_realloc(at, bytes); }
void* memalign(size_t alignment, size_t bytes) {
    return is_refused(bytes) ? nullptr : __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** at, size_t alignment, size_t bytes) {
    void* found = memalign(alignment, bytes);
    if (found == nullptr) return ENOMEM;
    *at = found;
    return 0;
}

int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return is_full(path, flags) ? -1 : static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
int open64(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return is_full(path, flags) ? -1 : static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode));
}

}  // extern "C"
