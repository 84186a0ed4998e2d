#pragma once

namespace csulora {

/// A function that is compiled anew into every function that calls it.
#define CSULORA_INLINED inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v4"))) auto run_on_v4(Arguments... arguments) {
  return Kernel::template run<16>(arguments...);
}

template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v3"))) auto run_on_v3(Arguments... arguments) {
  return Kernel::template run<8>(arguments...);
}
#endif

/// Kernel::run<kLanes>(arguments...), which is CSULORA_INLINED, with the widest instructions that the machine has: one
/// binary for every x86. kLanes is the number of float32 entries in one of the machine's vectors. Wider ones than it
/// has would be kept in memory. Builds with CSULORA_LANES take that number, so that one machine can test all.
template <typename Kernel, typename... Arguments>
auto run_widest(Arguments... arguments) {
#ifdef CSULORA_LANES
  return Kernel::template run<CSULORA_LANES>(arguments...);
#else
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return run_on_v4<Kernel>(arguments...);
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return run_on_v3<Kernel>(arguments...);
  }
#endif
  return Kernel::template run<4>(arguments...);
#endif
}

}  // namespace csulora
