// A CUDA runtime without a GPU, for LD_PRELOAD: device memory is memory of the host, a stream is a thread, and a
// kernel is a name in the order of its stream that writes nothing.
//
// Real are the order of streams and events, copies (bytes move, asynchronously, late if a test asks for it),
// page-locking as an account of ranges, out of memory, CUDA's "last error", and which device a call touches.
// cuBLAS is part of it: a product is a launch without numbers.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "controls.h"

using namespace fake_cuda;

namespace {

// ---------------------------------------------------------------------------------------------------------------
// What tests set, and what is counted.

std::atomic<long> device_bytes{139L << 30};
std::atomic<long> lockable_bytes{1L << 60};
std::atomic<long> main_delay_us{0};  // an operation of a device's own stream begins up to so much late
std::atomic<long> side_delay_us{0};  // of any other stream
std::atomic<bool> copies_move_bytes{true};

constexpr size_t kAlwaysMoved = 4096;  // numbers that the host asks for are real even where copies move nothing

enum Counter { kLaunches, kProducts, kSyncs, kLocks, kUnlocks, kCopies, kCopiedBytes, kPageableBytes, kNumCounters };
std::array<std::atomic<long>, kNumCounters> counters{};

FILE* log_file = nullptr;
std::mutex log_lock;

void note(const char* what, const char* name, const void* stream, size_t bytes, const char* more = "") {
  std::lock_guard<std::mutex> guard(log_lock);
  if (log_file) fprintf(log_file, "%s\t%s\t%p\t%zu\t%s\n", what, name, stream, bytes, more);
}

// ---------------------------------------------------------------------------------------------------------------
// Errors, devices and their contexts.

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;
std::array<std::atomic<bool>, kMaxDevices> has_context{};

cudaError_t fail(cudaError_t error) { return last_error = error; }

// A call that needs a context makes one on the current device, as CUDA does.
int touch() {
  has_context[current_device] = true;
  return current_device;
}

// ---------------------------------------------------------------------------------------------------------------
// Streams and events.

struct Event {
  std::mutex lock;
  std::condition_variable changed;
  long recorded = 0, passed = 0;
};

class Stream {
 public:
  Stream(bool is_main, unsigned seed) : is_main_(is_main), random_(seed), worker_([this] { run(); }) {}

  void add(std::function<void()> work) {
    {
      std::lock_guard<std::mutex> guard(lock_);
      waiting_.push_back(std::move(work));
    }
    changed_.notify_one();
  }

  void drain() {
    std::unique_lock<std::mutex> guard(lock_);
    idle_.wait(guard, [this] { return waiting_.empty() && !is_busy_; });
  }

  bool is_idle() {
    std::lock_guard<std::mutex> guard(lock_);
    return waiting_.empty() && !is_busy_;
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> guard(lock_);
        changed_.wait(guard, [this] { return !waiting_.empty(); });
        work = std::move(waiting_.front());
        waiting_.pop_front();
        is_busy_ = true;
      }
      if (long most = is_main_ ? main_delay_us : side_delay_us) usleep(random_() % (most + 1));
      work();
      std::lock_guard<std::mutex> guard(lock_);
      is_busy_ = false;
      if (waiting_.empty()) idle_.notify_all();
    }
  }

  const bool is_main_;
  std::mt19937 random_;
  std::mutex lock_;
  std::condition_variable changed_, idle_;
  std::deque<std::function<void()>> waiting_;
  bool is_busy_ = false;
  std::thread worker_;  // last: it uses the rest. Never ends, as streams of a process do not.
};

// ---------------------------------------------------------------------------------------------------------------
// Memory.

struct Range {
  size_t size;
  int device;
};

std::mutex state_lock;  // of all below
std::map<char*, Range> device_ranges, locked_ranges;
std::array<long, kMaxDevices> used_bytes{};
long locked_bytes = 0;
std::vector<Stream*> streams;
std::array<Stream*, kMaxDevices> main_streams{};

bool lies_in(const std::map<char*, Range>& ranges, const void* pointer) {
  std::lock_guard<std::mutex> guard(state_lock);
  auto after = ranges.upper_bound((char*)pointer);
  if (after == ranges.begin()) return false;
  auto range = std::prev(after);
  return (char*)pointer < range->first + range->second.size;
}

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

Stream* new_stream(bool is_main) {
  auto* made = new Stream(is_main, 7 + streams.size());
  streams.push_back(made);
  return made;
}

Stream* stream_of(cudaStream_t handle) {
  std::lock_guard<std::mutex> guard(state_lock);
  if ((uintptr_t)handle > 2) return (Stream*)handle;  // 0, 1 and 2 are names of the device's own
  Stream*& own = main_streams[touch()];
  return own ? own : own = new_stream(true);
}

