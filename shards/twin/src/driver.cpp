// The twin of the CUDA driver: `libcuda.so.1` in host memory, with the functions that detco-shards
// calls.
//
// Streams are threads that run what is queued late and at random moments, so that work which is not
// ordered does go wrong; memory is filled with rubbish when it is made and when it is freed. What a
// GPU would not forgive is refused with the driver's status, or counted as a fault where no call is
// there to refuse it. Kernels are the host's build of the same source, found by their names.
//
// Numbers are those of cuda.h 13.0.

#include "block.h"
#include "driver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>

using namespace detco;

namespace {

enum Status {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
};

// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and the bytes that need no leave.
const int MAX_DYNAMIC_SHARED = 8;
const u32 SHARED_WITHOUT_LEAVE = 48 * 1024;

// An H100's, with fewer multiprocessors.
const u32 SHARED_PER_BLOCK = 232448;
const u32 THREADS_PER_BLOCK = 1024;
const std::map<int, int> ATTRIBUTES = {
    {16, 3},       // multiprocessors
    {39, 2048},    // threads of one
    {75, 9},       // compute capability: major
    {76, 0},       // and minor
    {81, 233472},  // shared memory of one
    {97, int(SHARED_PER_BLOCK)},
};

// A moment in a stream, for those who wait for it.
struct Mark {
    std::mutex mutex;
    std::condition_variable reached;
    bool is_reached = false;
    std::chrono::steady_clock::time_point at;

    void reach() {
        std::lock_guard<std::mutex> lock(mutex);
        at = std::chrono::steady_clock::now();
        is_reached = true;
        reached.notify_all();
    }

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        reached.wait(lock, [&] { return is_reached; });
    }

    bool done() {
        std::lock_guard<std::mutex> lock(mutex);
        return is_reached;
    }
};

class Stream {
public:
    Stream() : thread_([this] { run(); }) {}

    ~Stream() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
            more_.notify_all();
        }
        thread_.join();
    }

    void queue(std::function<void()> work) {
        std::lock_guard<std::mutex> lock(mutex_);
        queued_.push_back(std::move(work));
        more_.notify_all();
    }

    std::shared_ptr<Mark> mark() {
        auto mark = std::make_shared<Mark>();
        queue([mark] { mark->reach(); });
        return mark;
    }

private:
    void run() {
        for (;;) {
            std::function<void()> work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                more_.wait(lock, [&] { return ends_ || !queued_.empty(); });
                if (queued_.empty()) return;
                work = std::move(queued_.front());
                queued_.pop_front();
            }
            // Late, and for a while very late.
            u32 dice = twin::random() % 16;
            if (dice == 0) is_slow_ = !is_slow_;
            if (is_slow_) std::this_thread::sleep_for(std::chrono::milliseconds(4));
            else if (dice < 6) std::this_thread::sleep_for(std::chrono::microseconds(50 * dice));
            work();
        }
    }

    std::mutex mutex_;
    std::condition_variable more_;
    std::deque<std::function<void()>> queued_;
    bool ends_ = false;
    bool is_slow_ = twin::random() % 3 == 0;  // the thread's own
    std::thread thread_;  // last: it uses the others
};

struct Event {
    bool times = false;
    std::shared_ptr<Mark> latest;  // none before it is recorded
};

struct Module {
    std::string code;
};

struct Function {
    std::string name;
    u32 allowed = SHARED_WITHOUT_LEAVE;
};

struct Block {
    std::vector<u64> words;
    size_t bytes;
};

// Everything that lives, behind one lock.
struct World {
    std::mutex mutex;
    bool initialised = false;
    size_t contexts = 0;
    std::map<void*, std::shared_ptr<Stream>> streams;
    // Streams that were destroyed and have work left.
    size_t ending = 0;
    std::condition_variable ended;
    std::map<void*, std::unique_ptr<Event>> events;
    std::map<void*, std::unique_ptr<Module>> modules;
    std::map<void*, std::unique_ptr<Function>> functions;
    std::map<u64, Block> device, host;
    std::set<u64> registered;
    // Freed memory, kept for a while: who still uses it finds rubbish and does no other harm.
    std::deque<Block> freed;
};

