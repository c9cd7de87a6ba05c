// Files read past the page cache: in whole blocks where the file system allows it, to aligned or to any addresses.
#pragma once

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace moss {

constexpr int64_t BLOCK = 4096;      // direct I/O: alignment of offsets, sizes and addresses
constexpr int64_t BOUNCE = 1 << 20;  // bytes on the way to an address that is not aligned

inline int64_t block_start(int64_t offset) { return offset / BLOCK * BLOCK; }
inline int64_t block_end(int64_t offset) { return (offset + BLOCK - 1) / BLOCK * BLOCK; }

struct Piece {
    int64_t file, offset, nbytes;
};

struct Target {  // a piece and where it goes
    int64_t file, offset, nbytes, address;
};

struct Got {
    int64_t bytes = 0;  // from the place asked for; fewer than asked for only at the end of a file or on an error
    int error = 0;
};

struct Counts {
    int64_t disk = 0, cache = 0;
};

struct FreeDeleter {
    void operator()(char* memory) const { std::free(memory); }
};
using Bounce = std::unique_ptr<char, FreeDeleter>;

class File {
  public:
    explicit File(const char* path) : buffered_(::open(path, O_RDONLY | O_CLOEXEC)) {
        if (buffered_ < 0) {
            error_ = errno;
            return;
        }
        posix_fadvise(buffered_, 0, 0, POSIX_FADV_RANDOM);  // no reading ahead of what is asked for
        direct_ = ::open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
        takes_direct_ = direct_ >= 0;  // some file systems refuse here, others at the first read
    }
    ~File() {
        if (direct_ >= 0) ::close(direct_);
        if (buffered_ >= 0) ::close(buffered_);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int error() const { return error_; }
    bool takes_direct() const { return takes_direct_.load(std::memory_order_relaxed); }

    // Whether the page cache holds all of [offset, offset + nbytes); "no" where the kernel cannot tell.
    bool is_cached(int64_t offset, int64_t nbytes) const {
        static std::atomic<bool> can_tell{true};
        if (!can_tell.load(std::memory_order_relaxed)) return false;
        static const int64_t page = sysconf(_SC_PAGESIZE);
        constexpr long CACHESTAT = 451;  // the same number on every architecture; Linux 6.5
        struct { uint64_t offset, nbytes; } range{static_cast<uint64_t>(offset), static_cast<uint64_t>(nbytes)};
        struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } found{};
        if (syscall(CACHESTAT, buffered_, &range, &found, 0) != 0) {
            if (errno == ENOSYS || errno == EPERM) can_tell = false;
            return false;
        }
        const int64_t pages = (offset + nbytes + page - 1) / page - offset / page;
        return static_cast<int64_t>(found.cached) >= pages;
    }

    // Reads [start, start + wanted) and, where that is easier, on to start + room. All are whole blocks but `wanted`.
    Got read_blocks(char* to, int64_t start, int64_t wanted, int64_t room) {
        Got got;
        while (got.bytes < wanted) {
            const bool directly = takes_direct() && got.bytes % BLOCK == 0;
            const int64_t left = (directly ? room : wanted) - got.bytes;
            const ssize_t n = pread(directly ? direct_ : buffered_, to + got.bytes, left, start + got.bytes);
            if (n > 0) {
                got.bytes += n;
                if (!directly) drop(start + got.bytes - n, n);
            } else if (n == 0) {
                break;
            } else if (directly && (errno == EINVAL || errno == EOPNOTSUPP)) {
                takes_direct_ = false;
            } else if (errno != EINTR) {
                got.error = errno;
                break;
            }
        }
        return got;
    }

    // Reads through the page cache, what lies there.
    Got read_cached(char* to, int64_t offset, int64_t wanted) const {
        Got got;
        while (got.bytes < wanted) {
            const ssize_t n = pread(buffered_, to + got.bytes, wanted - got.bytes, offset + got.bytes);
            if (n > 0) {
                got.bytes += n;
            } else if (n == 0 || errno != EINTR) {
                got.error = n == 0 ? 0 : errno;
                break;
            }
        }
        return got;
    }

  private:
    void drop(int64_t offset, int64_t nbytes) const {  // what a read through the page cache left there
        posix_fadvise(buffered_, block_start(offset), block_end(offset + nbytes) - block_start(offset),
                      POSIX_FADV_DONTNEED);
    }

    int buffered_ = -1, direct_ = -1, error_ = 0;
    std::atomic<bool> takes_direct_{false};
};

// A piece into a slot; the bytes start at to + offset % BLOCK.
inline Got read_to_slot(File& file, const Piece& piece, char* to, bool use_cache, Counts& counts) {
    const int64_t lead = piece.offset % BLOCK;
    if (use_cache && file.is_cached(piece.offset, piece.nbytes)) {
        const Got got = file.read_cached(to + lead, piece.offset, piece.nbytes);
        counts.cache += got.bytes;
        return got;
    }
    const int64_t start = piece.offset - lead, wanted = lead + piece.nbytes;
    Got got = file.read_blocks(to, start, wanted, block_end(wanted));
    counts.disk += got.bytes;
    got.bytes = std::clamp<int64_t>(got.bytes - lead, 0, piece.nbytes);
    return got;
}

// Part of a piece to any address: straight where offset and address lie alike in their blocks, else by way of `bounce`.
inline Got read_to_address(File& file, const Target& part, bool use_cache, Bounce& bounce, Counts& counts) {
    char* const to = reinterpret_cast<char*>(part.address);
    if (use_cache && file.is_cached(part.offset, part.nbytes)) {
        const Got got = file.read_cached(to, part.offset, part.nbytes);
        counts.cache += got.bytes;
        return got;
    }
    Got all;
    while (all.bytes < part.nbytes && all.error == 0) {
        const int64_t offset = part.offset + all.bytes, left = part.nbytes - all.bytes, lead = offset % BLOCK;
        char* const here = to + all.bytes;
        if (lead == 0 && reinterpret_cast<uintptr_t>(here) % BLOCK == 0 && left >= BLOCK) {
            const int64_t wanted = block_start(left);
            const Got got = file.read_blocks(here, offset, wanted, wanted);
            counts.disk += got.bytes;
            all.bytes += got.bytes;
            all.error = got.error;
            if (got.bytes < wanted) break;
            continue;
        }
        if (!bounce) bounce.reset(static_cast<char*>(std::aligned_alloc(BLOCK, BOUNCE)));
        if (!bounce) {
            all.error = ENOMEM;
            break;
        }
        const bool alike = (reinterpret_cast<uintptr_t>(here) - static_cast<uintptr_t>(offset)) % BLOCK == 0;
        const int64_t wanted = std::min(lead + left, alike ? BLOCK : BOUNCE);
        const Got got = file.read_blocks(bounce.get(), offset - lead, wanted, block_end(wanted));
        counts.disk += got.bytes;
        const int64_t useful = std::clamp<int64_t>(got.bytes - lead, 0, wanted - lead);
        std::memcpy(here, bounce.get() + lead, useful);
        all.bytes += useful;
        all.error = got.error;
        if (useful < wanted - lead) break;
    }
    return all;
}

}  // namespace moss
