// Threads that share the numbered chunks of a job.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace echelon {

// The caller of `run` works too. Any free thread takes the next chunk, so a thread that the system does not schedule
// delays only the chunk that it has begun. A thread without work spins for a moment, because the next job of a forward
// comes soon. Then it sleeps: on a busy machine it leaves its core to others.
class Pool {
  public:
    explicit Pool(int num_threads) : num_threads_(num_threads) {
        for (int i = 1; i < num_threads; ++i) std::thread([this] { serve(); }).detach();
    }

    Pool(const Pool&) = delete;  // never destroyed: the threads live as long as the process

    int num_threads() const { return num_threads_; }

    // Calls work(0) ... work(num_chunks - 1), each once, and returns when all have returned. Callers take turns.
    template <typename Work>
    void run(int64_t num_chunks, const Work& work) {
        const std::lock_guard<std::mutex> turn(turn_);
        if (num_threads_ == 1 || num_chunks < 2) {
            for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(chunk);
            return;
        }
        work_ = &work;
        call_ = [](const void* work, int64_t chunk) { (*static_cast<const Work*>(work))(chunk); };
        num_chunks_ = num_chunks;
        next_chunk_ = 0;
        is_open_ = true;
        num_jobs_.fetch_add(1);
        num_jobs_.notify_all();
        take_chunks();
        is_open_ = false;
        // No thread enters any longer; those inside may still work on their last chunk.
        for (int inside; (inside = num_inside_) > 0;) wait_while(num_inside_, inside);
    }

  private:
    static constexpr int kSpins = 2000;  // 30 to 100 us, by CPU. Not measured.

    void take_chunks() {
        for (int64_t chunk; (chunk = next_chunk_.fetch_add(1)) < num_chunks_;) call_(work_, chunk);
    }

    void serve() {
        for (int seen = 0;;) {
            ++num_inside_;
            if (is_open_) take_chunks();
            --num_inside_;
            num_inside_.notify_one();
            wait_while(num_jobs_, seen);
            seen = num_jobs_;
        }
    }

    static void wait_while(const std::atomic<int>& number, int value) {
        for (int i = 0; i < kSpins; ++i) {
            if (number.load(std::memory_order_relaxed) != value) return;
            _mm_pause();
        }
        number.wait(value);
    }

    const int num_threads_;
    std::mutex turn_;
    std::atomic<int> num_jobs_{0};  // wraps around; only a change matters
    std::atomic<int> num_inside_{0};
    std::atomic<bool> is_open_{false};
    std::atomic<int64_t> next_chunk_{0};
    int64_t num_chunks_ = 0;
    const void* work_ = nullptr;
    void (*call_)(const void*, int64_t) = nullptr;
};

}  // namespace echelon
