// The twin of nvJPEG: `libnvjpeg.so.13` in host memory, with the functions that detco-shards calls.
// What decodes is the test's own decoder, set beforehand.
//
// The host's part of an image is done when it is called, the device's when the stream gets there; the
// batch decoder writes its pictures at either time, as the hardware engine may. Buffers that are
// touched while queued work still needs them are a fault.
//
// Numbers are those of nvjpeg.h 13.0.

#include "driver.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    INVALID_PARAMETER = 2,
    BAD_JPEG = 3,
    JPEG_NOT_SUPPORTED = 4,
    EXECUTION_FAILED = 6,
};

// What the batch decoder takes of an image.
enum Kind { ALL = 0, NOT_IN_BATCHES = 1, NOT_AT_ALL = 2 };

// Reads a JPEG's size (width, height) and kind, and with a place for them its pixels `[height, width,
// 3]`. 0 where it is one.
using Decode = int (*)(const uint8_t* jpeg, size_t length, uint32_t* size, int* kind, uint8_t* rgb);

std::atomic<Decode> decode{nullptr};

const int HYBRID = 1, HARDWARE = 3, RGBI = 5, CSS_444 = 0;
const unsigned INTERPOLATED = 32, STRICT = 4;

struct Handle {
    int backend;
};

// Memory that queued work may use; shared with that work.
struct Buffer {
    Bytes bytes;
    std::atomic<int> users{0};
};

struct Jpeg {
    const uint8_t* bytes = nullptr;
    size_t length = 0;
    uint32_t size[2] = {0, 0};
    int kind = NOT_AT_ALL;
};

struct State {
    bool is_batch;
    std::shared_ptr<Buffer>*pinned = nullptr, *device = nullptr;
    uint32_t size[2] = {0, 0};
    int batch = 0;
    std::shared_ptr<Buffer> own = std::make_shared<Buffer>();
};

struct Params {
    int format = 0;
};

// nvjpegImage_t.
struct Image {
    uint8_t* channel[4];
    size_t pitch[4];
};

void unused(const Buffer& buffer, const char* what) {
    if (buffer.users > 0) twin::fault(what);
}

// Queues work that uses a buffer until it is done.
bool queue_with(void* stream, const std::shared_ptr<Buffer>& buffer,
                const std::function<void()>& work) {
    buffer->users++;
    bool queued = twin::queue(stream, [=] {
        work();
        buffer->users--;
    });
    if (!queued) buffer->users--;
    return queued;
}

void put_picture(const Bytes& pixels, const uint32_t* size, uint64_t to, size_t pitch) {
    // Some pictures take the device longer than a worker's next one takes the host.
    if (uint32_t dice = twin::random() % 64; dice < 20) {
        std::this_thread::sleep_for(std::chrono::milliseconds(dice));
    }
    size_t row = size_t(size[0]) * 3;
    for (uint32_t y = 0; y < size[1]; y++) twin::write(to + y * pitch, &pixels[y * row], row);
}

Status parse(const uint8_t* bytes, size_t length, Jpeg* jpeg) {
    jpeg->bytes = bytes;
    jpeg->length = length;
    Decode with = decode;
    if (with == nullptr) return NOT_INITIALIZED;
    return with(bytes, length, jpeg->size, &jpeg->kind, nullptr) == 0 ? SUCCESS : BAD_JPEG;
}

#define BEGIN()                                            \
    do {                                                   \
        if (!twin::call()) return EXECUTION_FAILED;        \
    } while (0)
#define BEGIN_IN_CONTEXT()                                 \
    do {                                                   \
        BEGIN();                                           \
        if (!twin::current()) return EXECUTION_FAILED;     \
    } while (0)

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// For the tests: what decodes.
void detco_twin_decode_with(Decode with) { decode = with; }

int nvjpegGetProperty(int which, int* value) {
    const int version[] = {13, 0, 0};
    if (which < 0 || which > 2) return INVALID_PARAMETER;
    *value = version[which];
    return SUCCESS;
}

int nvjpegCreateEx(int backend, void* device, void* pinned, unsigned flags, Handle** handle) {
    BEGIN_IN_CONTEXT();
    bool known = backend == HYBRID || backend == HARDWARE;
    unsigned wanted = INTERPOLATED | (backend == HYBRID ? STRICT : 0);
    if (!known || device || pinned || flags != wanted) return INVALID_PARAMETER;
    *handle = new Handle{backend};
    return SUCCESS;
}

int nvjpegDestroy(Handle* handle) {
    BEGIN_IN_CONTEXT();
    delete handle;
    return SUCCESS;
}

int nvjpegSetDeviceMemoryPadding(size_t, Handle*) {
    BEGIN();
    return SUCCESS;
}

int nvjpegSetPinnedMemoryPadding(size_t, Handle*) {
    BEGIN();
    return SUCCESS;
}

int nvjpegGetHardwareDecoderInfo(Handle* handle, unsigned* engines, unsigned* cores) {
    BEGIN_IN_CONTEXT();
    *engines = handle->backend == HARDWARE ? 1 : 0;
    *cores = 7;
    return SUCCESS;
}

