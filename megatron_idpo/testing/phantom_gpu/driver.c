/* libcuda.so.1 without a GPU, for Triton, which loads compiled kernels through the driver.
 *
 * `phantom_driver_list.h` is generated from cuda.h (build.py): FUNCTION(name) for each function of the
 * driver that is not defined below. The counters are those of runtime.c,
 * which is preloaded.
 */
#include "phantom.h"

#define SUCCESS 0
#define FUNCTION(name) int name(void) { return SUCCESS; }
#include "phantom_driver_list.h"

int cuInit(unsigned flags) { return SUCCESS; }

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}

int cuDeviceGetCount(int *count) {
  *count = 1;
  return SUCCESS;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return SUCCESS;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = 0;
  return SUCCESS;
}

/* The values of runtime.c, for the attributes that Triton reads (CUdevice_attribute). */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; break;      /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 0; break;      /* COMPUTE_CAPABILITY_MINOR */
    case 16: *value = 132; break;    /* MULTIPROCESSOR_COUNT */
    case 97: *value = 232448; break; /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    case 8: *value = 49152; break;   /* MAX_SHARED_MEMORY_PER_BLOCK */
    case 10: *value = 32; break;     /* WARP_SIZE */
    case 12:                         /* MAX_REGISTERS_PER_BLOCK */
    case 82: *value = 65536; break;  /* MAX_REGISTERS_PER_MULTIPROCESSOR */
    default: *value = 1;
  }
  return SUCCESS;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* MAX_THREADS_PER_BLOCK; registers and spills: 0 */
  return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
  *text = "an error of the phantom GPU";
  return SUCCESS;
}

int cuLaunchKernel(void) {
  PHANTOM_ADD(launches, 1);
  return SUCCESS;
}

int cuLaunchKernelEx(void) {
  PHANTOM_ADD(launches, 1);
  return SUCCESS;
}