World& world() {
    // Never destroyed: threads may outlive the program's end.
    static World* world = new World;
    return *world;
}

int context_token;
thread_local void* bound = nullptr;

std::atomic<u64> calls{0}, fail_at{0}, faults{0}, dice{0x9E3779B97F4A7C15ull};

// The allocation that holds all of these bytes, or none. The lock is held.
Block* holds(std::map<u64, Block>& blocks, u64 address, size_t count) {
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    auto found = std::prev(after);
    u64 offset = address - found->first;
    bool fits = offset <= found->second.bytes && count <= found->second.bytes - offset;
    return fits ? &found->second : nullptr;
}

bool on_device(u64 address, size_t count) {
    std::lock_guard<std::mutex> lock(world().mutex);
    return holds(world().device, address, count) != nullptr;
}

Status make_block(std::map<u64, Block>& blocks, size_t bytes, u64* address) {
    if (bytes == 0 || address == nullptr) return INVALID_VALUE;
    // 256 bytes more than needed, so that the address can be a multiple of 256.
    Block block = {std::vector<u64>(bytes / 8 + 33, 0xCBCBCBCBCBCBCBCBull), bytes};
    *address = (reinterpret_cast<u64>(block.words.data()) + 255) / 256 * 256;
    std::lock_guard<std::mutex> lock(world().mutex);
    blocks.emplace(*address, std::move(block));
    return SUCCESS;
}

Status free_block(std::map<u64, Block>& blocks, u64 address) {
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = blocks.find(address);
    if (found == blocks.end()) return INVALID_VALUE;
    std::fill(found->second.words.begin(), found->second.words.end(), 0xDDDDDDDDDDDDDDDDull);
    world().freed.push_back(std::move(found->second));
    blocks.erase(found);
    size_t kept = 0;
    for (const Block& block : world().freed) kept += block.bytes;
    while (kept > (size_t(256) << 20)) {
        kept -= world().freed.front().bytes;
        world().freed.pop_front();
    }
    return SUCCESS;
}

std::shared_ptr<Stream> stream_of(void* handle) {
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().streams.find(handle);
    return found == world().streams.end() ? nullptr : found->second;
}

// All streams drained, as they are now.
void drain() {
    std::vector<std::shared_ptr<Mark>> marks;
    {
        std::lock_guard<std::mutex> lock(world().mutex);
        for (auto& [handle, stream] : world().streams) marks.push_back(stream->mark());
    }
    for (auto& mark : marks) mark->wait();
    std::unique_lock<std::mutex> lock(world().mutex);
    world().ended.wait(lock, [] { return world().ending == 0; });
}

void copy(u64 to, u64 from, size_t count, bool to_device, bool from_device) {
    auto lives = [&](u64 address, bool device) {
        std::lock_guard<std::mutex> lock(world().mutex);
        if (device) return holds(world().device, address, count) != nullptr;
        // Host memory may be anybody's, but not what was page-locked and is freed.
        return true;
    };
    if (!lives(to, to_device) || !lives(from, from_device)) {
        return twin::fault("a copy to or from device memory that was freed");
    }
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), count);
}

// What a kernel reads and writes lies in memory that lives.
bool view_lives(const Batch& batch, const View& view) {
    u64 last = u64(view.height - 1) * view.pitch + u64(view.width) * 3;
    u64 first = view.frame + u64(view.top) * view.pitch + u64(view.left) * 3;
    u64 side = view.patch == 0 ? view.side : view.patch;
    u64 numbers = side * side * 3 * view.count;
    return on_device(first, last) && on_device(view.out, numbers * (batch.bf16 ? 2 : 4));
}

