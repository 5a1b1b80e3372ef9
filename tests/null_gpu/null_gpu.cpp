// A GPU that computes nothing, for tests of the CUDA path on a machine without one.
//
// It stands in for the CUDA runtime, cuBLAS and NCCL, by LD_PRELOAD and under the name of the driver, libcuda.so.1.
// "Device" memory is the host's, a kernel launch is counted and does nothing, and everything is complete at once. A
// stream capture has its rules: what is illegal in one fails and invalidates it, as on a GPU. So torch's own code runs,
// and what it puts on the GPU can be counted; no value that it computes means anything, and no time does.
//
// NULL_GPU_DEVICES: how many there are (1). NULL_GPU_NCCL_ERROR: a file; once it exists, NCCL reports a failed peer.
#include <cublasLt.h>
#include <cublas_api.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define LOCK std::lock_guard<std::recursive_mutex> lock_(mutex_())
#define SUCCEEDS(type, success, name, ...) API type name(__VA_ARGS__) { return success; }
#define CUDA_SUCCEEDS(name, ...) SUCCEEDS(cudaError_t, cudaSuccess, name, __VA_ARGS__)
#define CUBLAS_SUCCEEDS(name, ...) SUCCEEDS(cublasStatus_t, CUBLAS_STATUS_SUCCESS, name, __VA_ARGS__)
#define NCCL_SUCCEEDS(name, ...) SUCCEEDS(ncclResult_t, ncclSuccess, name, __VA_ARGS__)
#define DRIVER_SUCCEEDS(name, ...) SUCCEEDS(int, 0, name, __VA_ARGS__)

// --- state; each behind a function, since libraries call in before this one's constructors have run

struct Capture {
  long nodes = 0, nccl = 0;
  bool is_invalid = false;
};
struct Stream {
  unsigned flags = 0;
  Capture* capture = nullptr;
  bool is_origin = false, is_joined = false;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id owner;
};
struct Event {
  Capture* capture = nullptr;
  bool is_recorded = false;
};
using Blocks = std::map<uintptr_t, size_t>;  // address -> bytes

static std::recursive_mutex& mutex_() { static auto* it = new std::recursive_mutex; return *it; }
static std::map<std::string, long>& counts() { static auto* it = new std::map<std::string, long>; return *it; }
static std::vector<Stream*>& streams() { static auto* it = new std::vector<Stream*>; return *it; }
static Blocks& device_blocks() { static auto* it = new Blocks; return *it; }
static Blocks& pinned_blocks() { static auto* it = new Blocks; return *it; }
static Stream legacy;
static thread_local int device = 0;
static thread_local cudaError_t last_error = cudaSuccess;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// What was put on the GPU so far, as "kind=number;...".
API const char* null_gpu_counts() {
  LOCK;
  static std::string text;
  text.clear();
  for (auto& [kind, number] : counts()) text += kind + "=" + std::to_string(number) + ";";
  return text.c_str();
}

static void count(const std::string& kind, long number = 1) { LOCK; counts()[kind] += number; }
static cudaError_t fail(cudaError_t error) { return last_error = error; }
static bool is_legacy(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }
static Stream* find(cudaStream_t stream) { return is_legacy(stream) ? &legacy : (Stream*)stream; }

static bool is_in(const Blocks& blocks, const void* address) {
  auto block = blocks.upper_bound((uintptr_t)address);
  if (block == blocks.begin()) return false;
  --block;
  return (uintptr_t)address < block->first + block->second;
}

static bool is_capturing(const Capture* capture) {
  for (auto* stream : streams()) if (stream->capture == capture) return true;
  return false;
}

// Whether a "potentially unsafe" call, as cudaStreamBeginCapture documents them, breaks a capture.
static bool breaks_capture() {
  LOCK;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  for (auto* stream : streams()) {
    if (!stream->capture || !stream->is_origin) continue;
    bool is_mine = stream->owner == std::this_thread::get_id();
    bool is_global = stream->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (is_mine ? stream->mode == cudaStreamCaptureModeRelaxed : !is_global) continue;
    stream->capture->is_invalid = true;
    return true;
  }
  return false;
}

