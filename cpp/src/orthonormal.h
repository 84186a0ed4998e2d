#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace csulora {

/// Orthonormal columns that span those of `block`, and the coefficients: block = first second.
///
/// @param block  (rows, b) float32
/// @return (rows, b) and (b, b) float32. Householder QR on the CPU; on a GPU, where that is slow, Cholesky QR
std::pair<at::Tensor, at::Tensor> orthonormal_columns(const at::Tensor& block);

/// Cholesky QR with a shift, done twice in float64 on columns of equal norm (after Fukaya, Kannan, Nakatsukasa,
/// Yamamoto & Yanagisawa 2020): orthonormal to float32 rounding for columns that are independent to float32 rounding,
/// and else but for directions that are made of rounding, which come out shorter than 1.
std::pair<at::Tensor, at::Tensor> cholesky_qr(const at::Tensor& block);

}  // namespace csulora
