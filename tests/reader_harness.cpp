// Drives kernels/host/reader.cpp without Python, for the sanitizers: test_reader.py compiles both together.
// Usage: harness FILE ROUNDS, where byte i of FILE is value(i). Exits with 0 where every byte was right.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

struct Reader;
extern "C" {
Reader* moss_reader_new(void* ring, int64_t slots, int64_t slot_bytes, int threads, int use_cache);
int64_t moss_reader_add_file(Reader*, const char* path);
void moss_reader_set_order(Reader*, const int64_t* pieces, int64_t count);
int moss_reader_acquire(Reader*, int64_t piece, int timeout_ms, int64_t* offset, int64_t* failure);
void moss_reader_release(Reader*, int64_t piece);
void moss_reader_fill_begin(Reader*, const int64_t* parts, int64_t count);
int moss_reader_fill_wait(Reader*, int timeout_ms, int64_t* done, int64_t* failure);
int moss_reader_fill_end(Reader*, int timeout_ms);
void moss_reader_stats(Reader*, int64_t* counts, double* waited_s);
int moss_reader_close(Reader*);
void moss_reader_delete(Reader*);
}

static std::mt19937_64 random_bits(1);
static int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % end); }
static uint8_t value(int64_t at) { return static_cast<uint8_t>((static_cast<uint64_t>(at) * 2654435761u) >> 13); }

static void check(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

static void check_bytes(const uint8_t* bytes, int64_t offset, int64_t count) {
    for (int64_t i = 0; i < count; ++i) check(bytes[i] == value(offset + i), "a byte");
}

static std::vector<int64_t> some_pieces(int64_t file, int64_t size, int64_t longest) {
    std::vector<int64_t> pieces;
    for (int64_t n = 1 + below(12); n > 0; --n) {
        const int64_t count = 1 + below(longest), offset = below(size - count + 1);
        pieces.insert(pieces.end(), {file, offset, count});
    }
    return pieces;
}

static void walk(Reader* reader, const uint8_t* ring, const std::vector<int64_t>& pieces) {
    const int64_t n = static_cast<int64_t>(pieces.size() / 3);
    int64_t next = 0;
    for (int step = 0; step < 20; ++step) {
        if (below(8) == 0) next = below(n);
        int64_t start = 0, failure[5];
        int answer;
        while ((answer = moss_reader_acquire(reader, next, 1, &start, failure)) == 1) {
        }
        check(answer == 0, "acquire");
        check_bytes(ring + start, pieces[3 * next + 1], pieces[3 * next + 2]);
        if (below(4) != 0) moss_reader_release(reader, next);
        next = (next + 1) % n;
    }
}

static void fill(Reader* reader, int64_t file, int64_t size, bool to_its_end) {
    std::vector<std::vector<uint8_t>> targets;
    std::vector<int64_t> parts;
    for (int i = 0; i < 5; ++i) {
        const int64_t count = below(size / 4), offset = below(size - count + 1);
        targets.emplace_back(count + 1);
        parts.insert(parts.end(), {file, offset, count, reinterpret_cast<int64_t>(targets.back().data())});
    }
    moss_reader_fill_begin(reader, parts.data(), 5);
    int64_t done = 0, failure[5];
    int answer = 1;
    while (to_its_end && (answer = moss_reader_fill_wait(reader, 1, &done, failure)) == 1) {
    }
    check(!to_its_end || answer == 0, "fill");
    while (moss_reader_fill_end(reader, 10) != 0) {
    }
    for (int i = 0; to_its_end && i < 5; ++i) check_bytes(targets[i].data(), parts[4 * i + 1], parts[4 * i + 2]);
}

int main(int, char** arguments) {
    constexpr int64_t SLOT = 64 << 10, LONGEST = SLOT - 8192;
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        const int64_t slots = 1 + below(6);
        auto* ring = static_cast<uint8_t*>(std::aligned_alloc(4096, slots * SLOT));
        Reader* reader = moss_reader_new(ring, slots, SLOT, static_cast<int>(1 + below(6)), static_cast<int>(below(2)));
        const int64_t file = moss_reader_add_file(reader, arguments[1]);
        check(file == 0, "add_file");
        std::FILE* opened = std::fopen(arguments[1], "rb");
        std::fseek(opened, 0, SEEK_END);
        const int64_t size = std::ftell(opened);
        std::fclose(opened);
        std::vector<int64_t> pieces;
        for (int turn = 0; turn < 6; ++turn) {
            pieces = some_pieces(file, size, LONGEST);
            moss_reader_set_order(reader, pieces.data(), static_cast<int64_t>(pieces.size() / 3));
            if (below(3) == 0) fill(reader, file, size, below(2) == 0);
            walk(reader, ring, pieces);
        }
        std::thread other([&] {  // somebody who still waits while the reader is closed
            int64_t start, failure[5];
            for (int64_t i = 0; moss_reader_acquire(reader, i, 1000, &start, failure) == 0;)
                i = (i + 1) % static_cast<int64_t>(pieces.size() / 3);
        });
        int64_t counts[3];
        double waited;
        moss_reader_stats(reader, counts, &waited);
        check(moss_reader_close(reader) == 1, "close");
        other.join();
        moss_reader_delete(reader);
        std::free(ring);
    }
}