void run_views(const Batch& batch, u32 blocks, u32 shared_bytes) {
    // One thread a block: the source is written for any number.
    Barrier barrier(1);
    std::vector<u32> partial(1);
    HostBlock block = {0, barrier, partial};
    if (!on_device(batch.views, batch.count * sizeof(View)) ||
        (batch.scratch_bytes > 0 && !on_device(batch.scratch, batch.scratch_bytes * blocks))) {
        return twin::fault("a kernel's plans or scratch memory were freed");
    }
    // A GPU's blocks begin together, and end when they end: some views are of what their frames hold
    // now, the others of what they hold later on.
    std::vector<View> views(batch.count);
    std::memcpy(views.data(), reinterpret_cast<const void*>(batch.views),
                views.size() * sizeof(View));
    std::deque<std::vector<u8>> early;
    for (View& view : views) {
        if (!view_lives(batch, view)) {
            return twin::fault("a kernel's frame or tensor was freed, or is too short");
        }
        if (twin::random() % 2 == 0) continue;
        auto bytes = reinterpret_cast<const u8*>(view.frame);
        u64 last = u64(view.top + view.height - 1) * view.pitch + u64(view.left + view.width) * 3;
        early.emplace_back(bytes, bytes + last);
        view.frame = reinterpret_cast<u64>(early.back().data());
    }
    const u64 guard = 0xA5A5A5A5A5A5A5A5ull;
    size_t words = shared_bytes / 8 + (shared_bytes % 8 ? 1 : 0);
    std::vector<u64> shared(words + 8);
    for (u32 at = 0; at < blocks; at++) {
        std::fill(shared.begin(), shared.end(), guard);
        u8* own = reinterpret_cast<u8*>(shared.data());
        fill_table(block, batch, own);
        u8* scratch = reinterpret_cast<u8*>(batch.scratch + at * batch.scratch_bytes);
        for (u32 i = at; i < batch.count; i += blocks) {
            render(block, batch, views[i], own, scratch);
        }
        for (size_t word = words; word < shared.size(); word++) {
            if (shared[word] != guard) return twin::fault("a kernel left its shared memory");
        }
    }
}

void run_normalise(const Batch& batch, u64 from, u64 out, u64 count) {
    if (!on_device(from, count) || !on_device(out, count * (batch.bf16 ? 2 : 4))) {
        return twin::fault("bytes or numbers of a normalisation were freed, or are too short");
    }
    Barrier barrier(1);
    std::vector<u32> partial(1);
    HostBlock block = {0, barrier, partial};
    std::vector<float> table(3 * 256);
    fill_table(block, batch, reinterpret_cast<u8*>(table.data()));
    const u8* bytes = reinterpret_cast<const u8*>(from);
    for (u64 i = 0; i < count; i++) put(batch, out, i, table[(i % 3) * 256 + bytes[i]]);
}

template <class T>
T argument(void** arguments, size_t at) {
    T value;
    std::memcpy(&value, arguments[at], sizeof value);
    return value;
}

// What every call begins with. Those that need a context ask for it too.
#define BEGIN()                                      \
    do {                                             \
        if (!world().initialised) return NOT_INITIALIZED; \
        if (!twin::call()) return LAUNCH_FAILED;     \
    } while (0)
#define BEGIN_IN_CONTEXT()                           \
    do {                                             \
        BEGIN();                                     \
        if (!twin::current()) return INVALID_CONTEXT; \
    } while (0)

}  // namespace

namespace twin {

bool call() { return ++calls != fail_at.load(); }

bool current() { return bound != nullptr; }

void fault(const char* what) {
    faults++;
    std::fprintf(stderr, "fault: %s\n", what);
}

bool queue(void* handle, std::function<void()> work) {
    auto stream = stream_of(handle);
    if (!stream) return false;
    stream->queue(std::move(work));
    return true;
}

void write(uint64_t to, const void* from, size_t count) {
    if (!on_device(to, count)) return fault("a picture for device memory that is not there");
    std::memcpy(reinterpret_cast<void*>(to), from, count);
}

uint32_t random() {
    // Steps of a Weyl sequence, mixed.
    u64 value = dice.fetch_add(0x9E3779B97F4A7C15ull);
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    return uint32_t(value >> 32);
}

}  // namespace twin

#pragma GCC visibility push(default)
extern "C" {

// ---- For the tests.

// Calls so far.
u64 detco_twin_calls() { return calls; }

// Lets the call of that number fail; 0 for none. Begins to count anew.
void detco_twin_fail_at(u64 number) {
    fail_at = number;
    calls = 0;
}

// Lets a stream stand still for so long when it gets there. 0, or 1 where there is no such stream.
int detco_twin_hold(void* stream, u64 ms) {
    auto rest = [ms] { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); };
    return twin::queue(stream, rest) ? 0 : 1;
}

