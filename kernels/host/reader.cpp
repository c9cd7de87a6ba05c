// Reads pieces of files into memory, ahead of whoever computes with them. moss_jt/reader.py is its face.
//
// Two kinds of work for a few threads, none of which ever touches Python:
//   the ring   the pieces of an order that repeats without end, each into a slot of its own. Positions in the
//              endless order are called turns; turn t is piece t % n. Slots hold turns [base, head), and only
//              the piece of turn `base` is ever lent out.
//   filling    pieces read once to given addresses. It goes before the ring.
//
// Files are read past the page cache (O_DIRECT, in blocks of 4096 bytes, so a few bytes more than asked for).
// What lies in the page cache already is taken from there; nothing is ever added to it. The question is put with
// cachestat: a read with RWF_NOWAIT would answer it too, but in today's Linux it also starts a read into the cache.
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "blocks.h"

namespace {

using namespace moss;

constexpr int64_t CHUNK = 8 << 20;   // filling: bytes of one read
constexpr int CLOSING_MS = 2000;     // how long closing waits for reads in flight

enum Answer : int { READY = 0, WAITING = 1, FAILED = 2, CLOSED = 3 };

struct Failure {  // of a piece: the bytes that were there, and errno, or 0 where the file just ended
    int64_t file, offset, wanted, got, error;
};

enum class State { FREE, READING, READY, LENT, FAILED };

struct Slot {
    State state = State::FREE;
    int64_t turn = -1;   // that it was read for
    int64_t piece = -1;  // whose bytes it holds or is to hold, -1 where they are of no use
    Failure failure{};
};

struct Filling {  // several reads in flight; `part` and `at` are where the next one starts
    std::vector<Target> parts;
    size_t part = 0;
    int64_t at = 0, done = 0;
    int reading = 0;
    bool failed = false;
    Failure failure{};
    bool has_more() const { return !failed && part < parts.size(); }
};

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

class Reader {
  public:
    Reader(char* ring, int64_t slots, int64_t slot_bytes, int threads, bool use_cache)
        : ring_(ring), slot_bytes_(slot_bytes), use_cache_(use_cache), slots_(slots) {
        sigset_t all, before;  // signals are for the threads that the program knows of
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 0; i < threads; ++i) {
                threads_.emplace_back([this] { run(); });
            }
        } catch (const std::system_error&) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            close();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    int64_t add_file(const char* path) {
        auto file = std::make_unique<File>(path);
        if (file->error() != 0) return -file->error();
        Lock lock(mutex_);
        files_.push_back(std::move(file));
        return static_cast<int64_t>(files_.size()) - 1;
    }

    // What was read ahead is of no use any more; reads in flight end into slots that are then free.
    void set_order(const Piece* pieces, int64_t count) {
        Lock lock(mutex_);
        order_.assign(pieces, pieces + count);
        for (Slot& slot : slots_) {
            if (slot.state != State::READING) slot.state = State::FREE;
            slot.piece = -1;
        }
        lent_ = nullptr;
        if (count > 0) restart((head_ + count - 1) / count * count);
        paused_ = false;
        work_.notify_all();
    }

    // Lends the bytes of a piece until the next call of this, release or set_order.
    int acquire(int64_t piece, int timeout_ms, int64_t* offset, Failure* failure) {
        Lock lock(mutex_);
        Visit visit(*this, lock);
        if (closing_ || order_.empty()) return CLOSED;
        if (lent_ == nullptr || lent_->piece != piece) {
            give_back();
            go_to(piece);
            paused_ = false;
            work_.notify_all();
            if (Slot* slot = wait_for(lock, timeout_ms)) {
                if (slot->state == State::FAILED) {
                    *failure = slot->failure;
                    paused_ = true;  // until somebody asks again
                    restart(base_ + static_cast<int64_t>(order_.size()));
                    return FAILED;
                }
                slot->state = State::LENT;
                lent_ = slot;
            } else {
                return closing_ ? CLOSED : WAITING;
            }
        }
        *offset = (lent_ - slots_.data()) * slot_bytes_ + order_[piece].offset % BLOCK;
        return READY;
    }

    void release(int64_t piece) {
        Lock lock(mutex_);
        if (lent_ != nullptr && lent_->piece == piece) give_back();
    }

    // After fill_end.
    void fill_begin(const Target* parts, int64_t count) {
        Lock lock(mutex_);
        filling_ = Filling{};
        filling_.parts.assign(parts, parts + count);
        skip_empty_parts();
        work_.notify_all();
    }