int nvjpegJpegStateCreate(Handle* handle, State** state) {
    BEGIN_IN_CONTEXT();
    if (handle->backend != HARDWARE) return INVALID_PARAMETER;
    *state = new State{true};
    return SUCCESS;
}

int nvjpegDecoderStateCreate(Handle*, int* decoder, State** state) {
    BEGIN_IN_CONTEXT();
    if (*decoder != HYBRID) return INVALID_PARAMETER;
    *state = new State{false};
    return SUCCESS;
}

int nvjpegJpegStateDestroy(State* state) {
    BEGIN_IN_CONTEXT();
    unused(*state->own, "a state is destroyed while its work is queued");
    delete state;
    return SUCCESS;
}

int nvjpegDecodeBatchedInitialize(Handle*, State* state, int count, int threads, int format) {
    BEGIN_IN_CONTEXT();
    if (!state->is_batch || count <= 0 || threads <= 0 || format != RGBI) return INVALID_PARAMETER;
    unused(*state->own, "a batch's state is reset while its last batch is queued");
    state->batch = count;
    return SUCCESS;
}

int nvjpegDecodeBatchedPreAllocate(Handle*, State* state, int count, int width, int height, int sampling,
                                   int format) {
    BEGIN_IN_CONTEXT();
    bool sizes = count > 0 && width > 0 && height > 0 && sampling == CSS_444 && format == RGBI;
    unused(*state->own, "a batch's state is given memory while its last batch is queued");
    return state->is_batch && sizes ? SUCCESS : INVALID_PARAMETER;
}

int nvjpegDecodeBatched(Handle*, State* state, const uint8_t* const* bytes, const size_t* lengths,
                        Image* images, void* stream) {
    BEGIN_IN_CONTEXT();
    if (!state->is_batch || state->batch == 0) return INVALID_PARAMETER;
    Decode with = decode;
    if (with == nullptr) return NOT_INITIALIZED;
    std::vector<std::function<void()>> late;
    for (int at = 0; at < state->batch; at++) {
        Jpeg jpeg;
        if (Status status = parse(bytes[at], lengths[at], &jpeg)) return status;
        if (jpeg.kind != ALL) return JPEG_NOT_SUPPORTED;
        Bytes pixels(size_t(jpeg.size[0]) * jpeg.size[1] * 3);
        if (with(jpeg.bytes, jpeg.length, jpeg.size, &jpeg.kind, pixels.data()) != 0) {
            return BAD_JPEG;
        }
        uint64_t to = reinterpret_cast<uint64_t>(images[at].channel[0]);
        size_t pitch = images[at].pitch[0];
        uint32_t width = jpeg.size[0], height = jpeg.size[1];
        auto put = [=, pixels = std::move(pixels)] {
            const uint32_t size[] = {width, height};
            put_picture(pixels, size, to, pitch);
        };
        if (twin::random() % 2 == 0) put();
        else late.push_back(put);
    }
    if (twin::random() % 4 != 0) {
        // A batch takes longer than what follows it.
        auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(100)); };
        if (!queue_with(stream, state->own, rest)) return INVALID_PARAMETER;
    }
    for (const auto& put : late) {
        if (!queue_with(stream, state->own, put)) return INVALID_PARAMETER;
    }
    return queue_with(stream, state->own, [] {}) ? SUCCESS : INVALID_PARAMETER;
}

int nvjpegDecodeBatchedSupported(Handle*, Jpeg* jpeg, int* refused) {
    BEGIN_IN_CONTEXT();
    *refused = jpeg->kind == ALL ? 0 : 1;
    return SUCCESS;
}

int nvjpegJpegStreamCreate(Handle*, Jpeg** jpeg) {
    BEGIN_IN_CONTEXT();
    *jpeg = new Jpeg;
    return SUCCESS;
}

int nvjpegJpegStreamDestroy(Jpeg* jpeg) {
    BEGIN_IN_CONTEXT();
    delete jpeg;
    return SUCCESS;
}

int nvjpegJpegStreamParse(Handle*, const uint8_t* bytes, size_t length, int metadata, int keep,
                          Jpeg* jpeg) {
    BEGIN_IN_CONTEXT();
    return metadata == 0 && keep == 0 ? parse(bytes, length, jpeg) : INVALID_PARAMETER;
}

int nvjpegJpegStreamGetFrameDimensions(Jpeg* jpeg, unsigned* width, unsigned* height) {
    BEGIN_IN_CONTEXT();
    *width = jpeg->size[0];
    *height = jpeg->size[1];
    return SUCCESS;
}

int nvjpegDecodeParamsCreate(Handle*, Params** params) {
    BEGIN_IN_CONTEXT();
    *params = new Params;
    return SUCCESS;
}

int nvjpegDecodeParamsDestroy(Params* params) {
    BEGIN_IN_CONTEXT();
    delete params;
    return SUCCESS;
}

