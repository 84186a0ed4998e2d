#pragma once

// One binary for every x86: the loader picks a function's widest instructions that the machine has. The sanitizers'
// run-time is not ready yet when it does.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define CSULORA_FOR_EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CSULORA_FOR_EVERY_X86
#endif

/// A function that is compiled anew into every clone of the functions that call it.
#define CSULORA_INLINED inline __attribute__((always_inline))
