// Stores, process groups and the reducer of libtorch's distributed engine, c10d.
//
// Four handles: Store (a connection to a TCPStore, under a prefix), Group (a process group),
// Work (a collective that runs), Reducer (gradients averaged in buckets during backward).
#define USE_C10D_GLOO
#include "c10d.h"

#include <c10/util/Logging.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace detco {
namespace {

// Counts the live handles of a type.
template <class T>
struct Counted {
  static std::atomic<int64_t> live;
  Counted() { ++live; }
  ~Counted() { --live; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
};
template <class T>
std::atomic<int64_t> Counted<T>::live{0};

struct Store : Counted<Store> {
  explicit Store(StorePtr store) : store(std::move(store)) {}
  StorePtr store;
};

struct Group : Counted<Group> {
  BackendPtr backend;
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  at::Device device = at::kCPU;
};

struct Work : Counted<Work> {
  explicit Work(c10::intrusive_ptr<c10d::Work> work) : work(std::move(work)) {}
  c10::intrusive_ptr<c10d::Work> work;
};

// Keeps the buckets that it begins with. DistributedDataParallel makes them anew after its first backward
// pass, in the order in which gradients came: a run that is started again would then sum one step in other
// buckets than a run that was never stopped, and differ from it in the last bits.
struct FixedBuckets : c10d::Reducer {
  using c10d::Reducer::Reducer;
  void keep() { has_rebuilt_bucket_ = true; }
};

struct Reducer : Counted<Reducer> {
  std::unique_ptr<FixedBuckets> reducer;
};

// Sends the mean of a bucket as bfloat16: half the bytes, eight bits of mantissa.
class Bf16Hook : public c10d::CppCommHookInterface<c10::intrusive_ptr<c10d::ProcessGroup>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    auto bytes = at::div(bucket.getBuffer(), state_->getSize()).to(at::kBFloat16);
    std::vector<at::Tensor> tensors = {bytes};
    auto sent = state_->allreduce(tensors)->getFuture();
    auto whole = bucket.getBuffer();
    auto back = [whole](c10::ivalue::Future& sent) {
      whole.copy_(sent.value().toTensorVector()[0]);
      return c10::IValue(whole);
    };
    return sent->then(back, c10::TensorType::get());
  }
};

std::string text(const char* bytes, int64_t length) {
  return std::string(bytes, static_cast<size_t>(length));
}

Group* grouped(const Store& store, BackendPtr backend, at::Device device,
               c10d::ProcessGroup::BackendType type) {
  auto handle = std::make_unique<Group>();
  handle->backend = std::move(backend);
  handle->group = c10::make_intrusive<c10d::ProcessGroup>(
      store.store, handle->backend->getRank(), handle->backend->getSize());
  handle->group->setBackend(device.type(), type, handle->backend);
  handle->device = device;
  return handle.release();
}

// Loads the library in `image` from a file in memory. It stays loaded.
OpenNccl load(const uint8_t* image, int64_t image_len) {
  const int file = memfd_create("libdetco_nccl.so", MFD_CLOEXEC);
  if (file < 0) throw std::runtime_error(std::string("memfd_create: ") + strerror(errno));
  for (int64_t at = 0; at < image_len;) {
    const auto written = write(file, image + at, static_cast<size_t>(image_len - at));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      const std::string reason = strerror(errno);
      close(file);
      throw std::runtime_error("cannot write a file in memory: " + reason);
    }
    at += written;
  }
  const auto path = "/proc/self/fd/" + std::to_string(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const std::string reason = library == nullptr ? dlerror() : "";
  close(file);
  if (library == nullptr) throw std::runtime_error("cannot load NCCL: " + reason);
  void* function = dlsym(library, OPEN_NCCL);
  if (function == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<OpenNccl>(function);
}

}  // namespace
}  // namespace detco

using namespace detco;

extern "C" {

// Live handles: stores, groups, works, reducers.
void detco_c10d_live(int64_t* four) noexcept {
  four[0] = Counted<Store>::live;
  four[1] = Counted<Group>::live;
  four[2] = Counted<Work>::live;
  four[3] = Counted<Reducer>::live;
}

// Connects to the store at host:port, or serves one there (`port` 0: any free one) and connects to
// it. Keys are put under `prefix`. `found_port` is the port that is served.
int32_t detco_store_open(const char* host, int64_t host_len, uint16_t port, int32_t serve,
                         int64_t timeout_ms, const char* prefix, int64_t prefix_len,
                         Store** handle, uint16_t* found_port, char* message,
                         int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    // libtorch asks for TORCH_CPP_LOG_LEVEL by itself only where Python loads it.
    static const bool leveled = (c10::initLogging(), true);
    static_cast<void>(leveled);
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serve != 0;
    options.waitWorkers = false;  // who is here is agreed upon by name, see dist/rendezvous.rs
    options.timeout = Millis(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(text(host, host_len), options);
    *found_port = tcp->getPort();
    *handle = new Store(c10::make_intrusive<c10d::PrefixStore>(text(prefix, prefix_len), tcp));
  });
}

