/* A CUDA runtime without a GPU, preloaded in front of libcudart.
 *
 * It has H100s (PHANTOM_GPUS, PHANTOM_GPU_BYTES). Their memory is host memory that the system provides
 * when it is first written, so a large model takes no memory until somebody fills it. Allocations,
 * copies and fills are real, and complete when the call returns. Kernels do nothing. What the host
 * would have waited for is counted.
 *
 * Functions that are missing here are libcudart's; they find no driver and fail.
 */
#define _GNU_SOURCE
#include "phantom.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define LARGEST_ZEROED (1UL << 20) /* longer fills with 0 give the pages back instead */

struct phantom_counts phantom_counts;

static size_t number(const char *name, size_t fallback) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : fallback;
}

/* ---- memory --------------------------------------------------------------------------------- */

enum owner { UNKNOWN, DEVICE, PINNED };

struct block {
  char *start;
  size_t bytes;
  enum owner owner;
  int device;
};

static struct block *blocks; /* a few hundred: torch's allocators ask for large segments */
static size_t num_blocks, room;
static size_t live_bytes[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current_device;

static size_t device_bytes(void) { return number("PHANTOM_GPU_BYTES", 80UL << 30); }

static void *allocate(size_t bytes, enum owner owner) {
  char *start = NULL;
  pthread_mutex_lock(&lock);
  if (owner == PINNED || live_bytes[current_device] + bytes <= device_bytes()) {
    start = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) start = NULL;
  }
  if (start) {
    if (num_blocks == room) {
      room = room ? 2 * room : 256;
      blocks = realloc(blocks, room * sizeof *blocks);
    }
    blocks[num_blocks++] = (struct block){start, bytes, owner, current_device};
    if (owner == DEVICE) live_bytes[current_device] += bytes;
  }
  pthread_mutex_unlock(&lock);
  return start;
}

static void release(void *start) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < num_blocks; i++)
    if (blocks[i].start == start) {
      if (blocks[i].owner == DEVICE) live_bytes[blocks[i].device] -= blocks[i].bytes;
      munmap(start, blocks[i].bytes);
      blocks[i] = blocks[--num_blocks];
      break;
    }
  pthread_mutex_unlock(&lock);
}

static struct block find(const void *pointer) {
  struct block found = {NULL, 0, UNKNOWN, 0};
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < num_blocks; i++)
    if (blocks[i].start <= (char *)pointer && (char *)pointer < blocks[i].start + blocks[i].bytes) {
      found = blocks[i];
      break;
    }
  pthread_mutex_unlock(&lock);
  return found;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  *pointer = bytes ? allocate(bytes, DEVICE) : NULL;
  if (bytes && !*pointer) return cudaErrorMemoryAllocation;
  PHANTOM_ADD(allocations, 1);
  return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  if (pointer) release(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  *pointer = allocate(bytes ? bytes : 1, PINNED);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = device_bytes();
  *unused = *total - live_bytes[current_device];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  struct block found = find(pointer);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = found.owner == DEVICE   ? cudaMemoryTypeDevice
                     : found.owner == PINNED ? cudaMemoryTypeHost
                                             : cudaMemoryTypeUnregistered;
  attributes->device = found.owner == UNKNOWN ? -2 : found.device;
  attributes->devicePointer = found.owner == UNKNOWN ? NULL : (void *)pointer;
  attributes->hostPointer = found.owner == DEVICE ? NULL : (void *)pointer;
  return cudaSuccess;
}

/* Above PHANTOM_GPU_COPY_BYTES nothing is copied: for models that fit into no host's memory. */
static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) {
    PHANTOM_ADD(to_host, 1);
    PHANTOM_ADD(to_host_bytes, bytes);
    if (find(to).owner == UNKNOWN) PHANTOM_ADD(pageable, 1);
  } else if (kind == cudaMemcpyHostToDevice) {
    PHANTOM_ADD(to_device, 1);
    PHANTOM_ADD(to_device_bytes, bytes);
    if (find(from).owner == UNKNOWN) PHANTOM_ADD(pageable, 1);
  }
  if (bytes <= number("PHANTOM_GPU_COPY_BYTES", (size_t)-1)) memmove(to, from, bytes);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  PHANTOM_ADD(syncs, 1);
  copy(to, from, bytes, kind);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  copy(to, from, bytes, kind);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind);
  return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t bytes, cudaStream_t stream) {
  memmove(to, from, bytes);
  return cudaSuccess;
}

static void fill(char *start, int value, size_t bytes) {
  char *first_page = (char *)(((size_t)start + PAGE - 1) & ~(PAGE - 1));
  char *end = start + bytes, *end_page = (char *)((size_t)end & ~(PAGE - 1));
  if (value || end_page <= first_page || (size_t)(end_page - first_page) < LARGEST_ZEROED) {
    memset(start, value, bytes);
    return;
  }
  madvise(first_page, end_page - first_page, MADV_DONTNEED); /* reads as 0, takes no memory */
  memset(start, 0, first_page - start);
  memset(end_page, 0, end - end_page);
}

cudaError_t cudaMemset(void *start, int value, size_t bytes) {
  fill(start, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
  fill(start, value, bytes);
  return cudaSuccess;
}

/* ---- kernels -------------------------------------------------------------------------------- */

static cudaError_t launch(void) {
  PHANTOM_ADD(launches, 1);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  return launch();
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return launch();
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                void **arguments) {
  return launch();
}

cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                        size_t shared_bytes, cudaStream_t stream) {
  return launch();
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute name, int value) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks_per_sm, const void *kernel,
                                                          int block_size, size_t shared_bytes) {
  *blocks_per_sm = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_per_sm,
                                                                   const void *kernel,
                                                                   int block_size,
                                                                   size_t shared_bytes,
                                                                   unsigned flags) {
  *blocks_per_sm = 2;
  return cudaSuccess;
}

/* ---- streams and events: everything has happened already -------------------------------------- */

static cudaError_t wait_for_device(void) {
  PHANTOM_ADD(syncs, 1);
  return cudaSuccess;
}

static size_t new_handle(void) {
  static size_t last;
  return 64 * __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

cudaError_t cudaDeviceSynchronize(void) { return wait_for_device(); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for_device(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for_device(); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)new_handle();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *num_dependencies) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  return cudaSuccess;
}

/* ---- devices -------------------------------------------------------------------------------- */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = number("PHANTOM_GPUS", 1);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  int count;
  cudaGetDeviceCount(&count);
  if (device < 0 || device >= count) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaInitDevice(int device, unsigned flags, unsigned unused) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

/* The driver's own functions (for example for multicast memory) do not exist. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

/* An H100 SXM, as its data sheet and the CUDA programming guide describe compute capability 9.0. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "NVIDIA H100 80GB HBM3");
  properties->major = 9;
  properties->minor = 0;
  properties->totalGlobalMem = device_bytes();
  properties->multiProcessorCount = 132;
  properties->l2CacheSize = 50 << 20;
  properties->warpSize = 32;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->totalConstMem = 65536;
  properties->textureAlignment = 512;
  properties->asyncEngineCount = 3;
  properties->concurrentKernels = properties->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = properties.sharedMemPerBlockOptin; break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

/* CUPTI would call tables inside the driver. Without it torch's profiler traces the host only. */
int cuptiSubscribe(void **subscriber, void *callback, void *data) { return 15; /* not initialized */ }
