// Shared code of the CPU kernels.
#pragma once

// Compiles a function once for each x86-64 level and picks the widest the machine has when the library is loaded. The
// function must be free of calls that are not inlined (SENDVAE_HD functions are).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SENDVAE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SENDVAE_CPU_CLONES
#endif