// A connection of its own to the same store: a call that waits on one does not hold up the other.
int32_t detco_store_clone(Store* store, Store** handle, char* message,
                          int64_t message_len) noexcept {
  return guarded(message, message_len, [&] { *handle = new Store(store->store->clone()); });
}

void detco_store_close(Store* store) noexcept {
  char message[1];
  guarded(message, 1, [&] { delete store; });
}

int32_t detco_store_set(Store* store, const char* key, int64_t key_len, const uint8_t* value,
                        int64_t value_len, char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    store->store->set(text(key, key_len), std::vector<uint8_t>(value, value + value_len));
  });
}

// 1 in `found` if the key is there.
int32_t detco_store_check(Store* store, const char* key, int64_t key_len, int32_t* found,
                          char* message, int64_t message_len) noexcept {
  return guarded(message, message_len,
                 [&] { *found = store->store->check({text(key, key_len)}) ? 1 : 0; });
}

// Copies a key's value into `buffer` if it fits; `found_len` is its length either way. The key must
// be there: where it is not, this waits for the store's timeout.
int32_t detco_store_get(Store* store, const char* key, int64_t key_len, uint8_t* buffer,
                        int64_t buffer_len, int64_t* found_len, char* message,
                        int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    const auto value = store->store->get(text(key, key_len));
    *found_len = static_cast<int64_t>(value.size());
    if (*found_len > 0 && *found_len <= buffer_len) memcpy(buffer, value.data(), value.size());
  });
}

// Adds to a key's number and returns the sum.
int32_t detco_store_add(Store* store, const char* key, int64_t key_len, int64_t amount,
                        int64_t* sum, char* message, int64_t message_len) noexcept {
  return guarded(message, message_len,
                 [&] { *sum = store->store->add(text(key, key_len), amount); });
}

// A group of processes that talk over TCP, each from the address (or name) `host` of its machine.
int32_t detco_group_gloo(Store* store, const char* host, int64_t host_len, int32_t rank,
                         int32_t size, int64_t timeout_ms, Group** handle, char* message,
                         int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    using Gloo = c10d::ProcessGroupGloo;
    auto options = Gloo::Options::create(Millis(timeout_ms));
    options->devices.push_back(Gloo::createDeviceForHostname(text(host, host_len)));
    auto backend = c10::make_intrusive<Gloo>(store->store, rank, size, options);
    *handle = grouped(*store, backend, at::kCPU, c10d::ProcessGroup::BackendType::GLOO);
  });
}

// A group of GPUs, of which `device` is this process's; `image` is the library compiled from
// `nccl.cpp`.
int32_t detco_group_nccl(Store* store, const uint8_t* image, int64_t image_len, int32_t device,
                         int32_t rank, int32_t size, int64_t timeout_ms, Group** handle, char* message,
                         int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    static const OpenNccl open = load(image, image_len);
    BackendPtr backend;
    if (open(&store->store, rank, size, timeout_ms, &backend, message, message_len) != 0) {
      throw std::runtime_error(message);
    }
    const at::Device here(at::kCUDA, static_cast<at::DeviceIndex>(device));
    *handle = grouped(*store, backend, here, c10d::ProcessGroup::BackendType::NCCL);
  });
}

// Lets the members of a group of GPUs part in order.
int32_t detco_group_shut_down(Group* group, char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    if (!group->device.is_cpu()) group->backend->shutdown();
  });
}

void detco_group_close(Group* group) noexcept {
  char message[1];
  guarded(message, 1, [&] { delete group; });
}

// Sums `tensor` over the ranks, in place.
int32_t detco_group_sum(Group* group, at::Tensor* tensor, Work** work, char* message,
                        int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    std::vector<at::Tensor> tensors = {tensor->detach()};
    *work = new Work(group->backend->allreduce(tensors));
  });
}

// Every rank's `mine`, one after the other, into `all`.
int32_t detco_group_gather(Group* group, at::Tensor* mine, at::Tensor* all, Work** work,
                           char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    auto from = mine->detach();
    auto into = all->detach();
    *work = new Work(group->backend->_allgather_base(into, from));
  });
}

// Sends `send[r]` rows of `mine` to each rank r, in order; `into` takes `receive[r]` rows of each.
int32_t detco_group_exchange(Group* group, at::Tensor* mine, const int64_t* send,
                             at::Tensor* into, const int64_t* receive, Work** work, char* message,
                             int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    const auto size = group->backend->getSize();
    std::vector<int64_t> out(send, send + size), in(receive, receive + size);
    auto from = mine->detach();
    auto to = into->detach();
    *work = new Work(group->backend->alltoall_base(to, from, in, out));
  });
}

