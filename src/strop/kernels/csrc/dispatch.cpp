// The library's C interface: what this build and this processor have, and each job split over threads.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

const int64_t LEAST_VALUES = 1 << 15;  // a thread is not woken for less
const int MOST_THREADS = 256;

// Threads that wait for the parts of one job at a time. They are never joined: they end with the process.
class Pool {
  public:
    // Calls part(0) to part(parts - 1), each once, part(0) here. A pool that is busy leaves all of them to the caller.
    template <class Part> void run(int parts, const Part &part) {
        if (parts <= 1 || !turn.try_lock()) {
            for (int i = 0; i < parts; i++) part(i);
            return;
        }
        {
            std::unique_lock<std::mutex> hold(lock);
            call = [](const void *of, int i) { (*static_cast<const Part *>(of))(i); };
            job = &part;
            last = parts;
            left = parts - 1;
            round++;
            try {
                while ((int)workers < parts - 1) start(++workers);
            } catch (...) {  // no more threads to be had: those parts are done here
                workers--;
            }
        }
        wake.notify_all();
        part(0);
        for (int i = (int)workers + 1; i < parts; i++) {
            part(i);
            left--;
        }
        std::unique_lock<std::mutex> hold(lock);
        done.wait(hold, [this] { return left == 0; });
        turn.unlock();
    }

  private:
    void start(int place) {
        unsigned seen = round - 1;
        std::thread([this, place, seen]() mutable {
            for (;;) {
                std::unique_lock<std::mutex> hold(lock);
                wake.wait(hold, [&] { return round != seen; });
                seen = round;
                if (place >= last) continue;
                hold.unlock();
                call(job, place);
                if (--left == 0) {
                    std::unique_lock<std::mutex> tell(lock);
                    done.notify_one();
                }
            }
        }).detach();
    }

    std::mutex turn, lock;
    std::condition_variable wake, done;
    void (*call)(const void *, int) = nullptr;
    const void *job = nullptr;
    int last = 0;
    unsigned workers = 0, round = 0;
    std::atomic<int> left{0};
};

Pool *pool = new Pool;  // kept: its threads outlive every destructor

#ifndef _WIN32
// A forked child has the pool's memory and none of its threads.
const int forked = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

const Table *table_of(int level) {
    switch (level) {
        case PORTABLE: return &portable_table;
#ifdef STROP_HAS_AVX2
        case AVX2: return &avx2_table;
#endif
#ifdef STROP_HAS_AVX512
        case AVX512: return &avx512_table;
#endif
        default: return nullptr;
    }
}

// A job's units over threads, none of which is woken for little.
template <class Work, class Of> int split(Work work, const Of *job, int threads, int64_t units) {
    if (units < 1) return REFUSED;
    const int64_t values = job->rows * job->columns;
    int64_t parts = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (parts > values / LEAST_VALUES) parts = values / LEAST_VALUES;
    if (parts > units) parts = units;
    if (parts < 1) parts = 1;
    std::atomic<int> status{DONE};
    pool->run((int)parts, [&](int part) {
        if (work(job, units * part / parts, units * (part + 1) / parts) != DONE) status = REFUSED;
    });
    return status;
}

int run(Kernel Table::*kernel, const Job *job, int level, int threads, int64_t units) {
    const Table *table = table_of(level);
    return table ? split(table->*kernel, job, threads, units) : REFUSED;
}

const BlockTable *block_table_of(int level) {
    switch (level) {
        case PORTABLE: return &portable_block;
#ifdef STROP_HAS_AVX2
        case AVX2: return &avx2_block;
#endif
#ifdef STROP_HAS_AVX512
        case AVX512: return &avx512_block;
#endif
        default: return nullptr;
    }
}

int run_block(BlockKernel BlockTable::*kernel, const BlockJob *job, int level, int threads, int64_t units) {
    const BlockTable *table = block_table_of(level);
    return table ? split(table->*kernel, job, threads, units) : REFUSED;
}

const Int8Table *int8_table_of(int level) {
    switch (level) {
        case PORTABLE: return &portable_int8;
#ifdef STROP_HAS_AVX2
        case AVX2: return &avx2_int8;
#endif
#ifdef STROP_HAS_AVX512
        case AVX512: return &avx512_int8;
#endif
        default: return nullptr;
    }
}