// What a GPU would not have forgiven, so far.
u64 detco_twin_faults() { return faults; }

// Objects that live: contexts, streams, events, modules, allocations on the device, in page-locked
// memory, page-locked memory of others.
void detco_twin_live(u64* counts) {
    std::lock_guard<std::mutex> lock(world().mutex);
    const World& all = world();
    const size_t found[] = {all.contexts,      all.streams.size(), all.events.size(),
                            all.modules.size(), all.device.size(),  all.host.size(),
                            all.registered.size()};
    std::copy(std::begin(found), std::end(found), counts);
}

// ---- The driver.

int cuInit(unsigned flags) {
    std::lock_guard<std::mutex> lock(world().mutex);
    world().initialised = true;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

// What NVRTC looks for in a driver, and does without: tables that NVIDIA does not publish.
int cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}

int cuGetErrorName(int, const char** name) {
    *name = "CUDA_ERROR_OF_THE_TWIN";
    return SUCCESS;
}

int cuGetErrorString(int, const char** words) {
    *words = "what the driver's twin says";
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    BEGIN();
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    BEGIN();
    if (ordinal != 0) return INVALID_DEVICE;
    *device = 0;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int room, int device) {
    BEGIN();
    if (device != 0 || room <= 0) return INVALID_VALUE;
    std::snprintf(name, size_t(room), "host memory");
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int which, int device) {
    BEGIN();
    auto found = ATTRIBUTES.find(which);
    if (device != 0 || found == ATTRIBUTES.end()) return INVALID_VALUE;
    *value = found->second;
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    BEGIN();
    if (device != 0) return INVALID_DEVICE;
    *bytes = size_t(80) << 30;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    BEGIN();
    if (device != 0) return INVALID_DEVICE;
    std::lock_guard<std::mutex> lock(world().mutex);
    world().contexts++;
    *context = &context_token;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    BEGIN();
    std::lock_guard<std::mutex> lock(world().mutex);
    if (device != 0 || world().contexts == 0) return INVALID_CONTEXT;
    world().contexts--;
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    BEGIN();
    if (context != &context_token) return INVALID_CONTEXT;
    bound = context;
    return SUCCESS;
}

int cuCtxSynchronize() {
    BEGIN_IN_CONTEXT();
    drain();
    return SUCCESS;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    BEGIN_IN_CONTEXT();
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    BEGIN_IN_CONTEXT();
    *free = size_t(79) << 30;
    *total = size_t(80) << 30;
    return SUCCESS;
}

int cuStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
    BEGIN_IN_CONTEXT();
    if (flags > 1 || priority > 0 || priority < -5) return INVALID_VALUE;
    auto stream = std::make_shared<Stream>();
    *handle = stream.get();
    std::lock_guard<std::mutex> lock(world().mutex);
    world().streams.emplace(*handle, stream);
    return SUCCESS;
}

int cuStreamDestroy_v2(void* handle) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().streams.find(handle);
    if (found == world().streams.end()) return INVALID_HANDLE;
    // What is queued still runs, and nobody waits for it here.
    std::thread([last = std::move(found->second)]() mutable {
        last.reset();
        std::lock_guard<std::mutex> lock(world().mutex);
        world().ending--;
        world().ended.notify_all();
    }).detach();
    world().ending++;
    world().streams.erase(found);
    return SUCCESS;
}

int cuStreamSynchronize(void* handle) {
    BEGIN_IN_CONTEXT();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->mark()->wait();
    return SUCCESS;
}

int cuEventCreate(void** handle, unsigned flags) {
    BEGIN_IN_CONTEXT();
    const unsigned blocking = 1, no_timing = 2;
    if ((flags & ~(blocking | no_timing)) != 0) return INVALID_VALUE;
    auto event = std::make_unique<Event>();
    event->times = (flags & no_timing) == 0;
    *handle = event.get();
    std::lock_guard<std::mutex> lock(world().mutex);
    world().events.emplace(*handle, std::move(event));
    return SUCCESS;
}

int cuEventDestroy_v2(void* handle) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    return world().events.erase(handle) == 1 ? SUCCESS : INVALID_HANDLE;
}