    int fill_wait(int timeout_ms, int64_t* done, Failure* failure) {
        Lock lock(mutex_);
        Visit visit(*this, lock);
        const auto is_over = [this] { return closing_ || (!filling_.has_more() && filling_.reading == 0); };
        const bool over = filled_.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_over);
        *done = filling_.done;
        if (closing_) return CLOSED;
        if (!over) return WAITING;
        *failure = filling_.failure;
        return filling_.failed ? FAILED : READY;
    }

    // Drops what is not begun and waits for the reads in flight. READY: no address is written to any more.
    int fill_end(int timeout_ms) {
        Lock lock(mutex_);
        Visit visit(*this, lock);
        filling_.part = filling_.parts.size();
        const auto is_over = [this] { return filling_.reading == 0; };
        return filled_.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_over) ? READY : WAITING;
    }

    // Ends the threads; may be repeated. False where one still reads after a while: then neither this nor the ring may be freed.
    bool close() {
        Lock lock(mutex_);
        closing_ = true;
        work_.notify_all();
        ready_.notify_all();
        filled_.notify_all();
        const auto all_gone = [this] { return alive_ == 0 && visitors_ == 0; };
        if (!gone_.wait_for(lock, std::chrono::milliseconds(CLOSING_MS), all_gone)) return false;
        std::vector<std::thread> threads;
        threads.swap(threads_);
        files_.clear();
        lock.unlock();
        for (std::thread& thread : threads) thread.join();
        return true;
    }

    void stats(int64_t* counts, double* waited_s) {
        Lock lock(mutex_);
        counts[0] = counts_.disk;
        counts[1] = counts_.cache;
        counts[2] = !files_.empty() && std::all_of(files_.begin(), files_.end(), [](const auto& file) {
            return file->takes_direct();
        });
        *waited_s = std::chrono::duration<double>(waited_).count();
    }

  private:
    struct Visit {  // a caller who may sleep in here; closing waits until all have left
        Visit(Reader& reader, Lock& lock) : reader_(reader), lock_(lock) { ++reader.visitors_; }
        ~Visit() {
            if (!lock_.owns_lock()) lock_.lock();
            --reader_.visitors_;
            reader_.gone_.notify_all();
        }
        Reader& reader_;
        Lock& lock_;
    };

    void run() {
        Lock lock(mutex_);
        if (closing_) return;
        ++alive_;
        while (true) {
            work_.wait(lock, [this] { return closing_ || filling_.has_more() || can_read_ahead(); });
            if (closing_) break;
            filling_.has_more() ? fill_one(lock) : read_one(lock);
        }
        --alive_;
        gone_.notify_all();
    }

    // Where the whole order fits into the ring, no turn is read ahead before its own piece was given back.
    int64_t window() const { return std::min(slots_.size(), order_.size()); }

    bool can_read_ahead() const {
        return !paused_ && head_ < base_ + window() && std::any_of(slots_.begin(), slots_.end(), is_free);
    }

    static bool is_free(const Slot& slot) { return slot.state == State::FREE; }

    void read_one(Lock& lock) {
        const int64_t turn = head_++, piece = turn % static_cast<int64_t>(order_.size());
        Slot& slot = free_slot(piece);
        slot.turn = turn;
        if (slot.piece == piece) {  // its bytes are still here
            become(slot, State::READY);
            return;
        }
        slot.piece = piece;
        slot.state = State::READING;
        const Piece what = order_[piece];
        File& file = *files_[what.file];
        Counts counts;
        lock.unlock();
        const Got got = read_to_slot(file, what, ring_ + (&slot - slots_.data()) * slot_bytes_, use_cache_, counts);
        lock.lock();
        add(counts);
        const bool good = got.bytes == what.nbytes;
        slot.failure = Failure{what.file, what.offset, what.nbytes, got.bytes, got.error};
        become(slot, good ? State::READY : State::FAILED);
    }

    void become(Slot& slot, State state) {
        slot.state = state;
        if (slot.turn < base_) drop(slot);
        if (slot.turn == base_) ready_.notify_all();
        if (can_read_ahead()) work_.notify_one();
    }

    static void drop(Slot& slot) {
        if (slot.state == State::FAILED) slot.piece = -1;
        slot.state = State::FREE;
    }

    // One that holds the piece already; else an empty one, where all pieces can stay; else the one that was used
    // last: its piece is needed again last of all, and few slots in turn are more likely to be in the CPU's cache.
    Slot& free_slot(int64_t piece) {
        const bool all_stay = order_.size() <= slots_.size();
        const auto rank = [=](const Slot& slot) {
            if (slot.piece == piece) return INT64_MIN;
            return all_stay && slot.piece < 0 ? INT64_MIN + 1 : -slot.turn;
        };
        Slot* best = nullptr;
        for (Slot& slot : slots_)
            if (is_free(slot) && (best == nullptr || rank(slot) < rank(*best))) best = &slot;
        return *best;
    }

    void restart(int64_t turn) {
        base_ = head_ = turn;
        for (Slot& slot : slots_)
            if (slot.state == State::READY || slot.state == State::FAILED) drop(slot);
    }

    // Makes the next turn of this piece the first one: reads on where it lies in the window, else starts there.
    void go_to(int64_t piece) {
        const auto count = static_cast<int64_t>(order_.size());
        const int64_t turn = base_ + (piece - base_ % count + count) % count;
        if (turn >= head_) return restart(turn);
        base_ = turn;
        for (Slot& slot : slots_)
            if (slot.turn < turn && (slot.state == State::READY || slot.state == State::FAILED)) drop(slot);
    }

    Slot* wait_for(Lock& lock, int timeout_ms) {
        Slot* found = nullptr;
        const int64_t turn = base_;
        const auto is_here = [&] {
            for (Slot& slot : slots_)
                if (slot.turn == turn && (slot.state == State::READY || slot.state == State::FAILED)) found = &slot;
            return found != nullptr || closing_;
        };
        if (is_here()) return found;
        const auto before = Clock::now();
        ready_.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_here);
        waited_ += Clock::now() - before;
        return found;
    }

    void give_back() {
        if (lent_ == nullptr) return;
        base_ = lent_->turn + 1;
        lent_->state = State::FREE;
        lent_ = nullptr;
        work_.notify_one();
    }

    void skip_empty_parts() {
        while (filling_.part < filling_.parts.size() && filling_.at == filling_.parts[filling_.part].nbytes) {
            ++filling_.part;
            filling_.at = 0;
        }
    }

    void fill_one(Lock& lock) {
        const Target whole = filling_.parts[filling_.part];
        const int64_t offset = whole.offset + filling_.at, end = whole.offset + whole.nbytes;
        const int64_t stop = end - offset <= CHUNK ? end : block_start(offset + CHUNK);
        const Target part{whole.file, offset, stop - offset, whole.address + filling_.at};
        filling_.at += part.nbytes;
        skip_empty_parts();
        ++filling_.reading;
        File& file = *files_[part.file];
        Counts counts;
        Bounce bounce;
        lock.unlock();
        const Got got = read_to_address(file, part, use_cache_, bounce, counts);
        lock.lock();
        add(counts);
        --filling_.reading;
        filling_.done += got.bytes;
        if (got.bytes < part.nbytes && !filling_.failed) {
            filling_.failed = true;
            filling_.failure = Failure{part.file, part.offset, part.nbytes, got.bytes, got.error};
        }
        filled_.notify_all();
    }

    void add(const Counts& counts) {
        counts_.disk += counts.disk;
        counts_.cache += counts.cache;
    }

    char* const ring_;
    const int64_t slot_bytes_;
    const bool use_cache_;
    std::mutex mutex_;  // guards everything below
    std::condition_variable work_, ready_, filled_, gone_;
    std::vector<std::unique_ptr<File>> files_;
    std::vector<Piece> order_;
    std::vector<Slot> slots_;  // its length never changes
    Slot* lent_ = nullptr;
    int64_t base_ = 0, head_ = 0;  // turns: the next to be lent (or lent), the next to be read
    bool paused_ = false, closing_ = false;
    Filling filling_;
    int alive_ = 0, visitors_ = 0;
    Counts counts_;
    Clock::duration waited_{};
    std::vector<std::thread> threads_;
};

}  // namespace

