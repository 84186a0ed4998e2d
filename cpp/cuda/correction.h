#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "element.h"

namespace csulora::cuda {

class HandleLease;

/// What modules that are corrected in one batch have in common.
struct CorrectionShape {
  int64_t count = 0;        ///< modules, at least 1 and at most 65535
  int64_t rows = 0;         ///< m
  int64_t columns = 0;      ///< n
  int64_t rank = 0;         ///< r of the updates
  int64_t directions = 0;   ///< k of the subspaces; may be 0
  int64_t result_rank = 0;  ///< rank to emit, at most 2 r
  Element b{};              ///< what b is stored as, also in the result
  Element a{};
  Element basis{};  ///< of u and v
};

/// How much of each component is kept: as csulora::Penalties or as csulora::Gains say, in a form that device code
/// reads.
struct Attenuation {
  enum class Kind { penalties, gains };
  struct Penalties {
    double aligned;
    double partial;
    double off;
  };
  struct Gains {
    double aligned;
    double left;
    double right;
    double off;
  };

  Kind kind;  ///< which of the two is set
  union {
    Penalties penalties;
    Gains gains;
  };
};

/// One module: its matrices, row-major and on the device, and its numbers.
struct ModuleArguments {
  const void* b;   ///< (m, r)
  const void* a;   ///< (r, n)
  const void* u;   ///< (m, k)
  const float* s;  ///< (k)
  const void* v;   ///< (n, k)
  void* result_b;  ///< (m, result_rank), written
  void* result_a;  ///< (result_rank, n), written
  double scale;    ///< of the update, dW = scale b a
  Attenuation attenuation;
};

/// What was measured on one module; documented with csulora::Correction.
struct Measured {
  double energies[4];  ///< aligned, left, right, off
  double gains[4];
  double norm;
  double relative_change;
  double undo;
  double undo_after;  ///< of the corrected factors before they are rounded
  double truncation_error;
  double core_norm;  ///< |X|_F
  double finite;     ///< 0 where the update, the subspace or the rounded result is not finite
  double failures;   ///< small decompositions that did not succeed; means nothing unless `finite`
};

/// The correction of csulora/correct.h for a batch of modules of one shape, in float64, on one stream. What it
/// gives is rounded once.
///
/// Per side, B and A^T are split into what lies inside and outside the subspace and made orthonormal by shifted
/// Cholesky QR, done three times (Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa 2020) on columns of equal norm: as
/// accurate as Householder QR, rank-deficient or not. The 2r x 2r core is projected on the leading eigenvectors of
/// core core^T, which is its best approximation to the square root of float64's rounding, relative to X.
class CorrectionPlan {
 public:
  /// @param lease  says where to compute; must outlive the plan
  /// @throws DeviceError, and DeviceMemoryError, as do the other members
  CorrectionPlan(const CorrectionShape& shape, const HandleLease& lease);
  ~CorrectionPlan();
  CorrectionPlan(const CorrectionPlan&) = delete;
  CorrectionPlan& operator=(const CorrectionPlan&) = delete;

  /// Bytes of device memory that `run` needs.
  size_t workspace_bytes() const;

  /// The share of it that grows with each module, without what the libraries ask for.
  static size_t bytes_per_module(const CorrectionShape& shape);

  /// Enqueues the correction and does not wait for it. The plan must live until it has been done.
  /// @param modules    (count) on the device
  /// @param measured   (count) on the device, written
  /// @param workspace  device memory, 256-byte aligned, used in stream order
  void run(const ModuleArguments* modules, Measured* measured, void* workspace);

 private:
  struct Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace csulora::cuda