static bool invalidates(Stream* stream) {
  LOCK;
  if (stream->capture) stream->capture->is_invalid = true;
  return stream->capture;
}

// The legacy stream waits for every blocking one, which a capture does not allow.
static bool legacy_breaks_capture() {
  bool is_broken = false;
  for (auto* stream : streams())
    if (stream->capture && !(stream->flags & cudaStreamNonBlocking)) is_broken = invalidates(stream);
  return is_broken;
}

static cudaError_t put(cudaStream_t stream, const std::string& kind) {
  LOCK;
  if (is_legacy(stream) && legacy_breaks_capture()) return fail(cudaErrorStreamCaptureImplicit);
  if (auto* capture = find(stream)->capture) capture->nodes++;
  else counts()[kind]++;
  return cudaSuccess;
}

// --- kernels: how a compiled program registers and launches them

struct Size3 { unsigned x, y, z; };
static thread_local std::vector<std::tuple<Size3, Size3, size_t, void*>> configurations;

API void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 0; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
API unsigned __cudaPushCallConfiguration(Size3 grid, Size3 block, size_t shared, void* stream) {
  configurations.emplace_back(grid, block, shared, stream);
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(Size3* grid, Size3* block, size_t* shared, void* stream) {
  std::tie(*grid, *block, *shared, *(void**)stream) = configurations.back();
  configurations.pop_back();
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(void** kernel, const void* host) { *kernel = (void*)host; return cudaSuccess; }
API cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t s) { return put(s, "kernel"); }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) { return put(s, "kernel"); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) { return put(c->stream, "kernel"); }
API cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) {
  return put(s, "kernel");
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  *a = {};
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
CUDA_SUCCEEDS(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
CUDA_SUCCEEDS(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)
CUDA_SUCCEEDS(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { static char room[1 << 16]; *p = room; return cudaSuccess; }

// --- devices: as many H100s as NULL_GPU_DEVICES says

API cudaError_t cudaGetDeviceCount(int* n) {
  const char* text = getenv("NULL_GPU_DEVICES");
  *n = text ? atoi(text) : 1;
  return *n ? cudaSuccess : fail(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int* d) { *d = device; return cudaSuccess; }
API cudaError_t cudaSetDevice(int d) {
  int number;
  cudaGetDeviceCount(&number);
  if (d < 0 || d >= number) return fail(cudaErrorInvalidDevice);
  device = d;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  *p = {};
  strcpy(p->name, "Null GPU");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalGlobalMem = 80ull << 30;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->pciBusID = d + 1;
  p->unifiedAddressing = 1;
  p->textureAlignment = 512;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> values = {
      {cudaDevAttrMultiProcessorCount, 132},       {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrComputeCapabilityMajor, 9},      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxGridDimX, 2147483647},        {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},             {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}};
  auto it = values.find(attribute);
  *value = it == values.end() ? 0 : it->second;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  if (low) *low = 0;
  if (high) *high = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
CUDA_SUCCEEDS(cudaDeviceEnablePeerAccess, int, unsigned)
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d + 1); return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count("wait");
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
API cudaError_t cudaGetLastError() { auto error = last_error; last_error = cudaSuccess; return error; }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "an error of the null GPU";
  }
}
API const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
CUDA_SUCCEEDS(cudaProfilerStart)
CUDA_SUCCEEDS(cudaProfilerStop)

// --- memory

static void* allocate(Blocks& blocks, size_t size) {
  LOCK;
  void* address = nullptr;
  if (posix_memalign(&address, 4096, size ? size : 1)) return nullptr;
  memset(address, 0, size);
  blocks[(uintptr_t)address] = size;
  return address;
}
static void release(Blocks& blocks, void* address) { LOCK; blocks.erase((uintptr_t)address); free(address); }

API cudaError_t cudaMalloc(void** address, size_t size) {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  *address = allocate(device_blocks(), size);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void* address) {
  if (address && breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (address) release(device_blocks(), address);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  *address = allocate(pinned_blocks(), size);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFreeHost(void* address) { release(pinned_blocks(), address); return cudaSuccess; }
CUDA_SUCCEEDS(cudaHostRegister, void*, size_t, unsigned)
CUDA_SUCCEEDS(cudaHostUnregister, void*)
API cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) { *unused = 79ull << 30; *all = 80ull << 30; return cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* address) {
  LOCK;
  *a = {};
  a->type = is_in(device_blocks(), address)   ? cudaMemoryTypeDevice
            : is_in(pinned_blocks(), address) ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  a->device = device;
  return cudaSuccess;
}
static cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  LOCK;
  bool to_device = is_in(device_blocks(), to), from_device = is_in(device_blocks(), from);
  bool is_pageable =
      (!to_device && !is_in(pinned_blocks(), to)) || (!from_device && !is_in(pinned_blocks(), from));
  if (is_pageable && invalidates(find(stream))) return fail(cudaErrorStreamCaptureUnsupported);
  auto error = put(stream, to_device == from_device ? "copy" : to_device ? "copy to device" : "copy to host");
  if (!error && !find(stream)->capture) memmove(to, from, size);
  return error;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count("wait");
  return copy(to, from, size, nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t s) {
  return put(s, "copy");
}
API cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
  auto error = put(stream, "memset");
  if (!error && !find(stream)->capture) memset(address, value, size);
  return error;
}
API cudaError_t cudaMemset(void* address, int value, size_t size) {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  return cudaMemsetAsync(address, value, size, nullptr);
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { *pool = (cudaMemPool_t)8; return cudaSuccess; }
CUDA_SUCCEEDS(cudaMemPoolTrimTo, cudaMemPool_t, size_t)

// --- streams and events

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  LOCK;
  streams().push_back(new Stream{flags});
  *stream = (cudaStream_t)streams().back();
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { return cudaStreamCreateWithPriority(s, f, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
CUDA_SUCCEEDS(cudaStreamDestroy, cudaStream_t)
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (invalidates(find(stream)) || breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  count("wait");
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return invalidates(find(stream)) ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCK;
  auto* stream = find(handle);
  auto* event = (Event*)event_handle;
  if (!event->capture) {
    if (event->is_recorded && invalidates(stream)) return fail(cudaErrorStreamCaptureIsolation);
    return cudaSuccess;
  }
  if (stream == &legacy) {
    event->capture->is_invalid = true;
    return fail(cudaErrorStreamCaptureImplicit);
  }
  if (stream->capture && stream->capture != event->capture) {
    invalidates(stream);
    return fail(cudaErrorStreamCaptureMerge);
  }
  if (!stream->capture) {  // the stream joins the capture
    stream->capture = event->capture;
    stream->is_origin = stream->is_joined = false;
  } else if (stream->is_origin) {  // and here the others join it again
    for (auto* other : streams()) if (other->capture == event->capture && !other->is_origin) other->is_joined = true;
  }
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
CUDA_SUCCEEDS(cudaEventDestroy, cudaEvent_t)
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  LOCK;
  *(Event*)event = {find(stream)->capture, true};
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
static cudaError_t ask(cudaEvent_t event) {
  LOCK;
  auto* capture = ((Event*)event)->capture;
  if (capture && is_capturing(capture)) {
    capture->is_invalid = true;
    return fail(cudaErrorCapturedEvent);
  }
  return breaks_capture() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return ask(event); }
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { count("wait"); return ask(event); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0.1f; return cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  auto error = put(stream, "host function");
  if (!error && !find(stream)->capture) function(data);
  return error;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  if (invalidates(find(stream))) return fail(cudaErrorStreamCaptureUnsupported);
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

// --- captures

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  LOCK;
  auto* stream = find(handle);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = new Capture;
  stream->is_origin = true;
  stream->mode = mode;
  stream->owner = std::this_thread::get_id();
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCK;
  auto* stream = find(handle);
  *graph = nullptr;
  if (!stream->capture || !stream->is_origin) return fail(cudaErrorIllegalState);
  auto* capture = stream->capture;
  bool is_joined = true;
  for (auto* other : streams()) {
    if (other->capture != capture) continue;
    is_joined = is_joined && (other == stream || other->is_joined);
    other->capture = nullptr;
    other->is_joined = other->is_origin = false;
  }
  if (capture->is_invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (!is_joined) return fail(cudaErrorStreamCaptureUnjoined);
  count("capture");
  count("node", capture->nodes);
  count("nccl node", capture->nccl);
  *graph = (cudaGraph_t)capture;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCK;
  if (is_legacy(handle) && legacy_breaks_capture()) return fail(cudaErrorStreamCaptureImplicit);
  auto* capture = find(handle)->capture;
  *status = !capture               ? cudaStreamCaptureStatusNone
            : capture->is_invalid ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* number) {
  auto error = cudaStreamIsCapturing(handle, status);
  auto* capture = find(handle)->capture;
  if (id) *id = (unsigned long long)capture;
  if (graph) *graph = (cudaGraph_t)capture;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return error;
}
CUDA_SUCCEEDS(cudaStreamUpdateCaptureDependencies, cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
              unsigned)
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) { return put(stream, "replay"); }
CUDA_SUCCEEDS(cudaGraphDestroy, cudaGraph_t)
CUDA_SUCCEEDS(cudaGraphExecDestroy, cudaGraphExec_t)
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) { *number = 1; return cudaSuccess; }
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = (cudaUserObject_t)8;
  return cudaSuccess;
}
CUDA_SUCCEEDS(cudaGraphRetainUserObject, cudaGraph_t, cudaUserObject_t, unsigned, unsigned)
CUDA_SUCCEEDS(cudaUserObjectRelease, cudaUserObject_t, unsigned)

// --- the driver

API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) {
  if (flags) *flags = 0;
  *is_active = 1;
  return 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)8; return 0; }
API int cuCtxGetCurrent(void** context) { *context = (void*)8; return 0; }
API int cuDeviceGet(int* d, int number) { *d = number; return 0; }
API int cuDeviceGetAttribute(int* value, int, int) { *value = 0; return 0; }
API int cuGetErrorString(int, const char** text) { *text = "an error of the null GPU's driver"; return 0; }
API int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
API int cuMemGetAllocationGranularity(size_t* bytes, const void*, int) { *bytes = 2 << 20; return 0; }
DRIVER_SUCCEEDS(cuCtxSetCurrent, void*)
DRIVER_SUCCEEDS(cuInit, unsigned)
DRIVER_SUCCEEDS(cuLogsRegisterCallback, ...)
static int succeed(...) { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- cuBLAS: a handle is the stream that it works on

#define GEMM(name, ...) \
  API cublasStatus_t name(cublasHandle_t handle, __VA_ARGS__) { put(*(cudaStream_t*)handle, "kernel"); return CUBLAS_STATUS_SUCCESS; }
using T = cublasOperation_t;
using Kind = cudaDataType;

API cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = (cublasHandle_t) new cudaStream_t(nullptr);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  *(cudaStream_t*)handle = stream;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLAS_SUCCEEDS(cublasDestroy_v2, cublasHandle_t)
CUBLAS_SUCCEEDS(cublasSetWorkspace_v2, cublasHandle_t, void*, size_t)
CUBLAS_SUCCEEDS(cublasSetMathMode, cublasHandle_t, cublasMath_t)
CUBLAS_SUCCEEDS(cublasSetPointerMode_v2, cublasHandle_t, cublasPointerMode_t)
GEMM(cublasSgemm_v2, T, T, int, int, int, const float*, const float*, int, const float*, int, const float*, float*, int)
GEMM(cublasGemmEx, T, T, int, int, int, const void*, const void*, Kind, int, const void*, Kind, int, const void*, void*,
     Kind, int, cublasComputeType_t, cublasGemmAlgo_t)
GEMM(cublasSgemmStridedBatched, T, T, int, int, int, const float*, const float*, int, long long, const float*, int,
     long long, const float*, float*, int, long long, int)
GEMM(cublasGemmStridedBatchedEx, T, T, int, int, int, const void*, const void*, Kind, int, long long, const void*, Kind,
     int, long long, const void*, void*, Kind, int, long long, int, cublasComputeType_t, cublasGemmAlgo_t)
GEMM(cublasSgemv_v2, T, int, int, const float*, const float*, int, const float*, int, const float*, float*, int)

template <typename Handle>
static cublasStatus_t make(Handle* handle) {
  *handle = (Handle)calloc(1, 256);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, Kind) { return make(d); }
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* d, Kind, uint64_t, uint64_t, int64_t) {
  return make(d);
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* d) { return make(d); }
CUBLAS_SUCCEEDS(cublasLtMatmulDescDestroy, cublasLtMatmulDesc_t)
CUBLAS_SUCCEEDS(cublasLtMatrixLayoutDestroy, cublasLtMatrixLayout_t)
CUBLAS_SUCCEEDS(cublasLtMatmulPreferenceDestroy, cublasLtMatmulPreference_t)
CUBLAS_SUCCEEDS(cublasLtMatmulDescSetAttribute, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*,
                size_t)
CUBLAS_SUCCEEDS(cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*,
                size_t)
CUBLAS_SUCCEEDS(cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                const void*, size_t)
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* result, int* number) {
  *result = {};
  *number = 1;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                                  cublasLtMatrixLayout_t, const void*, cublasLtMatrixLayout_t, const void*, const void*,
                                  cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*,
                                  void*, size_t, cudaStream_t stream) {
  put(stream, "kernel");
  return CUBLAS_STATUS_SUCCESS;
}