void drain_all() {
  std::vector<Stream*> all;
  {
    std::lock_guard<std::mutex> guard(state_lock);
    all = streams;
  }
  for (auto* stream : all) stream->drain();
}

// `waits`: the call returns when the bytes have arrived; so does one to memory that is not locked.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle, bool waits) {
  bool from_device = lies_in(device_ranges, from), to_device = lies_in(device_ranges, to);
  bool from_locked = from_device || lies_in(locked_ranges, from);
  bool to_locked = to_device || lies_in(locked_ranges, to);
  std::string way = std::string(from_device ? "device" : from_locked ? "locked" : "plain") + " to " +
                    (to_device ? "device" : to_locked ? "locked" : "plain");
  note("copy", way.c_str(), handle, bytes, waits ? "sync" : "async");
  if (from_device != to_device) {
    counters[kCopies]++;
    counters[kCopiedBytes] += bytes;
    if (!from_locked || !to_locked) counters[kPageableBytes] += bytes;
  }
  Stream* stream = stream_of(handle);
  if (!copies_move_bytes && bytes > kAlwaysMoved) {
    stream->add([] {});
  } else if (from_locked) {
    stream->add([=] { memcpy(to, from, bytes); });
  } else {  // through a buffer of the driver: the caller may change its memory at once
    auto staged = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
    stream->add([=] { memcpy(to, staged->data(), bytes); });
  }
  if (waits || !to_locked) {
    counters[kSyncs]++;
    stream->drain();
  }
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Kernels.

std::unordered_map<const void*, std::string> kernel_names;
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // between <<<...>>> and the call of its stub

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (log_file) {
    char sizes[96];
    snprintf(sizes, sizeof sizes, "%u,%u,%u x %u,%u,%u", grid.x, grid.y, grid.z, block.x, block.y, block.z);
    auto found = kernel_names.find(kernel);
    note("kernel", found == kernel_names.end() ? "?" : found->second.c_str(), stream, 0, sizes);
  }
  unsigned threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024)
    return fail(cudaErrorInvalidConfiguration);
  if (shared > (size_t)kSharedBytesPerBlock) return fail(cudaErrorInvalidValue);
  counters[kLaunches]++;
  stream_of(stream)->add([] {});
  return cudaSuccess;
}

int product(const char* function, unsigned long long m, unsigned long long n, unsigned long long k) {
  char sizes[96];
  snprintf(sizes, sizeof sizes, "%llu x %llu x %llu", m, n, k);
  note("product", function, nullptr, 0, sizes);
  counters[kProducts]++;
  counters[kLaunches]++;
  return 0;
}

}  // namespace

