// With NVIDIA's compiler and libraries, on any machine.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <cstddef>
#include <string>

#include "csulora/error.h"
#include "cuda/arena.h"
#include "cuda/correction.h"
#include "cuda/displacement.cuh"
#include "cuda/handles.h"
#include "cuda/status.h"

using csulora::DeviceError;
using csulora::DeviceMemoryError;
using csulora::InternalError;
using csulora::cuda::Arena;
using csulora::cuda::check;
using csulora::cuda::CorrectionPlan;
using csulora::cuda::CorrectionShape;
using csulora::cuda::Element;

namespace {

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

bool throws_memory_error(cudaError_t status) {
  try {
    check(status, "call");
  } catch (const DeviceMemoryError&) {
    return true;
  } catch (const DeviceError&) {
  }
  return false;
}

}  // namespace

TEST_CASE("success is silent") {
  CHECK_NOTHROW(check(cudaSuccess, "call"));
  CHECK_NOTHROW(check(CUBLAS_STATUS_SUCCESS, "call"));
  CHECK_NOTHROW(check(CUSOLVER_STATUS_SUCCESS, "call"));
}

TEST_CASE("memory that ran out is told from other failures") {
  CHECK_THROWS_AS(check(cudaErrorMemoryAllocation, "call"), DeviceMemoryError);
  CHECK_THROWS_AS(check(CUBLAS_STATUS_ALLOC_FAILED, "call"), DeviceMemoryError);
  CHECK_THROWS_AS(check(CUSOLVER_STATUS_ALLOC_FAILED, "call"), DeviceMemoryError);
  for (const auto status : {cudaErrorInvalidValue, cudaErrorIllegalAddress, cudaErrorNoDevice}) {
    CHECK_THROWS_AS(check(status, "call"), DeviceError);
    CHECK_THROWS_AS(check(status, "call"), InternalError);
    CHECK_FALSE(throws_memory_error(status));
  }
}

TEST_CASE("a failure names the call and the reason") {
  const auto message = message_of([] { check(cudaErrorIllegalAddress, "cudaMemcpyAsync"); });
  CHECK(message.find("cudaMemcpyAsync") != std::string::npos);
  CHECK(message.find("illegal memory access") != std::string::npos);
  CHECK(message_of([] { check(CUBLAS_STATUS_NOT_SUPPORTED, "gemm"); }).find("supported") != std::string::npos);
  CHECK(message_of([] { check(CUSOLVER_STATUS_INVALID_VALUE, "eig"); }).find("3") != std::string::npos);
}

TEST_CASE("an arena measures what it would hand out") {
  alignas(Arena::kAlignment) std::byte memory[2048];
  Arena measuring(nullptr);
  Arena handing(memory);
  for (const int64_t count : {1, 33, 0, 64}) {
    CHECK(measuring.take<double>(count) == nullptr);
    auto* piece = reinterpret_cast<std::byte*>(handing.take<double>(count));
    CHECK((piece - memory) % Arena::kAlignment == 0);
    CHECK(piece + count * sizeof(double) <= memory + handing.used());
    CHECK(measuring.used() == handing.used());
  }
  CHECK(handing.used() == 256 + 512 + 0 + 512);
}

TEST_CASE("a module's workspace is what its matrices take") {
  const CorrectionShape shape{1, 4096, 1024, 16, 64, 16, Element::bfloat16, Element::bfloat16, Element::half};
  const size_t tall = size_t{4096} * (32 + 64) + (4096 + 1024) * 32;        // split, spare, orthonormal
  const size_t small = 2 * 64 * 16 + (7 + 4) * 32 * 32 + 32 + 2 * 32 * 16;  // coordinates, squares, values, factors
  const size_t bytes = CorrectionPlan::bytes_per_module(shape);
  CHECK(bytes >= (tall + small) * sizeof(double));
  CHECK(bytes <= (tall + small) * sizeof(double) + 20 * Arena::kAlignment);
  auto larger = shape;
  larger.directions = 256;
  CHECK(CorrectionPlan::bytes_per_module(larger) > bytes);
  larger = shape;
  larger.count = 100;  // is not read
  CHECK(CorrectionPlan::bytes_per_module(larger) == bytes);
}

TEST_CASE("without a GPU the documented error is thrown" * doctest::skip(has_gpu())) {
  CHECK_THROWS_AS(csulora::cuda::HandleLease{nullptr}, DeviceError);
  float difference = 0;
  double sum = 0;
  const float base = 1;
  CHECK_THROWS_AS(csulora::cuda::subtract({&base, Element::single}, {&base, Element::single}, 1, 1, &difference,
                                          {&sum, &sum, &sum}, nullptr),
                  DeviceError);
}
