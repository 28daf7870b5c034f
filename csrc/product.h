// The matrix product of one tile, on one thread, summed in float32: C[M, N] (+)= A[M, K] B[K, N].
//
// B is packed once and shared by all threads, in panels of `width` columns; within a panel the `step` values that one
// instruction multiplies and adds lie side by side (for bfloat16, "VNNI" order: [K / 2, width, 2]).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace tbrm {

template <typename P>
struct Product {
  static constexpr int64_t step = 4 / sizeof(P);  // 1 for float, 2 for bfloat16

  static int64_t padded(int64_t k) { return (k + step - 1) / step * step; }
};

template <typename P>
class PackedMatrix {
 public:
  // value(k, n) is B[k, n] as a float. Beyond K and N the panels hold zeros.
  template <typename Value>
  PackedMatrix(int64_t K, int64_t N, int64_t width, const Value& value)
      : K_(Product<P>::padded(K)), width_(width), panels_((N + width - 1) / width), data_(new P[panels_ * width * K_]) {
    constexpr int64_t step = Product<P>::step;
    const int64_t groups = K_ / step;
    at::parallel_for(0, panels_ * groups, 1 + 4096 / width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n0 = i / groups * width, k0 = i % groups * step;
        P* out = data_.get() + i * width * step;
        for (int64_t n = n0; n < n0 + width; ++n) {
          for (int64_t k = k0; k < k0 + step; ++k) {
            *out++ = static_cast<P>(k < K && n < N ? value(k, n) : 0.0f);
          }
        }
      }
    });
  }

  int64_t K() const { return K_; }
  int64_t width() const { return width_; }
  int64_t panels() const { return panels_; }

  // C[M, columns] (+)= A[M, K] times the first `columns` columns of a panel.
  void multiply(const P* A, int64_t lda, int64_t M, int64_t panel, int64_t columns, float* C, int64_t ldc, bool add) const {
    at::native::cpublas::brgemm(
        M, columns, K_, lda, width_, ldc, add, A, data_.get() + panel * width_ * K_, C, /*is_vnni=*/Product<P>::step > 1);
  }

 private:
  int64_t K_, width_, panels_;
  std::unique_ptr<P[]> data_;
};

}  // namespace tbrm