int cuEventRecord(void* handle, void* stream_handle) {
    BEGIN_IN_CONTEXT();
    auto stream = stream_of(stream_handle);
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().events.find(handle);
    if (!stream || found == world().events.end()) return INVALID_HANDLE;
    found->second->latest = stream->mark();
    return SUCCESS;
}

}  // extern "C"
#pragma GCC visibility pop

// The event's latest mark, which is none before it is recorded.
static Status latest(void* handle, std::shared_ptr<Mark>* mark, bool* times = nullptr) {
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().events.find(handle);
    if (found == world().events.end()) return INVALID_HANDLE;
    *mark = found->second->latest;
    if (times != nullptr) *times = found->second->times;
    return SUCCESS;
}

#pragma GCC visibility push(default)
extern "C" {

int cuStreamWaitEvent(void* stream_handle, void* event, unsigned flags) {
    BEGIN_IN_CONTEXT();
    auto stream = stream_of(stream_handle);
    if (!stream || flags != 0) return INVALID_HANDLE;
    std::shared_ptr<Mark> mark;
    if (Status status = latest(event, &mark)) return status;
    if (mark) stream->queue([mark] { mark->wait(); });
    return SUCCESS;
}

int cuEventQuery(void* event) {
    BEGIN_IN_CONTEXT();
    std::shared_ptr<Mark> mark;
    if (Status status = latest(event, &mark)) return status;
    return !mark || mark->done() ? SUCCESS : NOT_READY;
}

int cuEventSynchronize(void* event) {
    BEGIN_IN_CONTEXT();
    std::shared_ptr<Mark> mark;
    if (Status status = latest(event, &mark)) return status;
    if (mark) mark->wait();
    return SUCCESS;
}

int cuEventElapsedTime_v2(float* ms, void* start, void* end) {
    BEGIN_IN_CONTEXT();
    std::shared_ptr<Mark> marks[2];
    bool times[2];
    if (Status status = latest(start, &marks[0], &times[0])) return status;
    if (Status status = latest(end, &marks[1], &times[1])) return status;
    if (!marks[0] || !marks[1] || !times[0] || !times[1]) return INVALID_HANDLE;
    if (!marks[0]->done() || !marks[1]->done()) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(marks[1]->at - marks[0]->at).count();
    return SUCCESS;
}

int cuMemAlloc_v2(u64* address, size_t bytes) {
    BEGIN_IN_CONTEXT();
    return make_block(world().device, bytes, address);
}

// Frees at once, whatever is queued: whoever calls it has waited.
int cuMemFree_v2(u64 address) {
    BEGIN_IN_CONTEXT();
    return free_block(world().device, address);
}

int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    BEGIN_IN_CONTEXT();
    if (flags > 7) return INVALID_VALUE;
    u64 address = 0;
    Status status = make_block(world().host, bytes, &address);
    *pointer = reinterpret_cast<void*>(address);
    return status;
}

int cuMemFreeHost(void* pointer) {
    BEGIN_IN_CONTEXT();
    return free_block(world().host, reinterpret_cast<u64>(pointer));
}

int cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned flags) {
    BEGIN_IN_CONTEXT();
    if (pointer == nullptr || bytes == 0 || flags > 15) return INVALID_VALUE;
    std::lock_guard<std::mutex> lock(world().mutex);
    bool is_new = world().registered.insert(reinterpret_cast<u64>(pointer)).second;
    return is_new ? SUCCESS : ALREADY_REGISTERED;
}

int cuMemHostUnregister(void* pointer) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    bool was = world().registered.erase(reinterpret_cast<u64>(pointer)) == 1;
    return was ? SUCCESS : NOT_REGISTERED;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t count, void* stream) {
    BEGIN_IN_CONTEXT();
    if (count == 0) return SUCCESS;
    if (from == nullptr || !on_device(to, count)) return INVALID_VALUE;
    u64 source = reinterpret_cast<u64>(from);
    bool queued = twin::queue(stream, [=] { copy(to, source, count, true, false); });
    return queued ? SUCCESS : INVALID_HANDLE;
}

