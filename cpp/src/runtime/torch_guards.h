#pragma once

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace csulora {

/// As long as it lives, the thread computes as if its caller had set none of torch's modes: nothing is recorded for
/// gradients, autocast takes no digits, and what is kept between calls can be written to outside of inference mode.
class TorchGuards {
  c10::InferenceMode no_inference_mode_{false};
  c10::NoGradGuard no_gradients_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace csulora
