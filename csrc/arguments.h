// What the operations of head.cpp check of their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "product.h"
#include "softmax_tile.h"
#include "weight_sum.h"

namespace tbrm {

using at::Tensor;

template <typename F>
void dispatch_weight(const Tensor& weight, const F& call) {
  switch (weight.scalar_type()) {
    case at::kFloat:
      return call(float{});
    case at::kBFloat16:
      return call(at::BFloat16{});
    case at::kHalf:
      return call(at::Half{});
    default:
      TORCH_CHECK(false, "tbrm_kernels: weight is ", weight.scalar_type(),
                  "; the CPU kernels take float32, bfloat16 and float16");
  }
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t length, at::ScalarType dtype) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == length && tensor.is_contiguous() && tensor.scalar_type() == dtype,
              "tbrm_kernels: ", name, " must be a contiguous [", length, "] tensor of ", dtype);
}

inline void check_scratch(const Tensor& exps, int64_t V, int64_t T) {
  TORCH_CHECK(
      exps.dim() == 2 && exps.is_contiguous() && exps.size(0) == V && exps.size(1) == divup(T, kStrip) * kStrip &&
          (exps.scalar_type() == at::kFloat || exps.scalar_type() == at::kBFloat16),
      "tbrm_kernels: exps must be a contiguous [V, T rounded up to ", kStrip, "] tensor of float32 or bfloat16");
}

inline void check_operands(const Tensor& hidden, const Tensor& weight) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.size(0) > 0 &&
                  hidden.scalar_type() == weight.scalar_type() && hidden.stride(1) == 1 && weight.stride(1) == 1,
              "tbrm_kernels: hidden must be [T > 0, D] and weight [V, D], of one dtype, with rows in one piece");
}

inline WeightSum checked_sum(const Tensor& gradient, const std::optional<Tensor>& low_halves, int64_t V, int64_t D,
                             bool fresh, bool last) {
  const auto fits = [&](const Tensor& x) { return x.is_contiguous() && x.sizes() == at::IntArrayRef({V, D}); };
  const bool float32 = gradient.scalar_type() == at::kFloat;
  TORCH_CHECK(
      fits(gradient) && (float32 || gradient.scalar_type() == at::kBFloat16 || gradient.scalar_type() == at::kHalf),
      "tbrm_kernels: grad_weight must be a contiguous [V, D] tensor of float32, bfloat16 or float16");
  TORCH_CHECK(float32 || (fresh && last) || (low_halves && fits(*low_halves) && low_halves->element_size() == 2),
              "tbrm_kernels: low_halves must be a contiguous [V, D] tensor of 16 bits");
  return WeightSum(gradient, low_halves, fresh, last);
}

}  // namespace tbrm