int run_int8(Int8Kernel Int8Table::*kernel, const Int8Job *job, int level, int threads, int64_t units) {
    const Int8Table *table = int8_table_of(level);
    return table ? split(table->*kernel, job, threads, units) : REFUSED;
}

// Whether the processor has tiles of int8, and the system lets this process use them (Linux asks to be asked).
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
    const int ask_for_state = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
    return false;
#endif
}

int64_t groups_of(const Job *job) { return job->rows * (job->columns / job->size); }
int64_t blocks_of(const Job *job) { return (job->rows * job->columns + job->size - 1) / job->size; }

}  // namespace

EXPORT int strop_job_bytes(void) { return (int)sizeof(Job); }
EXPORT int strop_block_job_bytes(void) { return (int)sizeof(BlockJob); }

EXPORT int strop_int8_job_bytes(void) { return (int)sizeof(Int8Job); }

// Bits 1 << Level: what this library was built with, and what this processor and its system can run.
EXPORT int strop_built(void) {
    int built = 0;
    for (int level = 0; level < LEVELS; level++) built |= table_of(level) ? 1 << level : 0;
    return built;
}

EXPORT int strop_runnable(void) {
    int runnable = 1 << PORTABLE;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        runnable |= 1 << AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
            runnable |= 1 << AVX512;
    }
#endif
    return runnable;
}

EXPORT int strop_round_affine(const Job *job, int level, int threads) {
    return run(&Table::round_affine, job, level, threads, groups_of(job));
}
EXPORT int strop_quantize_affine(const Job *job, int level, int threads) {
    return run(&Table::quantize_affine, job, level, threads, job->rows);
}
EXPORT int strop_dequantize_affine(const Job *job, int level, int threads) {
    return run(&Table::dequantize_affine, job, level, threads, job->rows);
}
EXPORT int strop_round_codebook(const Job *job, int level, int threads) {
    return run(&Table::round_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_quantize_codebook(const Job *job, int level, int threads) {
    return run(&Table::quantize_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_dequantize_codebook(const Job *job, int level, int threads) {
    return run(&Table::dequantize_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_mask_gradient(const Job *job, int level, int threads) {
    return run(&Table::mask_gradient, job, level, threads, blocks_of(job));
}
EXPORT int strop_product(const Job *job, int level, int threads) {
    const Table *table = table_of(level);
    if (!table || job->tokens < 1 || job->tokens > 4) return REFUSED;
    const int64_t inputs = job->tokens * input_room(job->columns), sums = job->tokens * sums_room(job->columns / job->size);
    std::vector<float> room((size_t)(inputs + sums));
    Job whole = *job;
    whole.inputs = room.data();
    whole.sums = room.data() + inputs;
    table->prepare_product(&whole, 0, whole.tokens);
    return run(&Table::product, &whole, level, threads, whole.rows);
}
EXPORT int strop_norm(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::norm, job, level, threads, job->rows);
}
EXPORT int strop_norm_backward(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::norm_backward, job, level, threads, job->rows);
}
EXPORT int strop_norm_gain(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::norm_gain, job, level, threads, job->columns);
}
EXPORT int strop_split_heads(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::split_heads, job, level, threads, job->rows);
}
EXPORT int strop_split_heads_backward(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::split_heads_backward, job, level, threads, job->rows);
}
EXPORT int strop_merge_heads(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::merge_heads, job, level, threads, job->rows);
}
EXPORT int strop_merge_heads_backward(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::merge_heads_backward, job, level, threads, job->rows);
}
EXPORT int strop_softmax(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::softmax, job, level, threads, job->rows);
}
EXPORT int strop_softmax_backward(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::softmax_backward, job, level, threads, job->rows);
}
EXPORT int strop_swiglu(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::swiglu, job, level, threads, job->rows);
}
EXPORT int strop_swiglu_backward(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::swiglu_backward, job, level, threads, job->rows);
}
EXPORT int strop_cross_entropy(const BlockJob *job, int level, int threads) {
    return run_block(&BlockTable::cross_entropy, job, level, threads, job->rows);
}
EXPORT int strop_round_rows(const Int8Job *job, int level, int threads) {
    return run_int8(&Int8Table::round_rows, job, level, threads, job->rows);
}
EXPORT int strop_int8_product(const Int8Job *job, int level, int threads) {
    static const bool tiles = has_tiles();
    if (!tiles) return REFUSED;
    return run_int8(&Int8Table::int8_product, job, level, threads, (job->outputs + 31) / 32);
}
