// Shadows jittor/extern/cuda/inc/helper_cuda.h (found first through -iquote) and hands on to
// the original with #include_next.
// CUDA 13 removed cudaDeviceProp::computeMode and ::clockRate (among others);
// the original uses both.  Give it a type that still has them.
#pragma once
#include <cuda_runtime.h>
#if CUDART_VERSION >= 13000
#ifndef MOSS_JT_DEVICE_PROP
#define MOSS_JT_DEVICE_PROP
struct moss_jt_cudaDeviceProp : cudaDeviceProp {
  int clockRate = 0;
  int memoryClockRate = 0;
  int computeMode = 0;
};
static inline cudaError_t moss_jt_cudaGetDeviceProperties(
    moss_jt_cudaDeviceProp* p, int dev) {
  cudaError_t e = ::cudaGetDeviceProperties(static_cast<cudaDeviceProp*>(p), dev);
  if (e != cudaSuccess) return e;
  e = cudaDeviceGetAttribute(&p->clockRate, cudaDevAttrClockRate, dev);
  if (e != cudaSuccess) return e;
  e = cudaDeviceGetAttribute(&p->memoryClockRate, cudaDevAttrMemoryClockRate, dev);
  if (e != cudaSuccess) return e;
  return cudaDeviceGetAttribute(&p->computeMode, cudaDevAttrComputeMode, dev);
}
#endif
#pragma push_macro("cudaDeviceProp")
#pragma push_macro("cudaGetDeviceProperties")
#undef cudaDeviceProp
#undef cudaGetDeviceProperties
#define cudaDeviceProp moss_jt_cudaDeviceProp
#define cudaGetDeviceProperties moss_jt_cudaGetDeviceProperties
#include_next <helper_cuda.h>
#pragma pop_macro("cudaGetDeviceProperties")
#pragma pop_macro("cudaDeviceProp")
#else
#include_next <helper_cuda.h>
#endif