// --- NCCL: each rank hears its own values only

struct Communicator { int size, rank; };

static ncclResult_t exchange(cudaStream_t stream) {
  LOCK;
  put(stream, "nccl");
  if (auto* capture = find(stream)->capture) capture->nccl++;
  return ncclSuccess;
}
API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof *id); return ncclSuccess; }
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int size, ncclUniqueId, int rank, ncclConfig_t*) {
  *c = (ncclComm_t) new Communicator{size, rank};
  return ncclSuccess;
}
API ncclResult_t ncclCommInitRank(ncclComm_t* c, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(c, size, id, rank, nullptr);
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t* c, int size, int rank, int, ncclUniqueId* id, ncclConfig_t*) {
  return ncclCommInitRankConfig(c, size, *id, rank, nullptr);
}
API ncclResult_t ncclCommCount(ncclComm_t c, int* size) { *size = ((Communicator*)c)->size; return ncclSuccess; }
API ncclResult_t ncclCommUserRank(ncclComm_t c, int* rank) { *rank = ((Communicator*)c)->rank; return ncclSuccess; }
API ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  const char* file = getenv("NULL_GPU_NCCL_ERROR");
  *error = file && access(file, F_OK) == 0 ? ncclRemoteError : ncclSuccess;
  return ncclSuccess;
}
API const char* ncclGetLastError(ncclComm_t) { return "an error of the null GPU's peer"; }
API ncclResult_t ncclCommRegister(ncclComm_t, void*, size_t, void** handle) { *handle = nullptr; return ncclSuccess; }
NCCL_SUCCEEDS(ncclCommDeregister, ncclComm_t, void*)
NCCL_SUCCEEDS(ncclCommFinalize, ncclComm_t)
NCCL_SUCCEEDS(ncclCommDestroy, ncclComm_t)
NCCL_SUCCEEDS(ncclCommAbort, ncclComm_t)
NCCL_SUCCEEDS(ncclGroupStart)
NCCL_SUCCEEDS(ncclGroupEnd)
API ncclResult_t ncclAllReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t s) {
  return exchange(s);
}
API ncclResult_t ncclBroadcast(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t s) {
  return exchange(s);
}
API ncclResult_t ncclSend(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t s) { return exchange(s); }
API ncclResult_t ncclRecv(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t s) { return exchange(s); }
