/* cuBLAS without products, preloaded with runtime.c.
 *
 * `phantom_blas_list.h` is generated from what this torch calls (build.py): FUNCTION(name) for each
 * that is not defined below, and PRODUCT(name) for those that multiply matrices.
 */
#include "phantom.h"

#define SUCCESS 0
#define FUNCTION(name) int name(void) { return SUCCESS; }
#define PRODUCT(name) \
  int name(void) { PHANTOM_ADD(gemms, 1); return SUCCESS; }
#include "phantom_blas_list.h"

/* Any address that is not NULL; nothing reads through it. */
#define HANDLE ((void *)64)

int cublasCreate_v2(void **handle) {
  *handle = HANDLE;
  return SUCCESS;
}

int cublasLtCreate(void **handle) {
  *handle = HANDLE;
  return SUCCESS;
}

int cublasGetVersion_v2(void *handle, int *version) {
  *version = 130100;
  return SUCCESS;
}

int cublasGetMathMode(void *handle, int *mode) {
  *mode = 0;
  return SUCCESS;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
  *mode = 0;
  return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, void *results,
                                   int *num_found) {
  *num_found = 1;
  return SUCCESS;
}