// Overwrites `tensor` on all ranks by that of rank `root`.
int32_t detco_group_broadcast(Group* group, at::Tensor* tensor, int32_t root, Work** work,
                              char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    std::vector<at::Tensor> tensors = {tensor->detach()};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *work = new Work(group->backend->broadcast(tensors, options));
  });
}

// Waits until every rank is here; after the timeout, rank 0 names those that are not.
int32_t detco_group_barrier(Group* group, int64_t timeout_ms, char* message,
                            int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    c10d::BarrierOptions options;
    options.timeout = Millis(timeout_ms);
    if (group->device.is_cpu()) {
      group->backend->monitoredBarrier(options, /*waitAllRanks=*/true);
    } else {
      options.device = group->device;
      options.device_ids = {group->device.index()};
      group->backend->barrier(options)->wait();
    }
  });
}

// Waits until a collective is done, or on a GPU until everything after it will find it done.
int32_t detco_work_wait(Work* work, char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    if (!work->work->wait()) throw std::runtime_error("the collective was aborted");
  });
}

void detco_work_close(Work* work) noexcept {
  char message[1];
  guarded(message, 1, [&] { delete work; });
}

// Which of `parameters` get a gradient in a backward pass from `loss`: 1 in `reached`, else 0.
int32_t detco_graph_reaches(at::Tensor* loss, at::Tensor* const* parameters, int64_t count,
                            uint8_t* reached, char* message, int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    using torch::autograd::Node;
    std::unordered_map<const Node*, int64_t> leaves;
    std::vector<std::shared_ptr<Node>> alive;
    for (int64_t i = 0; i < count; ++i) {
      reached[i] = 0;
      if (!parameters[i]->requires_grad()) continue;
      alive.push_back(torch::autograd::impl::grad_accumulator(*parameters[i]));
      leaves[alive.back().get()] = i;
    }
    std::unordered_set<const Node*> seen;
    std::vector<const Node*> left = {loss->grad_fn().get()};
    while (!left.empty()) {
      const Node* node = left.back();
      left.pop_back();
      if (node == nullptr || !seen.insert(node).second) continue;
      const auto leaf = leaves.find(node);
      if (leaf != leaves.end()) reached[leaf->second] = 1;
      for (const auto& edge : node->next_edges()) left.push_back(edge.function.get());
    }
  });
}

// Averages the gradients of `parameters` over the group from now on, at the end of each
// `detco_reducer_backward`. Buckets are filled from the last parameter to the first, since gradients come
// about in that order: a small one, so that sending begins early, then those of `bucket_bytes`.
int32_t detco_reducer_open(Group* group, at::Tensor* const* parameters, int64_t count,
                           int64_t bucket_bytes, int32_t bf16, Reducer** handle, char* message,
                           int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    std::vector<at::Tensor> all, backwards;
    std::vector<int64_t> places;
    for (int64_t i = 0; i < count; ++i) all.push_back(*parameters[i]);
    for (int64_t i = count; i-- > 0;) {
      backwards.push_back(all[i]);
      places.push_back(i);
    }
    const std::vector<bool> sparse(all.size(), false);
    const int64_t first = std::min<int64_t>(c10d::kDefaultFirstBucketBytes, bucket_bytes);
    const std::vector<size_t> caps = {static_cast<size_t>(first),
                                      static_cast<size_t>(bucket_bytes)};
    auto buckets =
        std::get<0>(c10d::compute_bucket_assignment_by_size(backwards, caps, sparse, places));
    c10d::verify_params_across_processes(group->group, all, std::nullopt);
    auto made = std::make_unique<Reducer>();
    made->reducer = std::make_unique<FixedBuckets>(
        all, buckets, group->group, sparse, bucket_bytes, /*find_unused_parameters=*/false,
        /*gradient_as_bucket_view=*/false, std::unordered_map<size_t, std::string>(), first,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false,
        std::vector<int64_t>());
    made->reducer->keep();
    if (bf16 != 0) {
      made->reducer->register_comm_hook(std::make_unique<Bf16Hook>(group->group));
    }
    *handle = made.release();
  });
}

// Backward from `loss`; when it returns, the gradients are means over the ranks.
int32_t detco_reducer_backward(Reducer* reducer, at::Tensor* loss, char* message,
                               int64_t message_len) noexcept {
  return guarded(message, message_len, [&] {
    reducer->reducer->prepare_for_backward({*loss});
    loss->backward();
  });
}

void detco_reducer_close(Reducer* reducer) noexcept {
  char message[1];
  guarded(message, 1, [&] { delete reducer; });
}

// Ends the process at once: threads of process groups that wait for a lost rank cannot be joined.
void detco_exit(int32_t code) noexcept { std::_Exit(code); }

}  // extern "C"