extern "C" {

Reader* moss_reader_new(void* ring, int64_t slots, int64_t slot_bytes, int threads, int use_cache) {
    try {
        return new Reader(static_cast<char*>(ring), slots, slot_bytes, threads, use_cache != 0);
    } catch (const std::exception&) {
        return nullptr;
    }
}
int64_t moss_reader_add_file(Reader* reader, const char* path) { return reader->add_file(path); }
void moss_reader_set_order(Reader* reader, const int64_t* pieces, int64_t count) {
    reader->set_order(reinterpret_cast<const Piece*>(pieces), count);
}
int moss_reader_acquire(Reader* reader, int64_t piece, int timeout_ms, int64_t* offset, int64_t* failure) {
    return reader->acquire(piece, timeout_ms, offset, reinterpret_cast<Failure*>(failure));
}
void moss_reader_release(Reader* reader, int64_t piece) { reader->release(piece); }
void moss_reader_fill_begin(Reader* reader, const int64_t* parts, int64_t count) {
    reader->fill_begin(reinterpret_cast<const Target*>(parts), count);
}
int moss_reader_fill_wait(Reader* reader, int timeout_ms, int64_t* done, int64_t* failure) {
    return reader->fill_wait(timeout_ms, done, reinterpret_cast<Failure*>(failure));
}
int moss_reader_fill_end(Reader* reader, int timeout_ms) { return reader->fill_end(timeout_ms); }
void moss_reader_stats(Reader* reader, int64_t* counts, double* waited_s) { reader->stats(counts, waited_s); }
int moss_reader_close(Reader* reader) { return reader->close() ? 1 : 0; }
void moss_reader_delete(Reader* reader) { delete reader; }
}
