#pragma once

/// Everything that csulora's core offers: extraction of subspaces, correction of updates, annihilation ratios, and
/// errors.
///
/// This corrects the update of one weight whose base and aligned matrices are at hand. tests/cpp/example.cpp compiles
/// and runs it.
///
///     csulora::LoraFactors closest_safe(const at::Tensor& base, const at::Tensor& aligned,
///                                       const csulora::LoraFactors& update) {
///       csulora::ExtractOptions options;
///       options.rank = 8;
///       const csulora::Subspace subspace = csulora::extract_subspace(base, aligned, options);
///
///       const csulora::Penalties penalties{.aligned = 0, .partial = 1, .off = 1};
///       const csulora::Correction result = csulora::correct({update, subspace, penalties, "q_proj"});
///       std::cout << "undo " << result.undo << " -> " << result.undo_after << '\n';
///       return result.factors;
///     }
#include "csulora/annihilation.h"
#include "csulora/correct.h"
#include "csulora/error.h"
#include "csulora/extract.h"
#include "csulora/subspace.h"