int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t count, void* stream) {
    BEGIN_IN_CONTEXT();
    if (count == 0) return SUCCESS;
    if (to == nullptr || !on_device(from, count)) return INVALID_VALUE;
    u64 target = reinterpret_cast<u64>(to);
    bool queued = twin::queue(stream, [=] { copy(target, from, count, false, true); });
    return queued ? SUCCESS : INVALID_HANDLE;
}

int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t count, void* stream) {
    BEGIN_IN_CONTEXT();
    if (count == 0) return SUCCESS;
    if (!on_device(to, count) || !on_device(from, count)) return INVALID_VALUE;
    bool queued = twin::queue(stream, [=] { copy(to, from, count, true, true); });
    return queued ? SUCCESS : INVALID_HANDLE;
}

// Takes machine code (an ELF file) or PTX, which is text.
int cuModuleLoadData(void** handle, const void* image) {
    BEGIN_IN_CONTEXT();
    auto bytes = static_cast<const u8*>(image);
    auto module = std::make_unique<Module>();
    if (std::memcmp(bytes, "\x7f" "ELF", 4) == 0) {
        // An ELF-64 file ends with its section headers, or before: their place, size and number.
        u64 place = 0;
        std::memcpy(&place, bytes + 40, 8);
        u64 end = place + u64(bytes[58] | bytes[59] << 8) * u64(bytes[60] | bytes[61] << 8);
        module->code.assign(reinterpret_cast<const char*>(bytes), end);
    } else {
        module->code = reinterpret_cast<const char*>(bytes);
        if (module->code.find(".version") == std::string::npos) return INVALID_IMAGE;
    }
    *handle = module.get();
    std::lock_guard<std::mutex> lock(world().mutex);
    world().modules.emplace(*handle, std::move(module));
    return SUCCESS;
}

int cuModuleUnload(void* handle) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    return world().modules.erase(handle) == 1 ? SUCCESS : INVALID_HANDLE;
}

int cuModuleGetFunction(void** handle, void* module, const char* name) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().modules.find(module);
    if (found == world().modules.end()) return INVALID_HANDLE;
    if (found->second->code.find(name) == std::string::npos) return NOT_FOUND;
    auto function = std::make_unique<Function>();
    function->name = name;
    *handle = function.get();
    world().functions.emplace(*handle, std::move(function));
    return SUCCESS;
}

int cuFuncSetAttribute(void* handle, int which, int value) {
    BEGIN_IN_CONTEXT();
    std::lock_guard<std::mutex> lock(world().mutex);
    auto found = world().functions.find(handle);
    if (found == world().functions.end()) return INVALID_HANDLE;
    if (which != MAX_DYNAMIC_SHARED || value < 0 || value > int(SHARED_PER_BLOCK)) {
        return INVALID_VALUE;
    }
    found->second->allowed = u32(value);
    return SUCCESS;
}

int cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                   void** arguments, void** extra) {
    BEGIN_IN_CONTEXT();
    std::string name;
    {
        std::lock_guard<std::mutex> lock(world().mutex);
        auto found = world().functions.find(handle);
        if (found == world().functions.end()) return INVALID_HANDLE;
        if (shared > found->second->allowed) return INVALID_VALUE;
        name = found->second->name;
    }
    u64 threads = u64(threads_x) * threads_y * threads_z;
    bool whole_warps = threads > 0 && threads % 32 == 0 && threads <= THREADS_PER_BLOCK;
    if (x == 0 || y != 1 || z != 1 || !whole_warps || extra != nullptr) return INVALID_VALUE;
    // The arguments' values are taken now, as the driver does.
    std::function<void()> work;
    Batch batch = argument<Batch>(arguments, 0);
    if (name == "detco_views") {
        work = [=] { run_views(batch, x, shared); };
    } else if (name == "detco_normalise") {
        u64 from = argument<u64>(arguments, 1), out = argument<u64>(arguments, 2);
        u64 count = argument<u64>(arguments, 3);
        work = [=] { run_normalise(batch, from, out, count); };
    } else {
        return NOT_FOUND;
    }
    return twin::queue(stream, std::move(work)) ? SUCCESS : INVALID_HANDLE;
}

}  // extern "C"
#pragma GCC visibility pop
