// libcuda.so.1 without a driver: what torch and Triton ask of it. Launches are counted by the runtime beside it.
#include <cuda.h>
#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

#include "controls.h"

using namespace fake_cuda;

namespace {

std::mutex names_lock;
std::vector<std::string> names{""};  // of kernels; a CUfunction is a place in it

CUresult launched(CUfunction kernel, CUstream stream, unsigned x, unsigned y, unsigned z) {
  static auto count = (void (*)())dlsym(RTLD_DEFAULT, "fake_cuda_count_launch");
  static auto note = (void (*)(const char*, const char*, const void*, const char*))dlsym(RTLD_DEFAULT, "fake_cuda_note");
  if (!x || !y || !z) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> guard(names_lock);
  if (count) count();
  if (note) note("kernel", names[(size_t)kernel].c_str(), stream, "triton");
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = num_devices(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
// torch asks this to leave GPUs alone that have no context.
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active) {
  static auto has_context = (int (*)(int))dlsym(RTLD_DEFAULT, "fake_cuda_has_context");
  return *flags = 0, *is_active = has_context ? has_context(device) : 1, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = kMultiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = kSharedBytesPerBlock; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the simulated driver", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** text) { return *text = "FAKE_CUDA_ERROR", CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void*) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule* module, const char*) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return *module = (CUmodule)1, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  std::lock_guard<std::mutex> guard(names_lock);
  *function = (CUfunction)names.size();
  names.push_back(name);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, CUmodule, const char*) {
  *address = 0;
  if (bytes) *bytes = 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned,
                        CUstream stream, void**, void**) {
  return launched(kernel, stream, x, y, z);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* given, CUfunction kernel, void**, void**) {
  return launched(kernel, given->hStream, given->gridDimX, given->gridDimY, given->gridDimZ);
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = pointer;
  else *(int*)value = 0;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) { return *count = 4, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) { return *count = 66, CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}

}  // extern "C"
