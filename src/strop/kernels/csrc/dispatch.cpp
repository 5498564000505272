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

// What a level has; AMX has tiles of its own beside AVX512's.
struct Tables {
    const Table *table;
    const BlockTable *block;
    const SearchTable *search;
    const StepTable *step;
    const Int8Table *int8;
    const AdamTable *adam;
    const HqqTable *hqq;
};

#define TABLES_OF(level) \
    {&level##_table, &level##_block, &level##_search, &level##_step, &level##_int8, &level##_adam, &level##_hqq}

const Tables *tables_of(int level) {
    static const Tables portable = TABLES_OF(portable);
#ifdef STROP_HAS_AVX2
    static const Tables avx2 = TABLES_OF(avx2);
    if (level == AVX2) return &avx2;
#endif
#ifdef STROP_HAS_AVX512
    static const Tables avx512 = TABLES_OF(avx512);
    if (level == AVX512) return &avx512;
#ifdef STROP_HAS_AMX
    if (level == AMX) return &avx512;
#endif
#endif
#ifdef STROP_HAS_NEON
    static const Tables neon = TABLES_OF(neon);
    if (level == NEON) return &neon;
#endif
    return level == PORTABLE ? &portable : nullptr;
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

template <class Of, class Work, class Job>
int run(const Of *Tables::*table, Work Of::*kernel, const Job *job, int level, int threads, int64_t units) {
    const Tables *tables = tables_of(level);
    return tables ? split(tables->*table->*kernel, job, threads, units) : REFUSED;
}

// Room for a step's values between its products; a thread keeps it for its next step.
class Room {
  public:
    explicit Room(int64_t bytes) {
        if ((int64_t)held.size() < bytes) held.resize((size_t)bytes);
        next = held.data();
    }
    template <class T> T *take(int64_t bytes) {
        char *mine = next;
        next += rounded(bytes);
        return (T *)mine;
    }
    static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  private:
    static thread_local std::vector<char> held;
    char *next;
};
thread_local std::vector<char> Room::held;

const unsigned TILES = 1u << 24, TILES_OF_BF16 = 1u << 22, TILES_OF_INT8 = 1u << 25;

// Whether the processor multiplies tiles of a kind, and the system lets this process: their state is asked for.
bool has_tiles(unsigned kind) {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const int ask_for_state = 0x1023, tile_data = 18;
    return (d & TILES) && (d & kind) && !syscall(SYS_arch_prctl, ask_for_state, tile_data);
#else
    (void)kind;
    return false;
#endif
}

bool has_half_floats() {  // F16C, which compilers' own question knows only lately
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#else
    return false;
#endif
}

int64_t groups_of(const Job *job) { return job->rows * (job->columns / job->size); }
int64_t blocks_of(const Job *job) { return (job->rows * job->columns + job->size - 1) / job->size; }

}  // namespace

EXPORT int strop_job_bytes(void) { return (int)sizeof(Job); }
EXPORT int strop_block_job_bytes(void) { return (int)sizeof(BlockJob); }
EXPORT int strop_search_job_bytes(void) { return (int)sizeof(SearchJob); }

EXPORT int strop_int8_job_bytes(void) { return (int)sizeof(Int8Job); }
EXPORT int strop_hqq_job_bytes(void) { return (int)sizeof(HqqJob); }
EXPORT int strop_adam_job_bytes(void) { return (int)sizeof(AdamJob); }

// Bits 1 << Level: what this library was built with, and what this processor and its system can run.
EXPORT int strop_built(void) {
    int built = 0;
    for (int level = 0; level < LEVELS; level++) built |= tables_of(level) ? 1 << level : 0;
    return built;
}

EXPORT int strop_runnable(void) {
    int runnable = 1 << PORTABLE;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_floats()) {
        runnable |= 1 << AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
            runnable |= 1 << AVX512 | (has_tiles(TILES_OF_BF16) ? 1 << AMX : 0);
    }
#elif defined(__aarch64__)
    runnable |= 1 << NEON;  // every processor of this kind has it
#endif
    return runnable;
}

