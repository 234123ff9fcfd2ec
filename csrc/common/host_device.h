// Marks for code that the host compiler and nvcc share.
#pragma once

// A function for both sides, always inlined: the CPU kernels are cloned per instruction set (see cpu.h), and only what
// is inlined into a clone is compiled for that clone's instruction set.
#if defined(__CUDACC__)
#define SENDVAE_HD __host__ __device__ __forceinline__
#else
#define SENDVAE_HD inline __attribute__((always_inline))
#endif

// Asks for full unrolling of the loop that follows, so that small arrays live in registers. nvcc's host pass gets
// nothing, because its version of these functions never runs.
#if defined(__CUDA_ARCH__)
#define SENDVAE_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define SENDVAE_UNROLL
#else
#define SENDVAE_UNROLL _Pragma("GCC unroll 16")
#endif
