// The matrix product of one tile, on one thread, summed in float32: C[M, N] (+)= A[M, K] B[K, N].
//
// B is packed once and shared by all threads, in panels of `width` columns; within a panel the `step` values that one
// instruction multiplies and adds lie side by side (for bfloat16, "VNNI" order: [K / 2, width, 2]).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "huge_pages.h"

namespace tbrm {

constexpr int64_t kBlock = 128;  // vocabulary rows that are multiplied at once

inline int64_t divup(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename P>
struct Product {
  static constexpr int64_t step = 4 / sizeof(P);  // 1 for float, 2 for bfloat16

  static int64_t padded(int64_t k) { return divup(k, step) * step; }
};

// A [M, K] and B [K, N], which is laid out as PackedMatrix does it: for float32, row by row.
template <typename P>
void multiply(const P* A, int64_t lda, const P* B, int64_t ldb, int64_t M, int64_t N, int64_t K, float* C, int64_t ldc,
              bool add) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, /*is_vnni=*/Product<P>::step > 1);
}

template <typename P>
class PackedMatrix {
 public:
  PackedMatrix(int64_t K, int64_t N, int64_t width)
      : K_(Product<P>::padded(K)), width_(width), panels_(divup(N, width)), data_(make_buffer<P>(panels_ * width * K_)) {}

  template <typename Value>
  PackedMatrix(int64_t K, int64_t N, int64_t width, const Value& value) : PackedMatrix(K, N, width) {
    pack(K, N, value);
  }

  // value(k, n) is B[k, n]. K may be less than there is room for. Beyond K and N the panels hold zeros.
  template <typename Value>
  void pack(int64_t K, int64_t N, const Value& value) {
    constexpr int64_t step = Product<P>::step;
    K_ = Product<P>::padded(K);
    const int64_t groups = K_ / step;
    at::parallel_for(0, panels_ * groups, 1 + 4096 / width_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n0 = i / groups * width_, k0 = i % groups * step, columns = std::min(width_, N - n0);
        P* out = data_.get() + i * width_ * step;
        for (int64_t n = 0; n < columns; ++n) {
          for (int64_t k = k0; k < k0 + step; ++k) *out++ = k < K ? value(k, n0 + n) : static_cast<P>(0.0f);
        }
        std::fill_n(out, (width_ - columns) * step, static_cast<P>(0.0f));
      }
    });
  }

  int64_t K() const { return K_; }
  int64_t width() const { return width_; }
  int64_t panels() const { return panels_; }

  // C[M, columns] (+)= A[M, K] times the first `columns` columns of a panel.
  void multiply(const P* A, int64_t lda, int64_t M, int64_t panel, int64_t columns, float* C, int64_t ldc,
                bool add) const {
    tbrm::multiply(A, lda, data_.get() + panel * width_ * K_, width_, M, columns, K_, C, ldc, add);
  }

 private:
  int64_t K_, width_, panels_;
  Buffer<P> data_;
};

// A block of the weight as the product wants it: itself, or where its type or an odd width forbids that, a copy.
template <typename W, typename P>
class WeightBlocks {
 public:
  WeightBlocks(const at::Tensor& weight, int64_t padded_width)
      : data_(weight.const_data_ptr<W>()), ld_(weight.stride(0)), width_(weight.size(1)), padded_(padded_width) {
    if constexpr (std::is_same_v<W, P>) direct_ = padded_ == width_;
  }

  int64_t ld() const { return direct_ ? ld_ : padded_; }

  const P* rows(int64_t first, int64_t count, std::vector<P>& copy) const {
    if constexpr (std::is_same_v<W, P>) {
      if (direct_) return data_ + first * ld_;
    }
    copy.resize(kBlock * padded_);
    for (int64_t v = 0; v < count; ++v) {
      const W* in = data_ + (first + v) * ld_;
      P* out = copy.data() + v * padded_;
      for (int64_t d = 0; d < width_; ++d) out[d] = static_cast<P>(static_cast<float>(in[d]));
      std::fill(out + width_, out + padded_, static_cast<P>(0.0f));
    }
    return copy.data();
  }

 private:
  const W* data_;
  int64_t ld_, width_, padded_;
  bool direct_ = false;
};

}  // namespace tbrm