EXPORT int strop_round_affine(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::round_affine, job, level, threads, groups_of(job));
}
EXPORT int strop_quantize_affine(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::quantize_affine, job, level, threads, job->rows);
}
EXPORT int strop_dequantize_affine(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::dequantize_affine, job, level, threads, job->rows);
}
EXPORT int strop_round_codebook(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::round_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_quantize_codebook(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::quantize_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_dequantize_codebook(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::dequantize_codebook, job, level, threads, blocks_of(job));
}
EXPORT int strop_mask_gradient(const Job *job, int level, int threads) {
    return run(&Tables::table, &Table::mask_gradient, job, level, threads, blocks_of(job));
}
EXPORT int strop_product(const Job *job, int level, int threads) {
    const Tables *tables = tables_of(level);
    if (!tables || job->tokens < 1) return REFUSED;
    const int64_t inputs = job->tokens * input_room(job->columns), sums = job->tokens * sums_room(job->columns / job->size);
    std::vector<float> room((size_t)(inputs + sums));
    Job whole = *job;
    whole.inputs = room.data();
    whole.sums = room.data() + inputs;
    tables->table->prepare_product(&whole, 0, whole.tokens);
    return run(&Tables::table, &Table::product, &whole, level, threads, whole.rows);
}
EXPORT int strop_tiled_product(const Job *job, int level, int threads) {
#if defined(STROP_HAS_AVX512) && defined(STROP_HAS_AMX)
    if (level != AMX || !tables_of(level)) return REFUSED;
    if (job->x_type != BFLOAT16 || job->tokens < 1 || job->tokens > MOST_TILED) return REFUSED;
    const int64_t tokens = (job->tokens + 15) / 16 * 16, columns = (job->columns + 127) / 128 * 128;
    std::vector<uint16_t> room((size_t)(tokens * columns + 32));
    Job whole = *job;
    whole.laid = (uint16_t *)(((uintptr_t)room.data() + 63) / 64 * 64);
    amx_tiles.lay(&whole, 0, whole.tokens);
    return split(amx_tiles.product, &whole, threads, whole.rows);
#else
    (void)job, (void)level, (void)threads;
    return REFUSED;
#endif
}
EXPORT int strop_step_job_bytes(void) { return (int)sizeof(StepJob); }

// One token of each text through a block. Refused where a shape is beyond the kernels, before anything is written.
EXPORT int strop_step(const StepJob *asked, int level, int threads) {
    const Tables *tables = tables_of(level);
    if (!tables) return REFUSED;
    const StepTable *table = tables->step;
    const BlockTable *block = tables->block;
    StepJob job = *asked;
    if (job.tokens < 1 || job.size * (job.heads / job.kv_heads) > table->most_queries) return REFUSED;
    const int64_t bytes = job.type == FLOAT32 ? 4 : 2, tokens = job.tokens, queries = job.heads * job.size;
    const int64_t keys = job.kv_heads * job.size, stream = tokens * job.hidden * bytes, heads = tokens * job.heads;
    Room room(3 * Room::rounded(stream) + 2 * Room::rounded(tokens * queries * bytes) +
              3 * Room::rounded(tokens * keys * bytes) + 2 * Room::rounded(tokens * job.inner * bytes) +
              Room::rounded(heads * job.columns * 4) + Room::rounded(heads * 4));
    job.normed = room.take<void>(stream), job.between = room.take<void>(stream), job.given = room.take<void>(stream);
    job.q = room.take<void>(tokens * queries * bytes);
    job.k = room.take<void>(tokens * keys * bytes), job.v = room.take<void>(tokens * keys * bytes);
    job.gate = room.take<void>(tokens * job.inner * bytes), job.up = room.take<void>(tokens * job.inner * bytes);
    job.scores = room.take<float>(heads * job.columns * 4);
    float *reciprocal = room.take<float>(heads * 4);
    void *q = job.gains[2] ? room.take<void>(tokens * queries * bytes) : job.q;  // before the heads' norms
    void *k = job.gains[2] ? room.take<void>(tokens * keys * bytes) : job.k;

    const auto multiply = [&](int place, const void *x, void *y) {
        Job product = *job.products[place];
        product.x = x, product.y = y, product.x_type = job.type, product.tokens = tokens;
        return (job.tiled >> place & 1 ? strop_tiled_product : strop_product)(&product, level, threads);
    };
    const auto norm = [&](int place, const void *x, const void *add, void *sum, void *y, int64_t rows, int64_t columns) {
        BlockJob rms = {};
        rms.x = x, rms.add = add, rms.sum = sum, rms.y = y, rms.gain = job.gains[place], rms.eps = job.eps[place];
        rms.reciprocal = reciprocal, rms.heads = 1, rms.columns = rms.stride = columns;
        rms.x_type = rms.y_type = job.type;
        return block->norm(&rms, 0, rows);
    };
    int status = norm(0, job.x, nullptr, nullptr, job.normed, tokens, job.hidden);
    status |= multiply(0, job.normed, q) | multiply(1, job.normed, k) | multiply(2, job.normed, job.v);
    if (job.gains[2]) {
        status |= norm(2, q, nullptr, nullptr, job.q, heads, job.size);
        status |= norm(3, k, nullptr, nullptr, job.k, tokens * job.kv_heads, job.size);
    }
    if (status) return REFUSED;
    table->turn(&job, 0, tokens);
    const int64_t units = tokens * job.kv_heads;
    const int64_t work = heads * job.size * job.columns / LEAST_VALUES, limit = work < units ? work : units;
    const int parts = (int)(limit < 1 ? 1 : limit < threads ? limit : threads);
    pool->run(parts, [&](int part) { table->attend(&job, units * part / parts, units * (part + 1) / parts); });
    status |= multiply(3, job.q, job.given);
    status |= norm(1, job.x, job.given, job.between, job.normed, tokens, job.hidden);
    status |= multiply(4, job.normed, job.gate) | multiply(5, job.normed, job.up);
    table->swiglu(&job, 0, tokens);
    status |= multiply(6, job.gate, job.given);
    if (!status) table->add(&job, 0, tokens);
    return status ? REFUSED : DONE;
}
EXPORT int strop_norm(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::norm, job, level, threads, job->rows);
}
EXPORT int strop_norm_backward(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::norm_backward, job, level, threads, job->rows);
}
EXPORT int strop_norm_gain(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::norm_gain, job, level, threads, job->columns);
}
EXPORT int strop_split_heads(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::split_heads, job, level, threads, job->rows);
}
EXPORT int strop_split_heads_backward(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::split_heads_backward, job, level, threads, job->rows);
}
EXPORT int strop_merge_heads(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::merge_heads, job, level, threads, job->rows);
}
EXPORT int strop_merge_heads_backward(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::merge_heads_backward, job, level, threads, job->rows);
}
EXPORT int strop_softmax(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::softmax, job, level, threads, job->rows);
}
EXPORT int strop_softmax_backward(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::softmax_backward, job, level, threads, job->rows);
}
EXPORT int strop_swiglu(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::swiglu, job, level, threads, job->rows);
}
EXPORT int strop_swiglu_backward(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::swiglu_backward, job, level, threads, job->rows);
}
EXPORT int strop_cross_entropy(const BlockJob *job, int level, int threads) {
    return run(&Tables::block, &BlockTable::cross_entropy, job, level, threads, job->rows);
}
EXPORT int strop_search_four_bit(const SearchJob *job, int level, int threads) {
    return run(&Tables::search, &SearchTable::search_four_bit, job, level, threads, job->rows * (job->columns / 256));
}
EXPORT int strop_search_six_bit(const SearchJob *job, int level, int threads) {
    return run(&Tables::search, &SearchTable::search_six_bit, job, level, threads, job->rows * (job->columns / 256));
}
EXPORT int strop_round_rows(const Int8Job *job, int level, int threads) {
    return run(&Tables::int8, &Int8Table::round_rows, job, level, threads, job->rows);
}
EXPORT int strop_int8_product(const Int8Job *job, int level, int threads) {
    static const bool tiles = has_tiles(TILES_OF_INT8);
    if (level != AVX2 && (!tiles || job->x_type == INT32)) return REFUSED;
    return run(&Tables::int8, &Int8Table::int8_product, job, level, threads, (job->outputs + 31) / 32);
}
EXPORT int strop_adam_step(const AdamJob *job, int level, int threads) {
    return run(&Tables::adam, &AdamTable::adam_step, job, level, threads, (job->rows + 255) / 256);
}
EXPORT int strop_hqq_scales(const HqqJob *job, int level, int threads) {
    return run(&Tables::hqq, &HqqTable::hqq_scales, job, level, threads, job->rows);
}