extern "C" {

// ---------------------------------------------------------------------------------------------------------------
// For tests.

void fake_cuda_set_device_bytes(long bytes) { device_bytes = bytes; }
void fake_cuda_set_lockable_bytes(long bytes) { lockable_bytes = bytes; }
void fake_cuda_set_delays(long main_us, long side_us) { main_delay_us = main_us, side_delay_us = side_us; }
void fake_cuda_set_copies(int move_bytes) { copies_move_bytes = move_bytes; }
long fake_cuda_counter(int which) { return counters[which]; }
long fake_cuda_locked_bytes() { return locked_bytes; }
int fake_cuda_has_context(int device) { return has_context[device]; }
void fake_cuda_forget_contexts() {
  for (auto& context : has_context) context = false;
}
void fake_cuda_count_launch() { counters[kLaunches]++; }  // of the driver's
void fake_cuda_note(const char* what, const char* name, const void* stream, const char* more) {
  note(what, name, stream, 0, more);
}
void fake_cuda_log(const char* path) {  // null: no more
  std::lock_guard<std::mutex> guard(log_lock);
  if (log_file) fclose(log_file);
  log_file = path ? fopen(path, "w") : nullptr;
}

// ---------------------------------------------------------------------------------------------------------------
// Devices.

cudaError_t cudaGetDeviceCount(int* count) { return *count = num_devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= num_devices()) return fail(cudaErrorInvalidDevice);
  current_device = device;
  touch();  // as CUDA does from version 12 on
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* told, int device) {
  memset(told, 0, sizeof *told);
  snprintf(told->name, sizeof told->name, "Fake GPU sm_%d", capability());
  told->totalGlobalMem = device_bytes;
  told->major = capability() / 10, told->minor = capability() % 10;
  told->multiProcessorCount = kMultiprocessors;
  told->warpSize = 32, told->maxThreadsPerBlock = 1024, told->maxThreadsPerMultiProcessor = 2048;
  told->regsPerBlock = told->regsPerMultiprocessor = 65536;
  told->sharedMemPerBlock = 48 << 10, told->sharedMemPerMultiprocessor = 228 << 10;
  told->sharedMemPerBlockOptin = kSharedBytesPerBlock;
  told->l2CacheSize = 60 << 20, told->totalConstMem = 64 << 10, told->memoryBusWidth = 5120;
  told->maxGridSize[0] = 2147483647, told->maxGridSize[1] = told->maxGridSize[2] = 65535;
  told->maxThreadsDim[0] = told->maxThreadsDim[1] = 1024, told->maxThreadsDim[2] = 64;
  told->unifiedAddressing = told->concurrentKernels = told->canMapHostMemory = 1;
  told->asyncEngineCount = 3, told->texturePitchAlignment = 32, told->textureAlignment = 512;
  told->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedBytesPerBlock; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  snprintf(text, length, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) {
  touch();
  note("sync", "device", nullptr, 0);
  counters[kSyncs]++;
  drain_all();
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Memory.

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> guard(state_lock);
  *total = device_bytes;
  long left = device_bytes - used_bytes[touch()];
  *free_bytes = left > 0 ? left : 0;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** made, size_t bytes) {
  std::lock_guard<std::mutex> guard(state_lock);
  int device = touch();
  *made = used_bytes[device] + (long)bytes > device_bytes ? nullptr : reserve(bytes);
  if (!*made) return fail(cudaErrorMemoryAllocation);
  device_ranges[(char*)*made] = {bytes, device};
  used_bytes[device] += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  touch();
  if (!memory) return cudaSuccess;
  drain_all();
  std::lock_guard<std::mutex> guard(state_lock);
  auto found = device_ranges.find((char*)memory);
  if (found == device_ranges.end()) return fail(cudaErrorInvalidValue);
  used_bytes[found->second.device] -= found->second.size;
  munmap(memory, found->second.size ? found->second.size : 1);
  device_ranges.erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** made, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> guard(state_lock);
  if (locked_bytes + (long)bytes > lockable_bytes || !(*made = reserve(bytes))) return fail(cudaErrorMemoryAllocation);
  locked_ranges[(char*)*made] = {bytes, touch()};
  locked_bytes += bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  drain_all();
  std::lock_guard<std::mutex> guard(state_lock);
  auto found = locked_ranges.find((char*)memory);
  if (found == locked_ranges.end()) return fail(cudaErrorInvalidValue);
  locked_bytes -= found->second.size;
  munmap(memory, found->second.size);
  locked_ranges.erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> guard(state_lock);
  int device = touch();
  if (locked_bytes + (long)bytes > lockable_bytes) return fail(cudaErrorMemoryAllocation);
  auto after = locked_ranges.upper_bound((char*)memory + bytes - 1);
  if (after != locked_ranges.begin()) {
    auto range = std::prev(after);
    if (range->first + range->second.size > (char*)memory) return fail(cudaErrorHostMemoryAlreadyRegistered);
  }
  locked_ranges[(char*)memory] = {bytes, device};
  locked_bytes += bytes;
  counters[kLocks]++;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  touch();
  std::lock_guard<std::mutex> guard(state_lock);
  auto found = locked_ranges.find((char*)memory);
  if (found == locked_ranges.end()) return fail(cudaErrorHostMemoryNotRegistered);
  locked_bytes -= found->second.size;
  locked_ranges.erase(found);
  counters[kUnlocks]++;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* told, const void* pointer) {
  memset(told, 0, sizeof *told);
  bool is_device = lies_in(device_ranges, pointer), is_locked = lies_in(locked_ranges, pointer);
  told->type = is_device ? cudaMemoryTypeDevice : is_locked ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  told->devicePointer = is_device || is_locked ? (void*)pointer : nullptr;
  told->hostPointer = is_device ? nullptr : (void*)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream, false);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind) {
  return copy(to, from, bytes, nullptr, true);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream, false);
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  counters[kLaunches]++;
  stream_of(stream)->add([=] {
    if (copies_move_bytes || bytes <= kAlwaysMoved) memset(memory, value, bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  cudaMemsetAsync(memory, value, bytes, nullptr);
  stream_of(nullptr)->drain();
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// Streams and events.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned, int) {
  std::lock_guard<std::mutex> guard(state_lock);
  touch();
  *made = (cudaStream_t)new_stream(false);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) { return cudaStreamCreateWithPriority(made, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* made) { return cudaStreamCreateWithPriority(made, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return stream_of(stream)->drain(), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note("sync", "stream", stream, 0);
  counters[kSyncs]++;
  stream_of(stream)->drain();
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream)->is_idle() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  stream_of(stream)->add([=] { function(data); });
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  stream_of(stream)->add([=] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
  touch();
  *made = (cudaEvent_t) new Event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // kept: work under way may name it
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  auto* event = (Event*)handle;
  long turn;
  {
    std::lock_guard<std::mutex> guard(event->lock);
    turn = ++event->recorded;
  }
  note("record", "", stream, (size_t)event);
  stream_of(stream)->add([=] {
    {
      std::lock_guard<std::mutex> guard(event->lock);
      if (turn > event->passed) event->passed = turn;
    }
    event->changed.notify_all();
  });
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  auto* event = (Event*)handle;
  long turn;  // the last recording before this call; none: nothing to wait for
  {
    std::lock_guard<std::mutex> guard(event->lock);
    turn = event->recorded;
  }
  note("wait", "", stream, (size_t)event);
  stream_of(stream)->add([=] {
    std::unique_lock<std::mutex> guard(event->lock);
    event->changed.wait(guard, [=] { return event->passed >= turn; });
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  auto* event = (Event*)handle;
  note("sync", "event", nullptr, (size_t)event);
  counters[kSyncs]++;
  std::unique_lock<std::mutex> guard(event->lock);
  long turn = event->recorded;
  event->changed.wait(guard, [=] { return event->passed >= turn; });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto* event = (Event*)handle;
  std::lock_guard<std::mutex> guard(event->lock);
  return event->passed >= event->recorded ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { return *milliseconds = 1, cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------
// Errors.

cudaError_t cudaGetLastError(void) { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorHostMemoryNotRegistered: return "cudaErrorHostMemoryNotRegistered";
    default: return "cudaErrorOther";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorHostMemoryNotRegistered: return "part or all of the requested memory range is not registered";
    default: return "another error";
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Kernels.

void** __cudaRegisterFatBinary(void*) {
  static void* binary;
  return &binary;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernel_names[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto given = configurations.back();
  configurations.pop_back();
  *grid = given.grid, *block = given.block, *shared = given.shared, *(cudaStream_t*)stream = given.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) { return *kernel = (cudaKernel_t)stub, cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch((const void*)kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(stub, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* given, const void* stub, void**) {
  return launch(stub, given->gridDim, given->blockDim, given->dynamicSmemBytes, given->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* told, const void*) {
  memset(told, 0, sizeof *told);
  told->maxThreadsPerBlock = 1024, told->numRegs = 32;
  told->binaryVersion = told->ptxVersion = capability();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, enum cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  return *count = 4, cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char zeros[1 << 16];
  return *address = zeros, cudaSuccess;
}
static int not_supported() { return cudaErrorNotSupported; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             enum cudaDriverEntryPointQueryResult* result) {
  *function = (void*)not_supported;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------
// cuBLAS, by the part of its calls that is looked at here; the rest of the arguments lies behind it.

int cublasCreate_v2(void** handle) { return *handle = malloc(16), 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
int cublasGemmEx(void*, int, int, int m, int n, int k, ...) { return product("cublasGemmEx", m, n, k); }
int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k, ...) { return product("cublasGemmStridedBatchedEx", m, n, k); }
int cublasSgemm_v2(void*, int, int, int m, int n, int k, ...) { return product("cublasSgemm", m, n, k); }
int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k, ...) { return product("cublasSgemmStridedBatched", m, n, k); }

struct Layout {
  unsigned long long rows, columns;
};
struct Heuristic {
  unsigned long long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
int cublasLtMatrixLayoutCreate(void** made, int, unsigned long long rows, unsigned long long columns, long long) {
  return *made = new Layout{rows, columns}, 0;
}
int cublasLtMatrixLayoutDestroy(void* layout) { return delete (Layout*)layout, 0; }
int cublasLtMatmulDescCreate(void** made, int, int) { return *made = malloc(64), 0; }
int cublasLtMatmulDescDestroy(void* made) { return free(made), 0; }
int cublasLtMatmulPreferenceCreate(void** made) { return *made = malloc(64), 0; }
int cublasLtMatmulPreferenceDestroy(void* made) { return free(made), 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* count) {
  memset(found, 0, sizeof *found);
  return *count = 1, 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, Layout* a, const void*, Layout*, const void*, const void*,
                   Layout*, void*, Layout* d, const void*, void*, size_t, cudaStream_t stream) {
  stream_of(stream)->add([] {});
  unsigned long long inner = a->rows == d->rows ? a->columns : a->rows;
  return product("cublasLtMatmul", d->rows, d->columns, inner);
}

}  // extern "C"
