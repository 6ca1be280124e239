// What a test may set and ask; shared by runtime and driver.
#pragma once
#include <cstdio>
#include <cstdlib>

namespace fake_cuda {

constexpr int kMaxDevices = 16;

// An environment variable as a number: settings that must be known before torch starts.
inline long from_environment(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

// Compute capability times ten, number of GPUs, streaming multiprocessors.
inline int capability() { return from_environment("FAKE_CUDA_CAPABILITY", 90); }
inline int num_devices() { return from_environment("FAKE_CUDA_DEVICES", 1); }
constexpr int kMultiprocessors = 132;
constexpr int kSharedBytesPerBlock = 227 << 10;

}  // namespace fake_cuda
