#pragma once

#include <csulora/csulora.h>

csulora::LoraFactors closest_safe(const at::Tensor& base, const at::Tensor& aligned,
                                  const csulora::LoraFactors& update);