int nvjpegDecodeParamsSetOutputFormat(Params* params, int format) {
    BEGIN_IN_CONTEXT();
    params->format = format;
    return SUCCESS;
}

int nvjpegDecodeParamsSetROI(Params*, int left, int top, int width, int height) {
    BEGIN_IN_CONTEXT();
    bool whole = left == 0 && top == 0 && width == -1 && height == -1;
    return whole ? SUCCESS : INVALID_PARAMETER;
}

int nvjpegDecodeParamsSetAllowCMYK(Params*, int allow) {
    BEGIN_IN_CONTEXT();
    return allow == 0 ? SUCCESS : INVALID_PARAMETER;
}

int nvjpegDecodeParamsSetExifOrientation(Params*, int) {
    BEGIN_IN_CONTEXT();
    return SUCCESS;
}

int nvjpegDecoderCreate(Handle*, int backend, int** decoder) {
    BEGIN_IN_CONTEXT();
    *decoder = new int(backend);
    return SUCCESS;
}

int nvjpegDecoderDestroy(int* decoder) {
    BEGIN_IN_CONTEXT();
    delete decoder;
    return SUCCESS;
}

int nvjpegDecoderJpegSupported(int*, Jpeg* jpeg, Params* params, int* refused) {
    BEGIN_IN_CONTEXT();
    *refused = jpeg->kind == NOT_AT_ALL || params->format != RGBI ? 1 : 0;
    return SUCCESS;
}

int nvjpegBufferPinnedCreate(Handle*, void*, std::shared_ptr<Buffer>** buffer) {
    BEGIN_IN_CONTEXT();
    *buffer = new std::shared_ptr<Buffer>(new Buffer);
    return SUCCESS;
}

int nvjpegBufferPinnedDestroy(std::shared_ptr<Buffer>* buffer) {
    BEGIN_IN_CONTEXT();
    unused(**buffer, "page-locked memory of a lane is freed while a copy reads it");
    delete buffer;
    return SUCCESS;
}

int nvjpegBufferDeviceCreate(Handle*, void*, std::shared_ptr<Buffer>** buffer) {
    BEGIN_IN_CONTEXT();
    *buffer = new std::shared_ptr<Buffer>(new Buffer);
    return SUCCESS;
}

int nvjpegBufferDeviceDestroy(std::shared_ptr<Buffer>* buffer) {
    BEGIN_IN_CONTEXT();
    unused(**buffer, "device memory of a lane is freed while it is used");
    delete buffer;
    return SUCCESS;
}

int nvjpegStateAttachPinnedBuffer(State* state, std::shared_ptr<Buffer>* buffer) {
    BEGIN_IN_CONTEXT();
    state->pinned = buffer;
    return SUCCESS;
}

int nvjpegStateAttachDeviceBuffer(State* state, std::shared_ptr<Buffer>* buffer) {
    BEGIN_IN_CONTEXT();
    state->device = buffer;
    return SUCCESS;
}

int nvjpegDecodeJpegHost(Handle*, int*, State* state, Params*, Jpeg* jpeg) {
    BEGIN_IN_CONTEXT();
    Decode with = decode;
    if (with == nullptr || state->pinned == nullptr) return NOT_INITIALIZED;
    Buffer& pinned = **state->pinned;
    unused(pinned, "a lane is used again while a copy reads its page-locked memory");
    std::memcpy(state->size, jpeg->size, sizeof state->size);
    pinned.bytes.assign(size_t(jpeg->size[0]) * jpeg->size[1] * 3, 0);
    int kind;
    bool good = with(jpeg->bytes, jpeg->length, jpeg->size, &kind, pinned.bytes.data()) == 0;
    return good ? SUCCESS : BAD_JPEG;
}

int nvjpegDecodeJpegTransferToDevice(Handle*, int*, State* state, Jpeg*, void* stream) {
    BEGIN_IN_CONTEXT();
    if (state->pinned == nullptr || state->device == nullptr) return NOT_INITIALIZED;
    std::shared_ptr<Buffer> from = *state->pinned, to = *state->device;
    unused(*to, "a lane's device memory is written while it is used");
    bool queued = queue_with(stream, from, [=] { to->bytes = from->bytes; });
    return queued ? SUCCESS : INVALID_PARAMETER;
}

int nvjpegDecodeJpegDevice(Handle*, int*, State* state, Image* image, void* stream) {
    BEGIN_IN_CONTEXT();
    if (state->device == nullptr) return NOT_INITIALIZED;
    std::shared_ptr<Buffer> from = *state->device;
    uint32_t width = state->size[0], height = state->size[1];
    uint64_t to = reinterpret_cast<uint64_t>(image->channel[0]);
    size_t pitch = image->pitch[0];
    if (pitch < size_t(width) * 3) return INVALID_PARAMETER;
    bool queued = queue_with(stream, from, [=] {
        const uint32_t size[] = {width, height};
        put_picture(from->bytes, size, to, pitch);
    });
    return queued ? SUCCESS : INVALID_PARAMETER;
}

}  // extern "C"
#pragma GCC visibility pop
